"""Follows the spool's jobs through cupsd with few questions: none while nothing is under way, and ever fewer the longer a
job takes. What cupsd has under one of our keys and nobody here knows is cancelled."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import msgspec

from nodeagent.errors import AgentError
from nodeagent.services.printing.cups_client import CupsJob

log = logging.getLogger(__name__)

KEY_PREFIX = "spool:"
"""What all keys of ours begin with; other jobs of this cupsd are left alone."""
SOONEST_S = 0.02
LATEST_S = 0.5
HELD = 4
"""job-state (RFC 8011 5.3.7) of a job without its file. We hold none: it is one that cupsd was killed over."""
HELD_S = 2.0
PATIENCE = 4
"""A job of age t is asked for after another t / PATIENCE, within the two limits."""


class PrintServer(Protocol):
    """What the spool needs of cupsd (services/printing/cups.py)."""

    async def available(self) -> None: ...
    async def submit(self, queue: str, key: str, document: Path, copies: int) -> int: ...
    async def jobs(self, first: int = 1) -> dict[str, CupsJob]: ...
    async def cancel(self, job: int) -> None: ...


class _Followed(msgspec.Struct):
    number: int
    since: float
    last: CupsJob | None
    on_progress: Callable[[CupsJob], None]
    end: asyncio.Future[CupsJob | None]


class CupsWatch:
    """`run()` asks; `is_known(key)` says whether the spool still wants that job."""

    def __init__(self, cups: PrintServer, is_known: Callable[[str], bool]) -> None:
        self._cups = cups
        self._is_known = is_known
        self._followed: dict[str, _Followed] = {}
        self._wake = asyncio.Event()
        self._sweeps = 1
        self._at_start: asyncio.Future[dict[str, CupsJob]] | None = None

    def sweep(self) -> None:
        """Look soon for jobs that nobody knows any more; twice, since cupsd may be about to take one."""
        self._sweeps = 2
        self._wake.set()

    async def found_at_start(self, key: str) -> CupsJob | None:
        """What an earlier life of the spool left in cupsd under this key."""
        return (await asyncio.shield(self._first())).get(key)

    async def follow(self, key: str, number: int, on_progress: Callable[[CupsJob], None]) -> CupsJob | None:
        """Wait for the end of a job; None when cupsd has lost it. `on_progress` hears every change."""
        loop = asyncio.get_running_loop()
        followed = self._followed[key] = _Followed(number, loop.time(), None, on_progress, loop.create_future())
        self._wake.set()
        try:
            return await followed.end
        finally:
            del self._followed[key]

    async def run(self) -> None:
        """Ask until cancelled."""
        loop = asyncio.get_running_loop()
        while True:
            if not (self._followed or self._sweeps):
                self._wake.clear()
                await self._wake.wait()
            await self._cups.available()
            try:
                if self._sweeps:
                    await self._sweep()
                    self._sweeps -= 1
                if self._followed:
                    await self._look()
            except AgentError as error:
                log.debug("cupsd does not tell about its jobs: %s", error)
                await asyncio.sleep(LATEST_S)
            if self._followed or self._sweeps:
                self._wake.clear()
                youngest = loop.time() - max((f.since for f in self._followed.values()), default=0)
                try:
                    async with asyncio.timeout(min(max(youngest / PATIENCE, SOONEST_S), LATEST_S)):
                        await self._wake.wait()
                except TimeoutError:
                    pass

    async def _look(self) -> None:
        asked_for = dict(self._followed)
        there = await self._cups.jobs(min(f.number for f in asked_for.values()))
        for key, followed in asked_for.items():
            job = there.get(key)
            if job is not None and job != followed.last:
                followed.last = job
                followed.on_progress(job)
            if job is not None and job.state == HELD and asyncio.get_running_loop().time() - followed.since > HELD_S:
                await self._cups.cancel(job.id)
                job = None
            if (job is None or job.finished) and not followed.end.done():
                followed.end.set_result(job)

    async def _sweep(self) -> None:
        there = await self._cups.jobs()
        if not self._first().done():
            self._first().set_result(there)
        for key, job in there.items():
            if key.startswith(KEY_PREFIX) and not job.finished and not self._is_known(key):
                log.info("cupsd has a job %d that nobody wants any more; cancelling it", job.id)
                await self._cups.cancel(job.id)

    def _first(self) -> asyncio.Future[dict[str, CupsJob]]:
        if self._at_start is None:
            self._at_start = asyncio.get_running_loop().create_future()
        return self._at_start
