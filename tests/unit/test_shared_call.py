"""A shared answer is never older than the question, and nothing outlives the callers."""

from __future__ import annotations

import asyncio
from itertools import pairwise

import pytest

from nodeagent.devices.shared_call import SharedCall


class Source:
    """A call whose runs a test ends one by one."""

    def __init__(self) -> None:
        self.runs: list[asyncio.Future[str]] = []
        self.cancelled = 0

    async def __call__(self) -> str:
        run: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self.runs.append(run)
        try:
            return await run
        except asyncio.CancelledError:
            self.cancelled += 1
            raise


class Clock:
    """Time that passes only when somebody sleeps."""

    def __init__(self) -> None:
        self.now = 100.0
        self.slept: list[float] = []

    def __call__(self) -> float:
        return self.now

    async def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds


async def settle() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


async def test_askers_of_one_moment_share_one_run() -> None:
    source = Source()
    shared = SharedCall(source)
    askers = [asyncio.create_task(shared()) for _ in range(200)]
    await settle()
    assert len(source.runs) == 1
    source.runs[0].set_result("first")
    assert set(await asyncio.gather(*askers)) == {"first"}


async def test_who_asks_during_a_run_gets_the_next_one() -> None:
    source = Source()
    shared = SharedCall(source)
    early = asyncio.create_task(shared())
    await settle()
    late = [asyncio.create_task(shared()) for _ in range(199)]
    await settle()
    assert len(source.runs) == 1, "one run at a time"
    source.runs[0].set_result("old")
    await settle()
    assert len(source.runs) == 2
    source.runs[1].set_result("new")
    assert await early == "old"
    assert set(await asyncio.gather(*late)) == {"new"}
    assert len(source.runs) == 2


async def test_an_error_reaches_its_own_round_only() -> None:
    source = Source()
    shared = SharedCall(source)
    early = [asyncio.create_task(shared()) for _ in range(2)]
    await settle()
    late = asyncio.create_task(shared())
    await settle()
    source.runs[0].set_exception(OSError("away"))
    await settle()
    source.runs[1].set_result("back")
    for asker in early:
        with pytest.raises(OSError, match="away"):
            await asker
    assert await late == "back"


async def test_a_cancelled_caller_leaves_the_others_alone() -> None:
    source = Source()
    shared = SharedCall(source)
    askers = [asyncio.create_task(shared()) for _ in range(3)]
    await settle()
    askers[0].cancel()
    await settle()
    source.runs[0].set_result("answer")
    assert await asyncio.gather(*askers[1:]) == ["answer", "answer"]
    assert askers[0].cancelled()
    assert not source.cancelled


async def test_the_last_caller_takes_the_run_along() -> None:
    source = Source()
    shared = SharedCall(source)
    asker = asyncio.create_task(shared())
    await settle()
    asker.cancel()
    await asyncio.wait({asker})
    assert source.cancelled == 1
    again = asyncio.create_task(shared())
    await settle()
    source.runs[1].set_result("fresh")
    assert await again == "fresh"


async def test_a_round_that_nobody_waits_for_any_more_never_begins() -> None:
    source = Source()
    shared = SharedCall(source)
    first = asyncio.create_task(shared())
    await settle()
    second = asyncio.create_task(shared())
    await settle()
    second.cancel()
    await asyncio.wait({second})
    third = asyncio.create_task(shared())
    await settle()
    source.runs[0].set_result("one")
    await settle()
    source.runs[1].set_result("two")
    assert (await first, await third) == ("one", "two")
    assert len(source.runs) == 2


async def test_runs_keep_their_distance() -> None:
    clock = Clock()
    begun: list[float] = []

    async def call() -> int:
        begun.append(clock.now)
        clock.now += 0.001
        return len(begun)

    shared = SharedCall(call, interval_s=0.025, clock=clock, sleep=clock.sleep)
    assert [await shared() for _ in range(4)] == [1, 2, 3, 4]
    assert [round(b - a, 6) for a, b in pairwise(begun)] == [0.025] * 3
    clock.now += 10
    await shared()
    assert len(clock.slept) == 3, "nobody waits after a pause"
