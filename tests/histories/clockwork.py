"""Time that is counted and not waited for, and a kill -9 at the n-th instruction that others can see.

A life of the daemon runs on this loop in a process of its own. Nothing in it is left to chance: time passes when nobody has
anything to do, work for threads is done by the loop, one job at a time, and every delay is drawn from a seed. Between any two
steps of tasks, statements of SQLite and changes of the file system lies a *point*; at the one that was chosen the process
ends as by kill -9: no `finally`, no `except`, no commit and no close is run.
"""

from __future__ import annotations

import asyncio
import contextvars
import os
import random
import selectors
import sqlite3
import sys
from collections.abc import Callable
from typing import Any

MAX_STEPS = 400_000
"""Of one life. A life of some hundred virtual seconds takes 20,000."""
CHANGES = frozenset({"os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.chmod", "os.link", "socket.bind"})
"""Audit events (PEP 578) of calls that change a directory; `open` counts when it is for writing."""
THREAD_DELAYS_S = (0.0, 0.0, 0.0, 0.001, 0.02)


class Stuck(KeyboardInterrupt):
    """Nothing will ever happen again, or it never ends. (Out of a callback asyncio lets only this kind of exception.)"""


class Points:
    """Counts points; `kill` is called, and does not return, at the one that was set."""

    def __init__(self, kill: Callable[[], None]) -> None:
        self.passed = 0
        self._kill, self._at = kill, -1
        self._active = False

    def set(self, ahead: int) -> None:
        """The process ends `ahead` points from now."""
        self._at = self.passed + ahead

    def point(self) -> None:
        self.passed += 1
        if self.passed == self._at:
            self._kill()

    def watch(self, below: str) -> None:
        """From now on also changes of the file system below a directory, and statements of SQLite."""

        def on_audit(event: str, arguments: tuple[Any, ...]) -> None:
            if event in CHANGES or (event == "open" and isinstance(arguments[2], int) and arguments[2] & os.O_ACCMODE):
                text = str(arguments[0])
                if text.startswith(below) or event == "socket.bind":
                    self.point()

        sys.addaudithook(on_audit)
        point, connect = self.point, sqlite3.connect

        class Connection(sqlite3.Connection):
            """SQLite's own, with a point before and after each statement."""

            def execute(self, *arguments: Any) -> sqlite3.Cursor:
                point()
                try:
                    return super().execute(*arguments)
                finally:
                    point()

            def executemany(self, *arguments: Any) -> sqlite3.Cursor:
                point()
                try:
                    return super().executemany(*arguments)
                finally:
                    point()

        sqlite3.connect = lambda *a, **k: connect(*a, **k, factory=Connection)  # type: ignore[assignment]


class Clockwork(asyncio.SelectorEventLoop):
    """`time()` is virtual and goes on from `now_s`. `after_step` is called after every step of a task or callback."""

    def __init__(self, now_s: float, points: Points, chance: random.Random) -> None:
        super().__init__(_Waitless(self))
        self.after_step: Callable[[], None] = lambda: None
        self.on_time: Callable[[float], None] = lambda now_s: None
        self.steps = 0
        self._now_s = now_s
        self._points, self._chance = points, chance
        self._busy_until: dict[int, float] = {}

    def time(self) -> float:
        return self._now_s

    def advance(self, seconds: float) -> None:
        self._now_s += seconds
        self.on_time(self._now_s)

    def call_soon(  # type: ignore[override]
        self, callback: Callable[..., Any], *args: Any, context: contextvars.Context | None = None
    ) -> asyncio.Handle:
        return super().call_soon(self._step, callback, *args, context=context)

    def call_at(  # type: ignore[override]
        self, when: float, callback: Callable[..., Any], *args: Any, context: contextvars.Context | None = None
    ) -> asyncio.TimerHandle:
        return super().call_at(when, self._step, callback, *args, context=context)

    def _step(self, callback: Callable[..., Any], *args: Any) -> None:
        self.steps += 1
        if self.steps > MAX_STEPS:
            raise Stuck(f"{MAX_STEPS} steps at {self._now_s:.3f}")
        self._points.point()
        callback(*args)
        self.after_step()

    def run_in_executor(self, executor: Any, func: Callable[..., Any], *args: Any) -> asyncio.Future[Any]:  # type: ignore[override]
        """Done here and later, in the order of asking where the pool has one thread. A job that was cancelled before it began
        may be done all the same: a thread that has taken it does not ask."""
        future = self.create_future()
        begins = self._now_s + self._chance.choice(THREAD_DELAYS_S)
        if executor is not None:
            begins = max(begins, self._busy_until.get(id(executor), 0.0))
            self._busy_until[id(executor)] = begins
        self.call_at(begins, self._work, future, func, *args)
        return future

    def _work(self, future: asyncio.Future[Any], func: Callable[..., Any], *args: Any) -> None:
        if future.cancelled() and self._chance.random() < 0.5:
            return
        try:
            result = func(*args)
        except Exception as error:
            if not future.cancelled():
                future.set_exception(error)
        else:
            if not future.cancelled():
                future.set_result(result)


class _Waitless(selectors.DefaultSelector):  # type: ignore[valid-type,misc]
    """Where others wait for a descriptor, time passes."""

    def __init__(self, loop: Clockwork) -> None:
        super().__init__()
        self._loop = loop

    def select(self, timeout: float | None = None) -> Any:
        ready = super().select(0)
        if not ready and timeout is None:
            raise Stuck("everybody waits and nobody will come")
        if not ready and timeout:
            self._loop.advance(timeout)
        return ready
