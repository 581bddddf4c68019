"""The stock client prints into a real worker: own uid, seccomp filter, no thread, no import, nothing but descriptors."""

from __future__ import annotations

import asyncio
import hashlib
import os
import shutil
import socket
from pathlib import Path

import pytest

from nodeagent.seats.zygote import Zygote
from nodeagent.transports.unix import Channel, listen
from nodeagent.wire import seat as wire
from tests.fakes.ipp_seat import PRINTER

pytestmark = [
    pytest.mark.root,
    pytest.mark.skipif(shutil.which("lp") is None, reason="needs lp: the package cups-client"),
]

UNIQUE_KIB = 6 * 1024
"""What one idle worker may have for itself."""


class Daemon:
    """Answers one worker; documents go to files below `directory`."""

    def __init__(self, channel: Channel, directory: Path) -> None:
        self.channel = channel
        self.directory = directory
        self.jobs: dict[int, wire.Job] = {}
        self.printed = asyncio.Event()

    def say(self, message: wire.Message, *fds: int) -> None:
        self.channel.send(wire.put_message(message), fds)

    async def run(self) -> None:
        while True:
            data, _ = await self.channel.receive()
            match wire.take_from_worker(data):
                case wire.CreateJob(request=request, printer=printer, title=title):
                    job = len(self.jobs) + 1
                    self.jobs[job] = wire.Job(id=job, printer=printer, title=title, state=4, created_s=1)
                    self.say(wire.JobCreated(request=request, job=job))
                case wire.OpenDocument(request=request, job=job):
                    fd = os.open(self.directory / str(job), os.O_CREAT | os.O_WRONLY, 0o600)
                    self.say(wire.DocumentOpened(request=request), fd)
                    os.close(fd)
                case wire.CloseDocument(request=request):
                    self.say(wire.Done(request=request))
                    self.say(wire.Jobs(jobs=tuple(self.jobs.values())))
                    self.printed.set()


def unique_kib(pid: int) -> int:
    rows = (line.split() for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:])
    return sum(int(row[1]) for row in rows if row[0] in ("Private_Clean:", "Private_Dirty:"))


async def lp(directory: Path, *argv: str) -> str:
    env = {
        "PATH": os.environ["PATH"],
        "HOME": str(directory),
        "CUPS_SERVER": str(directory / "ipp.sock"),
        "LC_ALL": "C",
    }
    child = await asyncio.create_subprocess_exec(
        *argv, env=env, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
    )
    async with asyncio.timeout(20):
        return (await child.communicate())[0].decode()


async def test_a_confined_worker_prints(short_tmp: Path) -> None:
    pdf = b"%PDF-1.7\n" + os.urandom(5_000_000)
    (short_tmp / "page.pdf").write_bytes(pdf)
    (short_tmp / "spool").mkdir(mode=0o700)
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    async with Zygote() as zygote:
        with theirs:
            worker = await zygote.spawn_worker(uid=0x7100_0200, cgroup_procs=(), control=theirs, name="printing")
        daemon = Daemon(Channel(ours), short_tmp / "spool")
        answering = asyncio.ensure_future(daemon.run())
        with listen(short_tmp, "ipp.sock") as listener:
            daemon.say(
                wire.Serve(service="ipp", desktop="a/b", max_document_bytes=2**26, max_connections=4, idle_s=60.0),
                listener.fileno(),
            )
            daemon.say(wire.Printers(printers=(PRINTER,)))
            assert "system default destination: P1" in await lp(short_tmp, "lpstat", "-d")
            idle = unique_kib(worker.pid)
            assert idle <= UNIQUE_KIB, f"an idle worker has {idle} KiB of its own"
            assert (
                await lp(short_tmp, "lp", "-d", "P1", str(short_tmp / "page.pdf")) == "request id is P1-1 (1 file(s))\n"
            )
            await daemon.printed.wait()
            printed = (short_tmp / "spool" / "1").read_bytes()
            assert hashlib.sha256(printed).hexdigest() == hashlib.sha256(pdf).hexdigest()
            assert "no such job" in await lp(short_tmp, "cancel", "77")
            print(f"unique: idle {idle} KiB, after a job of 5 MB {unique_kib(worker.pid)} KiB")
        answering.cancel()
        daemon.channel.close()
        async with asyncio.timeout(5):
            await worker.wait()
