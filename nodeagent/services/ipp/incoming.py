"""Jobs on their way in: from CreateJob until the last document is whole, or the job is dropped.

The document goes from the socket to the spool file in large pieces and is never held. A job that does not come to its
end, for whatever reason, is dropped as a whole: what is half never prints.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from typing import Protocol

from nodeagent.errors import AgentError, Reason
from nodeagent.services import Link
from nodeagent.services.ipp.answers import OPERATION_TIMEOUT_S
from nodeagent.services.ipp.formats import OCTET_STREAM
from nodeagent.services.ipp.http import HttpError, Part
from nodeagent.services.ipp.requests import Refusal
from nodeagent.wire.ipp import Status
from nodeagent.wire.seat import (
    CancelJob,
    CloseDocument,
    CreateJob,
    DocumentOpened,
    Done,
    DropDocument,
    JobCreated,
    Message,
    OpenDocument,
    Printer,
    ToWorker,
)


class Body(Protocol):
    """Where the document comes from; see `http.Conversation`."""

    async def parts(self) -> list[Part]: ...

    def push_back(self, part: Part) -> None: ...


async def peek(body: Body, size: int) -> bytes:
    """The first `size` bytes of the body, or all of a shorter one; they stay to be read."""
    start = bytearray()
    while len(start) < size and (parts := await body.parts()):
        start += b"".join(parts)
    body.push_back(start)
    return bytes(start[:size])


class _Incoming:
    def __init__(self, printer: str) -> None:
        self.printer = printer
        self.receiving = False
        self.timer: asyncio.TimerHandle | None = None

    def stop_timer(self) -> None:
        if self.timer is not None:
            self.timer.cancel()


class IncomingJobs:
    """The jobs of one seat that still wait for documents. Methods raise AgentError when the daemon refuses."""

    def __init__(self, link: Link, max_document_bytes: int, is_over: Callable[[int], bool]) -> None:
        """`is_over(job)`: the daemon says that the job is cancelled or aborted."""
        self._link = link
        self._max_document_bytes = max_document_bytes
        self._is_over = is_over
        self._jobs: dict[int, _Incoming] = {}

    async def create(self, printer: Printer, title: str, user: str, copies: int) -> int:
        number = self._link.next_request()
        message = CreateJob(request=number, printer=printer.name, title=title, user=user, copies=copies)
        answer, _ = await self._ask(message)
        assert isinstance(answer, JobCreated)
        self._jobs[answer.job] = _Incoming(printer.name)
        self._expect_more(answer.job)
        return answer.job

    def check_open(self, job: int) -> None:
        """Raises Refusal unless the job takes a document now (RFC 8011 4.3.1: one at a time, in order)."""
        incoming = self._jobs.get(job)
        if incoming is None or self._is_over(job):
            raise Refusal(Status.NOT_POSSIBLE, f"job {job} takes no more documents")
        if incoming.receiving:
            raise Refusal(Status.NOT_POSSIBLE, f"another document of job {job} is on its way")

    async def receive(self, job: int, body: Body, mime: str, *, last: bool) -> int:
        """Spool one document and close it; returns its bytes. Whatever goes wrong drops the job before it is raised."""
        self.check_open(job)
        incoming = self._jobs[job]
        incoming.receiving = True
        incoming.stop_timer()
        try:
            answer, fd = await self._ask(OpenDocument(request=self._link.next_request(), job=job))
            if not isinstance(answer, DocumentOpened) or fd is None:
                raise AgentError(Reason.INTERNAL, f"the daemon gave no file for job {job}")
            size = await self._fill(fd, job, body)
        except BaseException as error:
            self.drop(job, _reason(error))
            raise
        await self._close(job, mime, size, last=last)
        incoming.receiving = False
        if last:
            self.forget(job)
        else:
            self._expect_more(job)
        return size

    async def close(self, job: int) -> None:
        """No further document comes: the job is submitted with what it has."""
        self.check_open(job)
        self._jobs[job].receiving = True
        self._jobs[job].stop_timer()
        await self._close(job, OCTET_STREAM, 0, last=True)
        self.forget(job)

    async def cancel(self, job: int) -> None:
        """Cancel any job of the seat."""
        await self._ask(CancelJob(request=self._link.next_request(), job=job))
        incoming = self._jobs.get(job)
        if incoming is not None and not incoming.receiving:
            self.forget(job)

    def drop(self, job: int, reason: Reason) -> None:
        """Abort a job that will not come to its end. Never raises: with the daemon gone the job is lost anyway."""
        self.forget(job)
        try:
            self._link.send(DropDocument(job=job, reason=reason))
        except ConnectionError:
            pass

    def forget(self, job: int) -> None:
        incoming = self._jobs.pop(job, None)
        if incoming is not None:
            incoming.stop_timer()

    def forget_finished(self) -> None:
        """The daemon told new states of jobs. One that is being received notices by itself."""
        for job in [job for job, incoming in self._jobs.items() if not incoming.receiving and self._is_over(job)]:
            self.forget(job)

    def _expect_more(self, job: int) -> None:
        timer = asyncio.get_running_loop().call_later(OPERATION_TIMEOUT_S, self.drop, job, Reason.TOO_SLOW)
        self._jobs[job].timer = timer

    async def _close(self, job: int, mime: str, size: int, *, last: bool) -> None:
        """Hand a whole document over. From here on its fate is the daemon's: a worker that is stopped while it waits for
        the answer drops nothing, since the job may be accepted already."""
        number = self._link.next_request()
        try:
            answer, _ = await self._ask(CloseDocument(request=number, job=job, format=mime, size=size, last=last))
        except AgentError as error:
            self.drop(job, error.reason)
            raise
        except asyncio.CancelledError:
            self.forget(job)
            raise
        assert isinstance(answer, Done)

    async def _fill(self, fd: int, job: int, body: Body) -> int:
        """Write the body into the file; returns its bytes. Closes `fd`."""
        size, limit = 0, self._max_document_bytes
        try:
            while parts := await body.parts():
                size += sum(map(len, parts))
                if size > limit:
                    message = f"a document may have {limit} bytes"
                    raise Refusal(Status.REQUEST_ENTITY_TOO_LARGE, message, Reason.TOO_LARGE)
                if self._is_over(job):
                    raise Refusal(Status.JOB_CANCELED, f"job {job} was cancelled while it came in")
                _write_all(fd, parts)
        finally:
            os.close(fd)
        return size

    async def _ask(self, message: Message) -> tuple[ToWorker, int | None]:
        """Ask the daemon. Its absence is no ConnectionError here: that word belongs to the client's connection."""
        try:
            return await self._link.ask(message)
        except ConnectionError:
            raise AgentError(Reason.NOT_RUNNING, "the agent of this node has stopped") from None


def _reason(error: BaseException) -> Reason:
    """Why a job is dropped, for the daemon's log."""
    if isinstance(error, AgentError):
        return error.reason
    if isinstance(error, Refusal | HttpError):
        return error.reason or Reason.MALFORMED
    if isinstance(error, asyncio.CancelledError):
        return Reason.NOT_RUNNING
    return Reason.MALFORMED if isinstance(error, ConnectionError) else Reason.INTERNAL


def _write_all(fd: int, parts: list[Part]) -> None:
    """Write into the page cache, in the loop: a worker has no threads. Under write-back pressure the kernel makes this
    writer wait, and with it only its own seat. Raises AgentError when the file system does not take it."""
    try:
        left = os.writev(fd, parts)
        for part in parts:
            if left >= len(part):
                left -= len(part)
                continue
            rest = memoryview(part)[left:]
            left = 0
            while rest:
                rest = rest[os.write(fd, rest) :]
    except OSError as error:
        raise AgentError(Reason.UPSTREAM_UNAVAILABLE, f"cannot store the document: {error.strerror}") from error
