"""The host as the daemon sees it: its root (mounted at `host_root` in a pod), and commands run on it."""

from __future__ import annotations

import asyncio
import logging
import os
import shlex
from collections.abc import Sequence
from pathlib import Path

import msgspec

log = logging.getLogger(__name__)

MAX_ATTRIBUTE_BYTES = 4096
"""sysfs shows at most a page per attribute (Documentation/filesystems/sysfs.rst)."""


class HostRoot:
    """Paths and small files below the host's root; a captured tree works as well as `/`."""

    def __init__(self, root: str | Path = "/") -> None:
        self.root = Path(root)

    def path(self, absolute: str | Path) -> Path:
        """The host's `/sys/...` as a path this process can open."""
        return self.root / str(absolute).lstrip("/")

    def attribute(self, absolute: str | Path, default: str = "") -> str:
        """The text of one small file, stripped; `default` when it is gone or unreadable (sysfs files vanish while read)."""
        try:
            with self.path(absolute).open("rb") as file:
                return file.read(MAX_ATTRIBUTE_BYTES).decode(errors="replace").strip("\0\n\t ")
        except OSError:
            return default

    def boot_id(self) -> str:
        """Changes at every boot (random(4))."""
        return self.attribute("/proc/sys/kernel/random/boot_id")


class Finished(msgspec.Struct, frozen=True):
    """What an external command left: `code` is negative for a signal, -255 when it ran out of time."""

    code: int
    stdout: str
    stderr: str


async def run(
    argv: Sequence[str], *, timeout_s: float = 30, limit_bytes: int = 1 << 20, stdin: bytes = b""
) -> Finished:
    """Run one external command to its end and log it so that it can be pasted into a shell.

    At most `limit_bytes` of each stream are kept. Raises FileNotFoundError when there is no such program.
    """
    log.debug("run: %s", shlex.join(argv))
    process = await asyncio.create_subprocess_exec(
        *argv, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    try:
        async with asyncio.timeout(timeout_s):
            out, err = await process.communicate(stdin)
        code = process.returncode
    except TimeoutError:
        out, err, code = b"", b"timed out", -255
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    text = [s[:limit_bytes].decode(errors="replace") for s in (out, err)]
    return Finished(code if code is not None else -255, *text)


def write_atomically(path: Path, data: bytes, mode: int = 0o600) -> None:
    """Replace `path` by `data` so that a crash leaves the old or the new content, on disk (write, fsync, rename)."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, mode)
    try:
        os.write(fd, data)
        os.fsync(fd)
    finally:
        os.close(fd)
    temporary.replace(path)
    sync_directory(path.parent)


def sync_directory(path: Path) -> None:
    """Put the names in a directory on disk; without it a file that was just made or renamed may be gone after a power cut."""
    directory = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)
