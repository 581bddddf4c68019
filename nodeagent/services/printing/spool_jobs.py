"""Jobs and seats as the spool has them in memory."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import msgspec

from nodeagent.services.printing.cups_watch import KEY_PREFIX
from nodeagent.services.printing.spool_store import MOVES, Record, State
from nodeagent.wire import seat as wire

TITLE_CHARS = 80
MESSAGE_CHARS = 120
"""So that wire.Jobs of MAX_JOBS jobs fits into one datagram, whatever the characters."""


class SpoolPrinter(msgspec.Struct, frozen=True, kw_only=True):
    """A printer of a seat: the name its desktop uses, its queue in cupsd, what it speaks (MIME), and whether it is there."""

    name: str
    queue: str
    formats: tuple[str, ...]
    online: bool


class Job:
    """One job. `lock` is held by whoever changes it for its seat; its own task does not need it."""

    def __init__(self, seat: SeatJobs, record: Record, now: float, *, recovered: bool = False) -> None:
        self.seat = seat
        self.record = record
        self.recovered = recovered
        """Accepted in an earlier life: cupsd may have it already."""
        self.lock = asyncio.Lock()
        self.task: asyncio.Task[None] | None = None
        self.near = asyncio.Event()
        """First or second of its printer: it may be converted."""
        self.turn = asyncio.Event()
        """First of its printer: it may print."""
        self.open_document = 0
        """Number of the document that is being received, from 1."""
        self.open_bytes = 0
        self.touched_s = now
        """When a document last grew."""
        self.cups_job = 0
        """Number in cupsd of what is being printed; -1 while it is being submitted."""

    @property
    def state(self) -> State:
        return self.record.state

    def key(self, document: int) -> str:
        """What the nth document (from 1) is called in cupsd."""
        return f"{self.key_stem}{document}"

    @property
    def key_stem(self) -> str:
        return f"{KEY_PREFIX}{self.seat.name}:{self.record.id}:{self.record.token}:"

    def say(self, reason: str, message: str = "") -> None:
        """Something new about a job whose state stays as it is."""
        self._change(reason=reason, message=_plain(message))

    def move(self, state: State, now: float, reason: str, message: str = "") -> None:
        """Go on to another state."""
        assert state in MOVES[self.state], f"job {self.record.id}: {self.state.name} -> {state.name}"
        record = self.record
        self._change(
            state=state,
            reason=reason,
            message=_plain(message),
            processing_s=record.processing_s or (int(now) if state is State.PROCESSING else 0),
            completed_s=int(now) if state.finished else 0,
        )

    def _change(self, **fields: object) -> None:
        changed = msgspec.structs.replace(self.record, **fields)
        if changed != self.record:
            self.record = changed
            self.seat.on_change(self.seat.name)

    def told(self) -> wire.Job:
        """The job as its desktop sees it."""
        record = self.record
        return wire.Job(
            id=record.id,
            printer=record.printer,
            title=record.title[:TITLE_CHARS],
            state=int(record.state),
            reason=record.reason,
            message=record.message,
            size_bytes=record.size_bytes,
            created_s=record.created_s,
            processing_s=record.processing_s,
            completed_s=record.completed_s,
        )


class SeatJobs:
    """The jobs and printers of one seat."""

    def __init__(self, name: str, on_change: Callable[[str], None], next_job: int = 1) -> None:
        self.name = name
        self.on_change = on_change
        self.jobs: dict[int, Job] = {}
        self.next_job = next_job
        self.reserved = next_job
        """Numbers below it are taken on disk."""
        self.lock = asyncio.Lock()
        self.converting = asyncio.Lock()
        self.held: list[int] = []
        """Descriptors of deleted documents that somebody may still write into."""
        self.printers: dict[str, SpoolPrinter] = {}
        self._printers_changed = asyncio.Event()
        self._lanes: dict[str, list[Job]] = {}

    def set_printers(self, printers: tuple[SpoolPrinter, ...]) -> None:
        self.printers = {printer.name: printer for printer in printers}
        self._printers_changed.set()
        self._printers_changed = asyncio.Event()

    async def online(self, job: Job) -> SpoolPrinter:
        """The printer of the job, once it is there; meanwhile the job says what it waits for."""
        while True:
            printer = self.printers.get(job.record.printer)
            if printer is not None and printer.online:
                return printer
            job.say("printer-stopped", "the printer is unplugged; the job waits for it")
            await self._printers_changed.wait()

    def unfinished(self) -> list[Job]:
        return [job for job in self.jobs.values() if not job.state.finished]

    def incoming(self) -> list[Job]:
        return [job for job in self.jobs.values() if job.state is State.INCOMING]

    def join_lane(self, job: Job) -> None:
        """The job is accepted: it prints after those of its printer that were accepted before."""
        self._lanes.setdefault(job.record.printer, []).append(job)
        self._advance(job.record.printer)

    def leave_lane(self, job: Job) -> None:
        lane = self._lanes.get(job.record.printer, [])
        if job in lane:
            lane.remove(job)
            self._advance(job.record.printer)

    def _advance(self, printer: str) -> None:
        lane = self._lanes[printer]
        for job in lane[:2]:
            job.near.set()
        for job in lane[:1]:
            job.turn.set()
        if not lane:
            del self._lanes[printer]

    def told(self) -> tuple[wire.Job, ...]:
        """All unfinished jobs and the newest finished ones, by number, at most MAX_JOBS."""
        newest_first = sorted(self.jobs.values(), key=lambda j: (not j.state.finished, j.record.id), reverse=True)
        return tuple(j.told() for j in sorted(newest_first[: wire.MAX_JOBS], key=lambda j: j.record.id))


def _plain(text: str) -> str:
    """ASCII without control characters, one byte a character in a message."""
    return "".join(c if c.isascii() and c.isprintable() else "?" for c in text)[:MESSAGE_CHARS]
