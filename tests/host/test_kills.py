"""Print jobs while the daemon is killed again and again: none that was accepted is lost, none is printed twice.

The client is our own: when a connection breaks in mid-document, the stock `lp` may take the answer to its Create-Job for the
last word and end with 0, also in front of cupsd itself. Accepted here means that IPP's yes has arrived.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from pathlib import Path

import pytest

from bench.node import PRINTER, node
from nodeagent.wire import ipp
from nodeagent.wire.ipp import Group, GroupTag, Operation, Request
from tests.daemon.house import eventually

pytestmark = pytest.mark.root

ROUNDS = 10
JOBS = 3


async def print_job(socket: Path, printer: str, document: bytes) -> bool:
    """One Print-Job on a connection of its own; whether it was accepted."""
    attributes = (
        ipp.charset("attributes-charset", "utf-8"),
        ipp.language("attributes-natural-language", "en"),
        ipp.uri("printer-uri", f"ipp://localhost/printers/{printer}"),
    )
    body = ipp.put_request(Request((2, 0), Operation.PRINT_JOB, 1, (Group(GroupTag.OPERATION, attributes),))) + document
    head = f"POST / HTTP/1.1\r\nHost: x\r\nContent-Type: application/ipp\r\nContent-Length: {len(body)}\r\n\r\n"
    try:
        reader, writer = await asyncio.open_unix_connection(socket)
    except OSError:
        return False
    try:
        writer.write(head.encode() + body)
        await writer.drain()
        answer = (await reader.readuntil(b"\r\n\r\n")).split(b"\r\n")
        size = next(int(line.split(b":")[1]) for line in answer if line.lower().startswith(b"content-length:"))
        taken = ipp.take_response(await reader.readexactly(size))
    except (OSError, asyncio.IncompleteReadError):
        return False
    finally:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()
    return answer[0].startswith(b"HTTP/1.1 200") and taken is not None and taken[0].successful


async def test_accepted_jobs_print_exactly_once_whenever_the_daemon_is_killed() -> None:
    chance = random.Random(20261121)
    async with node(1) as made:
        await made.start()
        desk = await made.run_pod("desk")
        printer = made.kubelet.held(desk, "desktop", PRINTER)[0]
        slot = made.slot(desk)
        asked: list[tuple[bytes, asyncio.Task[bool]]] = []
        for turn in range(ROUNDS):
            for number in range(JOBS):
                tag = f"<job {turn}.{number}>".encode()
                document = b"%!PS " + tag + b"x" * chance.choice([10, 20_000, 400_000]) + b"\n"
                asked.append((tag, asyncio.create_task(print_job(slot / "ipp.sock", printer, document))))
                await asyncio.sleep(chance.random() * 0.04)
            await asyncio.sleep(chance.random() * 0.12)
            assert made.process is not None
            made.process.kill()
            await made.process.wait()
            await made.start()
        accepted = [tag for tag, task in asked if await task]
        assert accepted
        output: Path = made.output("P0")
        try:
            await eventually(lambda: all(tag in output.read_bytes() for tag in accepted), 30)
        except AssertionError:
            printed = output.read_bytes()
            lost = [tag for tag in accepted if tag not in printed]
            raise AssertionError(f"lost {lost}\n{(made.directory / 'log').read_text()[-6000:]}") from None
        printed = output.read_bytes()
        assert [tag for tag, _ in asked if printed.count(tag) > 1] == []
