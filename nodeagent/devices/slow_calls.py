"""Calls into the kernel that may hang, bounded: whoever waits is let go in time, the thread that hangs is counted.

A USB reset, an unbind or a flush waits for a device; one that no longer answers holds the caller for 5 s per control request
(USB_CTRL_SET_TIMEOUT) and 30 s per SCSI command (SD_TIMEOUT), several times over, and no signal ends the wait. Such a thread
must not come from asyncio's pool: the pool has few, and the interpreter would wait for them at its end.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable
from typing import TypeVar

from nodeagent.errors import AgentError, Reason

T = TypeVar("T")

MAX_UNDER_WAY = 16
"""Threads that may hang at the same time; each costs its stack and a lock somewhere in the kernel."""


class SlowCalls:
    """`await calls(name, call, timeout_s=...)`: one call of a name at a time, each in a daemon thread of its own."""

    def __init__(self, limit: int = MAX_UNDER_WAY) -> None:
        self._limit = limit
        self._under_way: dict[str, float] = {}

    @property
    def under_way(self) -> tuple[str, ...]:
        """The names of the calls that have not come back, whether or not anybody still waits for them."""
        return tuple(self._under_way)

    async def __call__(self, name: str, call: Callable[[], T], *, timeout_s: float) -> T:
        """What `call` returns or raises. `name` says what hangs, for people: `the reset of port 1-2`.

        Raises AgentError with reason `deadline` after `timeout_s`, and at once while an earlier call of that name, or too
        many calls, still hang. A call that came too late has happened all the same.
        """
        loop = asyncio.get_running_loop()
        if name in self._under_way:
            raise AgentError(
                Reason.DEADLINE, f"{name} still hangs since {loop.time() - self._under_way[name]:.0f} s", hint=UNPLUG
            )
        if len(self._under_way) >= self._limit:
            raise AgentError(
                Reason.DEADLINE, f"{name} was not begun: {self._limit} others hang in the kernel", hint=UNPLUG
            )
        done: asyncio.Future[T] = loop.create_future()

        def settle(error: BaseException | None, value: T | None) -> None:
            self._under_way.pop(name, None)
            if done.done():
                return
            if error is not None:
                done.set_exception(error)
            else:
                done.set_result(value)  # type: ignore[arg-type]

        def work() -> None:
            error: BaseException | None = None
            value: T | None = None
            try:
                value = call()
            except BaseException as raised:  # it is raised again in the caller
                error = raised
            with contextlib.suppress(RuntimeError):  # the loop was closed; nobody asks any more
                loop.call_soon_threadsafe(settle, error, value)

        self._under_way[name] = loop.time()
        threading.Thread(target=work, name=f"slow: {name}", daemon=True).start()
        try:
            async with asyncio.timeout(timeout_s):
                return await done
        except TimeoutError:
            raise AgentError(Reason.DEADLINE, f"{name} took longer than {timeout_s:g} s", hint=UNPLUG) from None


UNPLUG = "unplug the device and plug it in again; its kernel driver waits for an answer"
