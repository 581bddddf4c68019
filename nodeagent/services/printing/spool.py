"""The spool: print jobs of all seats, from the first byte of a document to the last byte on paper.

    create -> open_document -> (the worker writes) -> close_document(last) -> accepted: on disk, survives everything
    run()                                            converts, submits to cupsd, watches, forgets

A job is accepted when its documents and its record are on disk, and only then is the client told. After a restart the
incoming ones are gone, the accepted ones go on, and what cupsd has already is found there by its key. The daemon never
reads a document; whoever writes one is a worker and may lie about everything.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import ParamSpec, TypeVar

import msgspec

from nodeagent.config import PrintingConfig
from nodeagent.errors import AgentError, Reason
from nodeagent.metrics import Metrics
from nodeagent.services.printing.carriage import Carriage, Convert
from nodeagent.services.printing.convert import plan
from nodeagent.services.printing.cups_watch import CupsWatch, PrintServer
from nodeagent.services.printing.spool_jobs import Job, SeatJobs, SpoolPrinter
from nodeagent.services.printing.spool_store import (
    MAX_JOB,
    NUMBERS_AHEAD,
    SEAT_NAME,
    Document,
    Record,
    SpoolStore,
    State,
    has_writer,
)
from nodeagent.wire import seat as wire

__all__ = ["Spool", "SpoolPrinter"]

log = logging.getLogger(__name__)

P = ParamSpec("P")
R = TypeVar("R")

INCOMING_S = 300.0
"""A job to which nothing is added for so long is aborted."""
OPEN_DOCUMENTS = 8
"""Documents of one seat that somebody can write into at the same time, deleted ones included."""
DOCUMENTS_PER_JOB = 100
MIN_FREE_BYTES = 256 << 20
"""Of the file system: below it nothing is accepted any more."""
TEND_S = 1.0
CANCEL_S = 1.5
"""For cupsd to cancel what a seat leaves behind; what it misses is cancelled when it answers again."""
RESULTS = {State.COMPLETED: "completed", State.ABORTED: "aborted", State.CANCELLED: "cancelled"}
ABORT_REASONS = {
    Reason.MALFORMED: "document-format-error",
    Reason.NOT_SUPPORTED: "unsupported-document-format",
    Reason.DEADLINE: "processing-to-stop-point",
}
"""Reason -> job-state-reasons keyword (RFC 8011 5.3.8); everything else is aborted-by-system."""


class Spool:
    """The only writer of its directory. Methods raise AgentError for what a worker must be told; `on_change(seat)` is called
    in the loop whenever `jobs(seat)` would answer something new."""

    def __init__(
        self,
        directory: Path,
        limits: PrintingConfig,
        cups: PrintServer,
        metrics: Metrics,
        *,
        convert: Convert,
        on_change: Callable[[str], None],
        now: Callable[[], float] = time.time,
    ) -> None:
        self._limits, self._metrics, self._cups = limits, metrics, cups
        self._on_change = on_change
        self._now = now
        self._store = SpoolStore(directory)
        self._watch = CupsWatch(cups, self._knows)
        self._carriage = Carriage(self._store, cups, self._watch, convert, limits.server_bin, now)
        self._seats: dict[str, SeatJobs] = {}
        self._loading = asyncio.Lock()
        self._loaded = False
        self._tasks: asyncio.TaskGroup | None = None

    # ---- what the seats are

    def set_printers(self, seat: str, printers: tuple[SpoolPrinter, ...]) -> None:
        """The printers of a seat, all of them. Jobs for one that is not online wait."""
        self._seat(seat).set_printers(printers)

    async def seats(self) -> frozenset[str]:
        """Every seat that has something here, also from an earlier life of the daemon."""
        await self._load()
        return frozenset(self._seats)

    def jobs(self, seat: str) -> tuple[wire.Job, ...]:
        """The seat's jobs as its desktop sees them, by number; at most MAX_JOBS, unfinished ones first."""
        found = self._seats.get(seat)
        return found.told() if found else ()

    async def release(self, seat: str) -> None:
        """The pod is gone: cancel and delete everything of the seat. A second call finds nothing to do."""
        await self._load()
        found = self._seats.pop(seat, None)
        if found is None:
            return
        unfinished = found.unfinished()
        tasks = {job.task for job in unfinished if job.task is not None}
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)
        for job in found.unfinished():
            job.record = msgspec.structs.replace(job.record, state=State.CANCELLED)
            self._metrics.print_jobs.labels(result="cancelled").inc()
        self._close_held(found)
        await asyncio.gather(
            asyncio.to_thread(self._store.delete_seat, seat), *(self._cancel_in_cups(job) for job in unfinished)
        )

    # ---- what a worker asks for

    async def create(self, seat: str, request: wire.CreateJob) -> int:
        """A new job, incoming; returns its number, which the seat never has twice."""
        await self._load()
        found = self._seats.get(seat)
        if found is None or request.printer not in found.printers:
            raise AgentError(Reason.DEVICE_UNKNOWN, f"this desktop has no printer {request.printer}")
        limit = min(self._limits.jobs_per_seat, wire.MAX_JOBS)
        if len(found.unfinished()) >= limit:
            raise AgentError(
                Reason.TOO_MANY, f"this desktop has {limit} unfinished print jobs", hint="wait, or cancel one"
            )
        async with found.lock:
            if found.next_job >= found.reserved:
                await self._on_disk(self._store.reserve, seat, found.next_job + NUMBERS_AHEAD)
                found.reserved = found.next_job + NUMBERS_AHEAD
            number, found.next_job = found.next_job, found.next_job + 1
        if self._seats.get(seat) is not found:
            raise AgentError(Reason.NOT_RUNNING, "this desktop has ended")
        if number > MAX_JOB:
            raise AgentError(Reason.TOO_MANY, "this desktop has used up its job numbers")
        now = self._now()
        record = Record(
            id=number, token=os.urandom(4).hex(), printer=request.printer, title=request.title, user=request.user,
            copies=request.copies, state=State.INCOMING, reason="job-incoming", created_s=int(now),
        )  # fmt: skip
        found.jobs[number] = Job(found, record, now)
        self._on_change(seat)
        return number

    async def open_document(self, seat: str, job: int) -> int:
        """A descriptor that takes the next document of the job; the caller's to pass on and to close."""
        found = self._find(seat, job)
        async with found.lock:
            self._check_incoming(found)
            if found.open_document:
                raise AgentError(Reason.STATE_INVALID, f"another document of job {job} is on its way")
            if len(found.record.documents) >= DOCUMENTS_PER_JOB:
                raise AgentError(Reason.TOO_MANY, f"a job may have {DOCUMENTS_PER_JOB} documents")
            self._check_room(found.seat)
            number = len(found.record.documents) + 1
            try:
                fd = self._store.begin(seat, job, number)
            except OSError as error:
                raise _disk(error) from error
            found.open_document, found.open_bytes, found.touched_s = number, 0, self._now()
            return fd

    async def close_document(self, seat: str, message: wire.CloseDocument) -> None:
        """The document is whole; with `last` the job is accepted. When this raises, the job is aborted."""
        job = self._find(seat, message.job)
        async with job.lock:
            self._check_incoming(job)
            try:
                if job.open_document:
                    await self._take_document(job, message)
                elif message.size or not message.last:
                    raise AgentError(Reason.MALFORMED, f"job {message.job} has no document to close")
                if message.last:
                    await self._accept(job)
            except AgentError as error:
                await self._end(job, State.ABORTED, ABORT_REASONS.get(error.reason, "aborted-by-system"), error.message)
                raise

    async def drop(self, seat: str, job: int, reason: Reason) -> None:
        """The client did not finish its job: it never prints. Anything but an incoming job is left as it is."""
        found = self._seats[seat].jobs.get(job) if seat in self._seats else None
        if found is not None:
            async with found.lock:
                if found.state is State.INCOMING:
                    await self._end(
                        found, State.ABORTED, "aborted-by-system", f"the job did not arrive whole ({reason})"
                    )

    def forget_incoming(self, seat: str) -> None:
        """The seat's worker died: what it was receiving never prints."""
        if seat in self._seats and self._tasks is not None:
            for job in self._seats[seat].incoming():
                self._tasks.create_task(self.drop(seat, job.record.id, Reason.NOT_RUNNING), name="drop")

    async def cancel(self, seat: str, job: int) -> None:
        """Cancel any unfinished job, wherever it is."""
        found = self._find(seat, job)
        async with found.lock:
            if found.state.finished:
                raise AgentError(Reason.STATE_INVALID, f"job {job} has ended already")
            await self._end(found, State.CANCELLED, "job-canceled-by-user", "")

    # ---- moving on

    async def run(self) -> None:
        """Carry accepted jobs on until cancelled."""
        try:
            async with asyncio.TaskGroup() as tasks:
                try:
                    await self._load()
                    self._tasks = tasks
                    for seat in self._seats.values():
                        for job in seat.unfinished():
                            if job.state is not State.INCOMING:
                                self._start(job)
                    tasks.create_task(self._watch.run(), name="watch cupsd")
                    while True:
                        await asyncio.sleep(TEND_S)
                        await self.tend()
                finally:
                    self._tasks = None
        finally:
            for seat in self._seats.values():
                self._close_held(seat)

    async def tend(self) -> None:
        """Look after what workers write: no job stays incoming for ever, nobody writes more than he may."""
        now = self._now()
        for seat in tuple(self._seats.values()):
            self._let_go(seat)
            for job in seat.incoming():
                size = self._store.size(seat.name, job.record.id, job.open_document) if job.open_document else 0
                if size != job.open_bytes:
                    job.open_bytes, job.touched_s = size, now
                fault = ""
                if job.open_bytes > self._limits.max_document_mib << 20 or (size and _used(seat) > self._quota):
                    fault = "the document is larger than the spool allows"
                elif now - job.touched_s > INCOMING_S:
                    fault = f"nothing of the job arrived for {INCOMING_S:.0f} s"
                if fault:
                    async with job.lock:
                        if job.state is State.INCOMING:
                            await self._end(job, State.ABORTED, "aborted-by-system", fault)

    def _start(self, job: Job) -> None:
        """Give the job a task and its place behind the others of its printer. One that is accepted before `run` has begun is
        started by it: a second place in the lane would hold up every later job for ever."""
        if self._tasks is None:
            return
        job.seat.join_lane(job)
        job.task = self._tasks.create_task(self._live(job), name=f"job {job.seat.name} {job.record.id}")

    async def _live(self, job: Job) -> None:
        try:
            await self._carriage.carry(job)
        except AgentError as error:
            log.info("job %d of seat %s is aborted: %s", job.record.id, job.seat.name, error)
            await self._end(job, State.ABORTED, ABORT_REASONS.get(error.reason, "aborted-by-system"), error.message)
        except Exception as error:
            log.exception("job %d of seat %s is aborted", job.record.id, job.seat.name)
            await self._end(job, State.ABORTED, "aborted-by-system", f"internal error ({type(error).__name__})")
        else:
            await self._end(job, State.COMPLETED, "job-completed-successfully", "")

    # ---- steps

    async def _take_document(self, job: Job, message: wire.CloseDocument) -> None:
        number, seat = job.open_document, job.seat
        size = await self._on_disk(self._store.seal, self._store.document(seat.name, job.record.id, number))
        if size is None:
            raise AgentError(Reason.STATE_INVALID, "the document was closed while it was still open for writing")
        if size != message.size:
            raise AgentError(Reason.MALFORMED, f"the document has {size} bytes, {message.size} were announced")
        if size > self._limits.max_document_mib << 20:
            raise AgentError(Reason.TOO_LARGE, f"a document may have {self._limits.max_document_mib} MiB")
        job.open_bytes = size
        if _used(seat) > self._quota:
            raise AgentError(
                Reason.TOO_LARGE, f"the print jobs of a desktop may have {self._limits.spool_per_seat_mib} MiB together"
            )
        if size:
            printer = seat.printers.get(job.record.printer)
            if printer is None:
                raise AgentError(Reason.DEVICE_UNKNOWN, f"this desktop has no printer {job.record.printer} any more")
            plan(message.format, printer.formats, self._limits.server_bin)
            documents = (*job.record.documents, Document(message.format, size))
            job.record = msgspec.structs.replace(job.record, documents=documents)
        else:
            self._store.document(seat.name, job.record.id, number).unlink(missing_ok=True)
        job.open_document = job.open_bytes = 0
        job.touched_s = self._now()

    async def _accept(self, job: Job) -> None:
        if not job.record.documents:
            raise AgentError(Reason.MALFORMED, f"job {job.record.id} has nothing to print")
        accepted = msgspec.structs.replace(job.record, state=State.PENDING, reason="none")
        await self._on_disk(self._store.write, job.seat.name, accepted)
        self._check_incoming(job)  # the seat may have ended
        job.move(State.PENDING, self._now(), "none")
        self._start(job)

    async def _end(self, job: Job, state: State, reason: str, message: str) -> None:
        """The job ends like this, unless it has ended meanwhile: told at once, then cleared away."""
        accepted = job.state is not State.INCOMING
        if job.task is not None and job.task is not asyncio.current_task():
            job.task.cancel()
            await asyncio.wait({job.task})
        if job.state.finished or job.record.id not in job.seat.jobs:
            return
        job.move(state, self._now(), reason, message)
        job.seat.leave_lane(job)
        self._metrics.print_jobs.labels(result=RESULTS[state]).inc()
        await self._cancel_in_cups(job)
        seat, record = job.seat, job.record
        try:
            if accepted:
                await asyncio.to_thread(self._store.write, seat.name, record)
            count = max(len(record.documents), job.open_document)
            seat.held += await asyncio.to_thread(self._store.delete_documents, seat.name, record.id, count)
            job.open_document = job.open_bytes = 0
            finished = sorted(number for number, other in seat.jobs.items() if other.state.finished)
            for number in finished[: max(0, len(finished) - wire.MAX_JOBS)]:
                await asyncio.to_thread(self._store.forget, seat.name, number)
                seat.jobs.pop(number, None)
        except OSError as error:
            log.error("spool of seat %s: cannot clear job %d away: %s", seat.name, record.id, error)

    async def _cancel_in_cups(self, job: Job) -> None:
        """Have cupsd let go of the job, now if it answers, else later."""
        number, job.cups_job = job.cups_job, 0
        if number > 0:
            try:
                async with asyncio.timeout(CANCEL_S):
                    await self._cups.cancel(number)
                return
            except (AgentError, TimeoutError):
                pass
        if number:
            self._watch.sweep()

    async def _load(self) -> None:
        async with self._loading:
            if self._loaded:
                return
            for name, loaded in (await asyncio.to_thread(self._store.load)).items():
                seat = self._seat(name)
                seat.next_job = seat.reserved = loaded.next_job
                for record in loaded.records:
                    recovered = not record.state.finished
                    state = State.PENDING if recovered else record.state
                    record = msgspec.structs.replace(record, state=state)
                    seat.jobs[record.id] = Job(seat, record, self._now(), recovered=recovered)
                log.info("spool of seat %s: %d jobs, %d to print", name, len(seat.jobs), len(seat.unfinished()))
            self._loaded = True
        for name in tuple(self._seats):
            self._on_change(name)

    # ---- small things

    @property
    def _quota(self) -> int:
        return self._limits.spool_per_seat_mib << 20

    def _seat(self, name: str) -> SeatJobs:
        if name not in self._seats:
            if not SEAT_NAME.match(name):
                raise ValueError(f"{name!r} cannot name a seat in the spool")
            self._seats[name] = SeatJobs(name, self._on_change)
        return self._seats[name]

    def _find(self, seat: str, job: int) -> Job:
        found = self._seats[seat].jobs.get(job) if seat in self._seats else None
        if found is None:
            raise AgentError(Reason.NOT_YOURS, f"this desktop has no job {job}")
        return found

    def _knows(self, key: str) -> bool:
        """Whether cupsd's job of that name belongs to a job that is still to be printed."""
        return any(key.startswith(job.key_stem) for seat in self._seats.values() for job in seat.unfinished())

    def _check_incoming(self, job: Job) -> None:
        if job.state is not State.INCOMING:
            raise AgentError(Reason.STATE_INVALID, f"job {job.record.id} takes no more documents")

    def _check_room(self, seat: SeatJobs) -> None:
        """Raises AgentError when the seat may not begin another document now."""
        self._let_go(seat)
        if sum(1 for job in seat.incoming() if job.open_document) + len(seat.held) >= OPEN_DOCUMENTS:
            raise AgentError(Reason.TOO_MANY, f"this desktop is sending {OPEN_DOCUMENTS} documents already")
        if _used(seat) >= self._quota:
            raise AgentError(
                Reason.TOO_LARGE,
                f"the unfinished print jobs of this desktop have {self._limits.spool_per_seat_mib} MiB",
                hint="wait until one has printed, or cancel one",
            )
        try:
            if self._store.free_bytes() < MIN_FREE_BYTES:
                raise AgentError(Reason.UPSTREAM_UNAVAILABLE, "the print spool of this node is full")
        except OSError as error:
            raise _disk(error) from error

    async def _on_disk(self, call: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """Call it in a thread; what the disk says becomes what a worker can be told."""
        try:
            return await asyncio.to_thread(call, *args, **kwargs)
        except OSError as error:
            raise _disk(error) from error

    def _let_go(self, seat: SeatJobs) -> None:
        """Close what nobody writes into any more; of the rest no more may stay on disk than is written between two looks."""
        held, seat.held = seat.held, []
        for fd in held:
            if has_writer(fd):
                os.truncate(f"/proc/self/fd/{fd}", 0)
                seat.held.append(fd)
            else:
                os.close(fd)

    def _close_held(self, seat: SeatJobs) -> None:
        for fd in seat.held:
            os.close(fd)
        seat.held = []


def _used(seat: SeatJobs) -> int:
    """Bytes of a seat's unfinished jobs, as far as they are known."""
    return sum(job.record.size_bytes + job.open_bytes for job in seat.unfinished())


def _disk(error: OSError) -> AgentError:
    log.error("the print spool cannot be written: %s", error)
    return AgentError(Reason.UPSTREAM_UNAVAILABLE, f"the print spool of this node cannot be written: {error.strerror}")
