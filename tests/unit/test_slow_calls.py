"""Calls that may hang: who waits is let go, who hangs is counted, and nothing is begun twice."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator

import pytest

from nodeagent.devices.slow_calls import SlowCalls
from nodeagent.errors import AgentError, Reason


@pytest.fixture
def hang() -> Iterator[threading.Event]:
    """Set at the end, so that no thread is left."""
    event = threading.Event()
    yield event
    event.set()


async def until_idle(slow: SlowCalls) -> None:
    async with asyncio.timeout(5):
        while slow.under_way:
            await asyncio.sleep(0.001)


async def test_what_a_call_returns_and_raises() -> None:
    slow = SlowCalls()
    assert await slow("a", lambda: 7, timeout_s=5) == 7

    def fail() -> None:
        raise AgentError(Reason.NOT_SUPPORTED, "no")

    with pytest.raises(AgentError, match="no"):
        await slow("a", fail, timeout_s=5)
    assert slow.under_way == ()


async def test_a_call_that_hangs_lets_its_caller_go_and_is_not_begun_again(hang: threading.Event) -> None:
    slow = SlowCalls()
    with pytest.raises(AgentError) as caught:
        await slow("the reset of 1-2", hang.wait, timeout_s=0.01)
    assert caught.value.reason is Reason.DEADLINE
    assert "the reset of 1-2 took longer than 0.01 s" in caught.value.message
    assert slow.under_way == ("the reset of 1-2",)
    with pytest.raises(AgentError, match="still hangs"):
        await slow("the reset of 1-2", lambda: pytest.fail("begun twice"), timeout_s=5)
    hang.set()
    await until_idle(slow)
    assert await slow("the reset of 1-2", lambda: 1, timeout_s=5) == 1


async def test_only_so_many_may_hang(hang: threading.Event) -> None:
    slow = SlowCalls(limit=2)
    for name in "ab":
        with pytest.raises(AgentError):
            await slow(name, hang.wait, timeout_s=0.01)
    with pytest.raises(AgentError, match="2 others hang"):
        await slow("c", lambda: pytest.fail("begun"), timeout_s=5)
    hang.set()
    await until_idle(slow)


async def test_a_caller_that_is_cancelled_leaves_the_call_alone(hang: threading.Event) -> None:
    slow = SlowCalls()
    task = asyncio.create_task(slow("a", hang.wait, timeout_s=60))
    while not slow.under_way:
        await asyncio.sleep(0)
    task.cancel()
    await asyncio.wait({task})
    assert slow.under_way == ("a",)
    hang.set()
    await until_idle(slow)
