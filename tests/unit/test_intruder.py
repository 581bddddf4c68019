"""The intruder tells the truth: all it tries is refused by the real filter, and it would notice if something were not."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from nodeagent.demo import intruder
from nodeagent.errors import AgentError, Reason
from nodeagent.services.ipp.service import IppService
from nodeagent.wire.seat import CreateJob, JobCreated, Jobs, Message, Printer, Printers, Serve, ToWorker

OWN, OTHER, JOB = "printer-of-b", "printer-of-a", 7
VICTIM = {"own": OWN, "other": OTHER, "job": JOB}
ANY_SUCCESS = b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n\x02\x00\x00\x00\x00\x00\x00\x01\x03"


class Daemon:
    """A link to a daemon that has room for jobs of this seat only."""

    def __init__(self) -> None:
        self.asked: list[Message] = []

    def next_request(self) -> int:
        return len(self.asked) + 1

    def send(self, message: Message) -> None:
        self.asked.append(message)

    async def ask(self, message: Message) -> tuple[ToWorker, int | None]:
        self.asked.append(message)
        if isinstance(message, CreateJob):
            return JobCreated(request=message.request, job=JOB), None
        raise AgentError(Reason.NOT_YOURS, "no such job")


@asynccontextmanager
async def filtered(directory: Path) -> AsyncIterator[tuple[IppService, Daemon]]:
    """The real filter of a seat with one printer, on `ipp.sock`."""
    daemon = Daemon()
    limits = {"max_document_bytes": 1 << 20, "max_connections": 8, "idle_s": 10.0}
    service = IppService(daemon, Serve(service="ipp", desktop="team-b/desk-b", **limits))  # type: ignore[arg-type]
    formats = ("application/postscript",)
    mine = Printer(name=OWN, info="mine", make_and_model="mine", formats=formats, online=True)
    service.on_message(Printers(printers=(mine,)))
    service.on_message(Jobs(jobs=()))
    loop = asyncio.get_running_loop()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(directory / "ipp.sock"))
        listener.listen()
        listener.setblocking(False)

        async def accept() -> None:
            async with asyncio.TaskGroup() as connections:
                while True:
                    link, _ = await loop.sock_accept(listener)
                    connections.create_task(service.connection(link))

        accepting = asyncio.create_task(accept())
        try:
            yield service, daemon
        finally:
            accepting.cancel()
            await asyncio.wait({accepting})


async def tells(directory: Path, verb: str, **given: object) -> Any:
    """What the intruder prints, run as the demo runs it."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-I", "-c", Path(intruder.__file__).read_text(), verb, json.dumps(given)),
        env={**os.environ, "CUPS_SERVER": str(directory / "ipp.sock")},
        stdout=asyncio.subprocess.PIPE,
    )
    out, _ = await process.communicate()
    assert process.returncode == 0
    return json.loads(out)


async def test_the_filter_refuses_and_counts_everything(short_tmp: Path) -> None:
    async with filtered(short_tmp) as (service, daemon):
        attempts = await tells(short_tmp, "attack", **VICTIM, paths=[str(short_tmp / "no.sock")], search=[])
        assert [a["attempt"] for a in attempts if not a["refused"]] == []
        assert sum(service.counters().denied.values()) >= sum(a["ipp"] for a in attempts) >= 15
        assert daemon.asked == []
        (path,) = [a for a in attempts if a["attempt"].endswith("no.sock")]
        assert path["refused"]


async def test_a_job_is_opened_and_looked_at(short_tmp: Path) -> None:
    async with filtered(short_tmp) as (_, daemon):
        assert await tells(short_tmp, "open", own=OWN) == JOB
        assert [type(m) for m in daemon.asked] == [CreateJob]
        assert await tells(short_tmp, "state", own=OWN, job=JOB) == 4


async def test_a_server_that_lets_everything_through_is_noticed(short_tmp: Path) -> None:
    async def careless(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        length = int(head.lower().partition(b"content-length: ")[2].split()[0])
        await reader.readexactly(length)
        writer.write(ANY_SUCCESS)
        writer.close()
        await writer.wait_closed()

    server = await asyncio.start_unix_server(careless, short_tmp / "ipp.sock")
    async with server:
        second = await asyncio.start_unix_server(careless, short_tmp / "other.sock")
        async with second:
            attempts = await tells(short_tmp, "attack", **VICTIM, paths=[], search=[str(short_tmp)])
    assert all(not a["refused"] for a in attempts if a["ipp"])
    assert any(a["attempt"].endswith("other.sock") and not a["refused"] for a in attempts)
