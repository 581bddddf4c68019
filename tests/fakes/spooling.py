"""A spool with everything around it, as a test wants to talk to it."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from nodeagent.config import PrintingConfig
from nodeagent.errors import AgentError
from nodeagent.metrics import Metrics
from nodeagent.services.printing.convert import Stage
from nodeagent.services.printing.cups_watch import PrintServer
from nodeagent.services.printing.spool import Spool, SpoolPrinter
from nodeagent.wire.seat import CloseDocument, CreateJob, Job
from tests.fakes.print_server import FakeCups

POSTSCRIPT = "application/postscript"


class FakeConvert:
    """Writes the document in upper case; `gate` holds conversions back, `fault` makes them fail."""

    def __init__(self) -> None:
        self.gate = asyncio.Event()
        self.gate.set()
        self.fault: Exception | None = None
        self.at_once = self.most_at_once = 0

    async def __call__(self, seat: str, stages: tuple[Stage, ...], source: Path, target: Path) -> None:
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        try:
            await self.gate.wait()
            if self.fault is not None:
                raise self.fault
            target.write_bytes(source.read_bytes().upper())
        finally:
            self.at_once -= 1


class Spooling:
    """The spool, its surroundings, and the life of a job in one call. Time stands still unless `now` is set."""

    def __init__(
        self, directory: Path, cups: PrintServer, limits: PrintingConfig | None = None,
        convert: Callable[..., object] | None = None,
    ) -> None:  # fmt: skip
        self.now = 1000.0
        self.cups = cups
        self.metrics = Metrics()
        self.convert = FakeConvert()
        self.seen: dict[tuple[str, int], list[int]] = {}
        """Seat and job -> the states that were told, each once in a row."""
        self._changed = asyncio.Event()
        self.spool = Spool(
            directory, limits or PrintingConfig(), cups, self.metrics, convert=convert or self.convert,  # type: ignore[arg-type]
            on_change=self._on_change, now=lambda: self.now,
        )  # fmt: skip

    def _on_change(self, seat: str) -> None:
        for job in self.spool.jobs(seat):
            states = self.seen.setdefault((seat, job.id), [])
            if states[-1:] != [job.state]:
                states.append(job.state)
        self._changed.set()

    def give(self, seat: str, *names: str, formats: tuple[str, ...] = (POSTSCRIPT,), online: bool = True) -> None:
        self.spool.set_printers(
            seat, tuple(SpoolPrinter(name=n, queue=f"q-{n}", formats=formats, online=online) for n in names)
        )

    async def incoming(self, seat: str = "s1", printer: str = "p1", title: str = "a letter", copies: int = 1) -> int:
        return await self.spool.create(seat, CreateJob(request=1, printer=printer, title=title, copies=copies))

    async def write(self, seat: str, job: int, data: bytes) -> None:
        fd = await self.spool.open_document(seat, job)
        try:
            for at in range(0, len(data), 32768):
                os.write(fd, data[at : at + 32768])
        finally:
            os.close(fd)

    async def close(self, seat: str, job: int, size: int, *, last: bool = True, mime: str = POSTSCRIPT) -> None:
        await self.spool.close_document(seat, CloseDocument(request=3, job=job, format=mime, size=size, last=last))

    async def send(
        self, data: bytes, seat: str = "s1", printer: str = "p1", *, mime: str = POSTSCRIPT, copies: int = 1
    ) -> int:
        """A job with one document, accepted."""
        job = await self.incoming(seat, printer, copies=copies)
        await self.write(seat, job, data)
        await self.close(seat, job, len(data), mime=mime)
        return job

    def job(self, job: int, seat: str = "s1") -> Job:
        return next(j for j in self.spool.jobs(seat) if j.id == job)

    async def until(self, true: Callable[[], bool], timeout_s: float = 20) -> None:
        """Wait until it is so; looked at whenever a job changes and every few milliseconds."""
        async with asyncio.timeout(timeout_s):
            while not true():
                self._changed.clear()
                try:
                    async with asyncio.timeout(0.01):
                        await self._changed.wait()
                except TimeoutError:
                    pass

    async def ended(self, job: int, seat: str = "s1") -> Job:
        await self.until(lambda: self.job(job, seat).state >= 7)
        return self.job(job, seat)

    def count(self, result: str) -> float:
        return self.metrics.registry.get_sample_value("nodeagent_print_jobs_total", {"result": result}) or 0.0


@asynccontextmanager
async def running(house: Spooling) -> AsyncIterator[Spooling]:
    """Run the spool inside the block."""
    task = asyncio.create_task(house.spool.run(), name="spool")
    try:
        await house.spool.seats()
        yield house
    finally:
        task.cancel()
        await asyncio.wait({task})
        if not task.cancelled() and task.exception():
            raise task.exception()  # type: ignore[misc]


def fake_house(directory: Path, cups: FakeCups | None = None, limits: PrintingConfig | None = None) -> Spooling:
    """A spool before a print server in memory, with one printer for seat s1."""
    house = Spooling(directory, cups or FakeCups(), limits)
    house.give("s1", "p1")
    return house


def files(directory: Path, seat: str = "s1") -> set[str]:
    """Names of what lies on disk for a seat."""
    return {path.name for path in (directory / seat).iterdir()} if (directory / seat).exists() else set()


async def refused(awaitable: Awaitable[object]) -> AgentError:
    """The error with which it is refused."""
    with pytest.raises(AgentError) as caught:
        await awaitable
    return caught.value
