"""Programs as plain children of the test, with the signature of the zygote's `spawn_program`."""

from __future__ import annotations

import asyncio
import errno
import os
import shutil
import signal
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec

from nodeagent.wire.zygote import Limits


class Exit(msgspec.Struct, frozen=True):
    code: int


class PlainProgram:
    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.pid = process.pid
        self._process = process

    async def wait(self) -> Exit:
        return Exit(await self._process.wait())

    def kill(self, number: int = signal.SIGKILL) -> None:
        if self._process.returncode is None:
            self._process.send_signal(number)


class PlainSpawn:
    """Call it like the zygote. It changes no uid and confines nothing; `tmp` stands in for the private /tmp. What was
    started is in `programs`, how in `calls`."""

    def __init__(self, tmp: Path) -> None:
        self.tmp = tmp
        self.programs: list[PlainProgram] = []
        self.calls: list[dict[str, object]] = []

    async def __call__(
        self,
        argv: Sequence[str],
        *,
        uid: int | None,
        cgroup_procs: Sequence[Path],
        stdin: int,
        stdout: int,
        stderr: int,
        env: Mapping[str, str],
        network: bool,
        private_tmp_bytes: int = 0,
        hidden: Sequence[str] = (),
        limits: Limits = Limits(),  # noqa: B008
    ) -> PlainProgram:
        self.calls.append({"argv": tuple(argv), "uid": uid, "cgroup_procs": tuple(cgroup_procs), "network": network,
                           "private_tmp_bytes": private_tmp_bytes, "hidden": tuple(hidden), "limits": limits})  # fmt: skip
        if shutil.which(argv[0], path=env["PATH"]) is None:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), argv[0])
        env = dict(env) | ({"TMPDIR": str(self.tmp)} if "TMPDIR" in env else {})
        process = await asyncio.create_subprocess_exec(
            *argv, stdin=stdin, stdout=stdout, stderr=stderr, env=env, cwd="/", start_new_session=True
        )
        program = PlainProgram(process)
        self.programs.append(program)
        return program


def make_pdf(text: str, pages: int = 1) -> bytes:
    """A small PDF with one line of text per page, in a font that every reader has."""
    objects = [b"<< /Type /Catalog /Pages 2 0 R >>"]
    kids = " ".join(f"{4 + 2 * n} 0 R" for n in range(pages))
    objects.append(f"<< /Type /Pages /Kids [{kids}] /Count {pages} >>".encode())
    objects.append(b"<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>")
    for number in range(pages):
        stream = f"BT /F1 24 Tf 72 700 Td ({text} {number + 1}) Tj ET".encode()
        objects.append(
            f"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 595 842] /Contents {5 + 2 * number} 0 R"
            " /Resources << /Font << /F1 3 0 R >> >> >>".encode()
        )
        objects.append(b"<< /Length %d >>\nstream\n%s\nendstream" % (len(stream), stream))
    out, offsets = b"%PDF-1.4\n", []
    for number, content in enumerate(objects, 1):
        offsets.append(len(out))
        out += b"%d 0 obj\n%s\nendobj\n" % (number, content)
    table = b"".join(b"%010d 00000 n \n" % offset for offset in offsets)
    size = len(objects) + 1
    return out + b"xref\n0 %d\n0000000000 65535 f \n%strailer\n<< /Size %d /Root 1 0 R >>\nstartxref\n%d\n%%%%EOF\n" % (
        size, table, size, len(out),
    )  # fmt: skip


def count_open(directory: Path) -> int:
    """Descriptors of this process on files below `directory`, deleted ones included."""
    return sum(_target(entry).startswith(str(directory)) for entry in Path("/proc/self/fd").iterdir())


def _target(entry: Path) -> str:
    try:
        return os.readlink(entry)
    except OSError:
        return ""
