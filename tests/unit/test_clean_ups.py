"""Clean-ups: once for each lease that ended, before the next pod, and never in the way for long."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from nodeagent.config import SeatsConfig
from nodeagent.devices.leases import Leases
from nodeagent.errors import AgentError, Reason
from nodeagent.metrics import Metrics
from nodeagent.model import CleanUp, PodRef
from nodeagent.seats.clean_ups import CleanUps

ALICE, BOB = PodRef("d", "alice", "uid-alice"), PodRef("d", "bob", "uid-bob")


class FakeRoster:
    """Seats that end when the test says so."""

    def __init__(self) -> None:
        self.device_ids = frozenset[str]()
        self.over = asyncio.Event()
        self.over.set()

    async def settled(self, ids: Any) -> None:
        await self.over.wait()


class Node:
    """Leases with `alice` having had device a (and b), and a hook that a test directs."""

    def __init__(self, leases: Leases, tasks: asyncio.TaskGroup, timeout_s: float) -> None:
        self.leases, self.roster, self.metrics = leases, FakeRoster(), Metrics()
        self.ran: list[CleanUp] = []
        self.free = asyncio.Event()
        self.free.set()
        self.fails: Exception | None = None
        roster: Any = self.roster
        self.clean_ups = CleanUps(
            leases=leases, roster=roster, hook=self.hook, metrics=self.metrics, tasks=tasks, timeout_s=timeout_s
        )

    async def hook(self, due: CleanUp) -> str:
        self.ran.append(due)
        await self.free.wait()
        if self.fails:
            raise self.fails
        return "port reset"

    def counted(self, result: str) -> float:
        return self.metrics.registry.get_sample_value("nodeagent_clean_ups_total", {"result": result}) or 0


@asynccontextmanager
async def node(path: Path, timeout_s: float = 5) -> AsyncIterator[Node]:
    async with Leases(path / "state.db", SeatsConfig()) as leases, asyncio.TaskGroup() as tasks:
        await leases.allocate("r", ["a", "b"], "slot", 1.0)
        await leases.bind("slot", ALICE, "desktop", "sandbox")
        await leases.release("slot")
        yield Node(leases, tasks, timeout_s)


async def test_the_next_pod_waits_for_it_and_it_runs_once(tmp_path: Path) -> None:
    async with node(tmp_path) as made:
        made.free.clear()
        waiting = [asyncio.create_task(made.clean_ups.before(["a"], BOB)) for _ in range(3)]
        made.clean_ups.of_dead(set())
        while len(made.ran) < 2:
            await asyncio.sleep(0)
        assert not any(w.done() for w in waiting)
        made.free.set()
        await asyncio.gather(*waiting)
        await made.clean_ups.before(["a", "b"], BOB)
        assert sorted(x.device_id for x in made.ran) == ["a", "b"]
        assert made.leases.clean_ups == ()
        made.clean_ups.of_dead(set())
        await asyncio.sleep(0)
        assert (len(made.ran), made.counted("ok")) == (2, 2)


async def test_the_same_pod_needs_none(tmp_path: Path) -> None:
    async with node(tmp_path) as made:
        await made.clean_ups.before(["a"], ALICE)
        made.clean_ups.of_dead({ALICE.uid})
        assert made.ran == []
        await made.leases.allocate("r", ["a"], "slot", 2.0)
        await made.leases.bind("slot", ALICE, "desktop", "sandbox")
        assert [x.device_id for x in made.leases.clean_ups] == ["b"], "its seat goes on with the device"


async def test_it_begins_when_the_seat_has_ended(tmp_path: Path) -> None:
    async with node(tmp_path) as made:
        made.roster.over.clear()
        waiting = asyncio.create_task(made.clean_ups.before(["a"], BOB))
        for _ in range(5):
            await asyncio.sleep(0)
        assert made.ran == []
        made.roster.over.set()
        await waiting
        assert len(made.ran) == 1


@pytest.mark.parametrize(
    ("fails", "result"),
    [(None, "timeout"), (OSError(19, "no such device"), "failed"), (AgentError(Reason.INTERNAL, "x"), "failed")],
)
async def test_a_device_that_hangs_or_refuses_is_given_up_on(
    tmp_path: Path, fails: Exception | None, result: str
) -> None:
    async with node(tmp_path, timeout_s=0.02) as made:
        made.fails = fails
        if fails is None:
            made.free.clear()
        await made.clean_ups.before(["a"], BOB)
        assert made.counted(result) == 1
        assert [x.device_id for x in made.leases.clean_ups] == ["b"], "and is not tried for ever"


async def test_a_crash_before_the_end_repeats_it(tmp_path: Path) -> None:
    async with node(tmp_path) as made:
        assert len(made.leases.clean_ups) == 2
    async with Leases(tmp_path / "state.db", SeatsConfig()) as leases, asyncio.TaskGroup() as tasks:
        again = Node(leases, tasks, 5)
        again.clean_ups.of_dead(set())
    assert sorted(x.device_id for x in again.ran) == ["a", "b"]
