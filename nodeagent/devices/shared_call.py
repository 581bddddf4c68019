"""One call for many callers: everybody gets an answer that is not older than their question.

PreStartContainer asks "who holds this device now?" from up to a whole node's containers at once, while the kubelet answers
at most 100 such questions a second. An answer that was under way before the question is too old; one that began after the
latest of several questions serves them all.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class _Round(Generic[T]):
    """One call, and how many callers still want its answer."""

    def __init__(self) -> None:
        self.task: asyncio.Task[T]
        self.callers = 0


class SharedCall(Generic[T]):
    """`await shared()` returns (or raises) what a run of `call` gave that began after the await did.

    At most one run is under way and at most one is waiting to begin, whatever the number of callers; two runs begin at
    least `interval_s` apart. A caller that is cancelled leaves the others alone; when the last one leaves, the run is
    cancelled, so nothing outlives its callers and there is nothing to close.
    """

    def __init__(
        self,
        call: Callable[[], Awaitable[T]],
        *,
        interval_s: float = 0.0,
        clock: Callable[[], float] | None = None,
        sleep: Callable[[float], Awaitable[object]] = asyncio.sleep,
    ) -> None:
        self._call = call
        self._interval_s = interval_s
        self._clock = clock or (lambda: asyncio.get_running_loop().time())
        self._sleep = sleep
        self._earliest = float("-inf")
        self._running: _Round[T] | None = None
        self._next: _Round[T] | None = None

    async def __call__(self) -> T:
        mine = self._next
        if mine is None:
            mine = self._next = _Round()
            mine.task = asyncio.create_task(self._run(mine, self._running), name="shared call")
        mine.callers += 1
        try:
            return await asyncio.shield(mine.task)
        finally:
            mine.callers -= 1
            if not mine.callers and not mine.task.done():
                if self._next is mine:
                    self._next = None  # nobody joins a run that is being cancelled
                mine.task.cancel()
                await asyncio.wait({mine.task})

    async def _run(self, mine: _Round[T], previous: _Round[T] | None) -> T:
        if previous is not None:
            await asyncio.wait({previous.task})
        if (pause_s := self._earliest - self._clock()) > 0:
            await self._sleep(pause_s)
        self._earliest = self._clock() + self._interval_s
        self._next, self._running = None, mine  # who asks from here on is too late for this run
        try:
            return await self._call()
        finally:
            self._running = None
