"""How an accepted job gets onto paper: its documents are converted, submitted to cupsd and watched to their end.

One task per job. Per printer one job prints while the next one is converted; printers do not wait for each other.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

from nodeagent.errors import AgentError, Reason
from nodeagent.services.printing.convert import Stage, plan
from nodeagent.services.printing.cups_client import CupsJob, CupsRefused
from nodeagent.services.printing.cups_watch import CupsWatch, PrintServer
from nodeagent.services.printing.spool_jobs import Job
from nodeagent.services.printing.spool_store import SpoolStore, State

log = logging.getLogger(__name__)

Convert = Callable[[str, tuple[Stage, ...], Path, Path], Awaitable[None]]
"""Seat, stages, document, new file; raises AgentError (services/printing/filters.py)."""

CONVERSIONS = max(2, os.cpu_count() or 1)
"""At the same time, on the whole node; one of a seat, so that no desktop keeps the others waiting alone."""
TRIES = 3
"""How often one document is given to cupsd before the job is aborted. Devices that fail do not count: the back end waits."""
RETRY_S = (0.2, 0.5, 1.0, 2.0, 5.0)
_COMPLETED = int(State.COMPLETED)
_LATER = (Reason.NOT_RUNNING, Reason.IDENTITY_UNAVAILABLE)
"""The seat is just not there; nothing is wrong with the document."""


class Carriage:
    """`carry(job)` takes an accepted job to the last byte of its last document, or raises AgentError: then it is aborted."""

    def __init__(
        self, store: SpoolStore, cups: PrintServer, watch: CupsWatch, convert: Convert, server_bin: str,
        now: Callable[[], float] = time.time,
    ) -> None:  # fmt: skip
        self._store, self._cups, self._watch, self._convert = store, cups, watch, convert
        self._server_bin = server_bin
        self._now = now
        self._converting = asyncio.Semaphore(CONVERSIONS)

    async def carry(self, job: Job) -> None:
        numbers = range(1, len(job.record.documents) + 1)
        found = {n: await self._watch.found_at_start(job.key(n)) for n in numbers} if job.recovered else {}
        ready = {n: f for n, f in found.items() if f is not None and not _failed(f)}
        await job.near.wait()
        for number in numbers:
            if number not in ready:
                await self._make_ready(job, number)
        if job.state is State.PROCESSING and not job.turn.is_set():
            self._pending(job, "job-queued", "")
        await job.turn.wait()
        for number in numbers:
            await self._print(job, number, ready.get(number))

    async def _make_ready(self, job: Job, number: int) -> None:
        """Convert a document if its printer does not speak its format."""
        seat, record = job.seat, job.record
        path = self._store.converted(seat.name, record.id, number)
        for delay_s in _delays():
            printer = await seat.online(job)
            stages = plan(record.documents[number - 1].format, printer.formats, self._server_bin)
            if not stages or path.exists():
                return
            async with seat.converting, self._converting:
                self._processing(job, "job-transforming")
                try:
                    await self._convert(seat.name, stages, self._store.document(seat.name, record.id, number), path)
                    return
                except AgentError as error:
                    if error.reason not in _LATER:
                        raise
                    self._pending(job, "job-queued", error.message)
            await asyncio.sleep(delay_s)

    async def _print(self, job: Job, number: int, found: CupsJob | None) -> None:
        """Have one document printed. `found`: cupsd has it already."""
        for _ in range(TRIES):
            if self._store.printed(job.seat.name, job.record.id, number).exists():
                self._processing(job, "job-printing")
                self._watch.sweep()  # whatever cupsd still has of it
                return
            if found is None:
                found = await self._submit(job, number)
            self._processing(job, "job-printing")
            job.cups_job = found.id
            ended = found if found.finished else await self._watch.follow(job.key(number), found.id, job_says(job))
            job.cups_job = 0
            if ended is not None and ended.state == _COMPLETED:
                return
            cause = "lost it" if ended is None else f"ended it with {', '.join(ended.reasons)}"
            log.warning("seat %s: cupsd %s: document %d of job %d", job.seat.name, cause, number, job.record.id)
            self._pending(job, "job-queued", "the print server starts this job again")
            found = None
        raise AgentError(Reason.UPSTREAM_UNAVAILABLE, f"the print server has lost this job {TRIES} times")

    async def _submit(self, job: Job, number: int) -> CupsJob:
        """Give a document to cupsd, however long that takes."""
        key = job.key(number)
        for delay_s in _delays():
            await self._make_ready(job, number)
            printer = await job.seat.online(job)
            await self._cups.available()
            job.cups_job = -1
            try:
                document = self._ready(job, number)
                return CupsJob(await self._cups.submit(printer.queue, key, document, job.record.copies), 3)
            except CupsRefused as error:
                job.say("printer-stopped", error.message)
            except AgentError as error:
                # It may have been taken in spite of that; a second one would print twice.
                job.say("printer-stopped", error.message)
                taken = await self._look_up(key)
                if taken is not None:
                    return taken
            job.cups_job = 0
            await asyncio.sleep(delay_s)
        raise AssertionError("unreachable")

    async def _look_up(self, key: str) -> CupsJob | None:
        for delay_s in _delays():
            await self._cups.available()
            try:
                return (await self._cups.jobs()).get(key)
            except AgentError:
                await asyncio.sleep(delay_s)
        raise AssertionError("unreachable")

    def _ready(self, job: Job, number: int) -> Path:
        """What goes to the printer: the converted document, or the document as it came."""
        converted = self._store.converted(job.seat.name, job.record.id, number)
        return converted if converted.exists() else self._store.document(job.seat.name, job.record.id, number)

    def _processing(self, job: Job, reason: str) -> None:
        if job.state is State.PROCESSING:
            job.say(reason)
        else:
            job.move(State.PROCESSING, self._now(), reason)

    def _pending(self, job: Job, reason: str, message: str) -> None:
        job.move(State.PENDING, self._now(), reason, message)


def job_says(job: Job) -> Callable[[CupsJob], None]:
    """What cupsd tells about a job on its way becomes what the desktop is told."""

    def on_progress(found: CupsJob) -> None:
        if not found.finished:
            job.say("job-printing", found.message)

    return on_progress


def _failed(found: CupsJob) -> bool:
    return found.finished and found.state != _COMPLETED


def _delays() -> Iterator[float]:
    yield from RETRY_S
    while True:
        yield RETRY_S[-1]
