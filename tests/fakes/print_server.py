"""A print server in memory, with the part of `Cups` that the spool uses."""

from __future__ import annotations

import asyncio
from pathlib import Path

from nodeagent.errors import AgentError, Reason
from nodeagent.services.printing.cups_client import CupsJob

PENDING, HELD, PROCESSING, CANCELLED, ABORTED, COMPLETED = 3, 4, 5, 7, 8, 9


class FakeCups:
    """Takes jobs and ends them as `outcome` says; `hold` keeps them in print until it is cleared."""

    def __init__(self) -> None:
        self.printed: list[tuple[str, str, bytes, int]] = []
        """Queue, key, bytes and copies, in the order in which they were taken."""
        self.all: dict[str, CupsJob] = {}
        self.outcome = COMPLETED
        self.message = ""
        self.hold = False
        self.answers = asyncio.Event()
        self.answers.set()
        self.fail_before: list[AgentError] = []
        """Raised by the next submits, which take nothing."""
        self.fail_after: list[AgentError] = []
        """Raised by the next submits, which have taken the job."""
        self.cancelled: list[int] = []
        self.asked = 0

    async def available(self) -> None:
        await self.answers.wait()

    async def submit(self, queue: str, key: str, document: Path, copies: int = 1) -> int:
        self._check()
        await asyncio.sleep(0)
        if self.fail_before:
            raise self.fail_before.pop(0)
        number = len(self.all) + 1
        self.printed.append((queue, key, document.read_bytes(), copies))
        self.all[key] = CupsJob(number, PROCESSING)
        if self.fail_after:
            raise self.fail_after.pop(0)
        return number

    async def jobs(self, first: int = 1) -> dict[str, CupsJob]:
        self._check()
        self.asked += 1
        await asyncio.sleep(0)
        for key, job in self.all.items():
            if not job.finished and job.state != HELD:
                state = PROCESSING if self.hold else self.outcome
                self.all[key] = CupsJob(job.id, state, ("job-printing",) if self.hold else (), self.message)
        return {key: job for key, job in self.all.items() if job.id >= first}

    async def cancel(self, job: int) -> None:
        self._check()
        self.cancelled.append(job)
        self.all = {k: CupsJob(j.id, CANCELLED) if j.id == job and not j.finished else j for k, j in self.all.items()}

    def lose(self, key: str) -> None:
        """cupsd's disk was wiped."""
        del self.all[key]

    def _check(self) -> None:
        if not self.answers.is_set():
            raise AgentError(Reason.UPSTREAM_UNAVAILABLE, "cupsd does not answer")
