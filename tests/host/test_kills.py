"""Print jobs from the stock client while the daemon is killed again and again: none is lost, none is printed twice."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path

import pytest

from bench.node import PRINTER, node
from tests.daemon.house import eventually, lp

pytestmark = pytest.mark.root

ROUNDS = 8
JOBS = 3


async def test_accepted_jobs_print_exactly_once_whenever_the_daemon_is_killed() -> None:
    chance = random.Random(20261121)
    async with node(1) as made:
        await made.start()
        desk = await made.run_pod("desk")
        printer = made.kubelet.held(desk, "desktop", PRINTER)[0]
        slot = made.slot(desk)
        asked: list[tuple[bytes, asyncio.Task[tuple[int, str]]]] = []
        for turn in range(ROUNDS):
            for number in range(JOBS):
                tag = f"<job {turn}.{number}>".encode()
                document = b"%!PS " + tag + b"x" * chance.choice([10, 20_000, 400_000]) + b"\n"
                asked.append((tag, asyncio.create_task(lp(slot, document, printer=printer, timeout_s=60))))
                await asyncio.sleep(chance.random() * 0.04)
            await asyncio.sleep(chance.random() * 0.12)
            assert made.process is not None
            made.process.kill()
            await made.process.wait()
            await made.start()
        accepted = [tag for tag, task in asked if (await task)[0] == 0]
        assert accepted
        output: Path = made.output("P0")
        await eventually(lambda: all(tag in output.read_bytes() for tag in accepted), 30)
        printed = output.read_bytes()
        assert [tag for tag, _ in asked if printed.count(tag) > 1] == []
