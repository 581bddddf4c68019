"""The IPP operations a desktop may use, on the printers and jobs of its seat and on no others.

A printer or job that is not the seat's is `client-error-not-found`, whether it exists elsewhere or not. Everything that
is not in `Operations._table` is `server-error-operation-not-supported`: nothing administrative exists here.

Sources: RFC 8011 section 4 (operations), PWG 5100.11 (Cancel-Jobs, Cancel-My-Jobs, Close-Job), the CUPS implementation
of IPP (CUPS-Get-Default, -Printers, -Classes).
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import msgspec

from nodeagent.errors import AgentError, Reason
from nodeagent.services import Link
from nodeagent.services.ipp import answers
from nodeagent.services.ipp.answers import JOB_CANCELED, JOB_INCOMING, JOB_PENDING, JOB_PROCESSING
from nodeagent.services.ipp.formats import OCTET_STREAM, SNIFF_BYTES, decide, is_untyped
from nodeagent.services.ipp.incoming import Body, IncomingJobs, peek
from nodeagent.services.ipp.requests import (
    ALL_PATHS,
    DEFAULT_PATHS,
    Refusal,
    check,
    is_number,
    limit,
    path_of,
    printer_name,
    requested,
    response,
)  # fmt: skip
from nodeagent.wire import ipp
from nodeagent.wire.ipp import Group, GroupTag, Operation, Request, Response, Status
from nodeagent.wire.seat import Job, Jobs, Printer, Printers, Serve

Answer = tuple[Status, tuple[Group, ...]]
_DEFAULT_JOB_ATTRIBUTES = ("job-id", "job-uri")
"""RFC 8011 4.2.6.1: what Get-Jobs tells when it is not asked for more."""

_STATUS = {
    Reason.DEADLINE: Status.TEMPORARY_ERROR,
    Reason.DEVICE_UNKNOWN: Status.NOT_FOUND,
    Reason.INTERNAL: Status.INTERNAL_ERROR,
    Reason.MALFORMED: Status.BAD_REQUEST,
    Reason.NOT_SUPPORTED: Status.DOCUMENT_FORMAT_NOT_SUPPORTED,
    Reason.NOT_YOURS: Status.NOT_FOUND,
    Reason.STATE_INVALID: Status.NOT_POSSIBLE,
    Reason.TOO_LARGE: Status.REQUEST_ENTITY_TOO_LARGE,
    Reason.TOO_MANY: Status.TOO_MANY_JOBS,
}
"""Why the daemon refused -> what the client hears; any other reason: the service is not available now."""


class Operations:
    """One seat's printers and jobs, and what may be done with them."""

    def __init__(self, link: Link, serve: Serve, deny: Callable[[Reason], None], clock: Callable[[], float]) -> None:
        """`deny` counts; `clock` tells Unix seconds."""
        self._serve = serve
        self._deny = deny
        self._clock = clock
        self._changed_s = int(clock())
        self._printers: dict[str, Printer] = {}
        self._jobs: dict[int, Job] = {}
        self._users: dict[int, str] = {}
        self._incoming = IncomingJobs(link, serve.max_document_bytes, self._is_over)
        self._table: dict[int, Callable[[Request, Body], Awaitable[Answer]]] = {
            Operation.PRINT_JOB: self._print_job,
            Operation.VALIDATE_JOB: self._validate_job,
            Operation.CREATE_JOB: self._create_job,
            Operation.SEND_DOCUMENT: self._send_document,
            Operation.CANCEL_JOB: self._cancel_job,
            Operation.GET_JOB_ATTRIBUTES: self._get_job_attributes,
            Operation.GET_JOBS: self._get_jobs,
            Operation.GET_PRINTER_ATTRIBUTES: self._get_printer_attributes,
            Operation.CANCEL_JOBS: self._cancel_jobs,
            Operation.CANCEL_MY_JOBS: self._cancel_jobs,
            Operation.CLOSE_JOB: self._close_job,
            Operation.CUPS_GET_DEFAULT: self._get_default,
            Operation.CUPS_GET_PRINTERS: self._get_printers,
            Operation.CUPS_GET_CLASSES: self._get_classes,
        }

    def on_message(self, message: Printers | Jobs) -> None:
        if isinstance(message, Printers):
            self._printers = {printer.name: printer for printer in message.printers}
            self._changed_s = int(self._clock())
        else:
            self._jobs = {job.id: job for job in message.jobs}
            self._users = {job: user for job, user in self._users.items() if job in self._jobs}
            self._incoming.forget_finished()

    async def answer(self, request: Request, body: Body) -> Response:
        """The response to a request whose document, if it has one, is still in `body`. Raises IppError for attributes
        of a wrong type, HttpError and ConnectionError for what goes wrong with the body."""
        try:
            check(request)
            operation = self._table.get(request.code)
            if operation is None:
                raise Refusal(
                    Status.OPERATION_NOT_SUPPORTED, f"operation 0x{request.code:04x} does not exist here",
                    Reason.NOT_SUPPORTED,
                )  # fmt: skip
            if request.code not in (Operation.PRINT_JOB, Operation.SEND_DOCUMENT) and await body.parts():
                raise Refusal(Status.BAD_REQUEST, "a document after an operation that takes none", Reason.MALFORMED)
            status, groups = await operation(request, body)
        except Refusal as refusal:
            if refusal.reason is not None:
                self._deny(refusal.reason)
            groups = (Group(GroupTag.UNSUPPORTED, refusal.unsupported),) if refusal.unsupported else ()
            return response(request, refusal.status, refusal.message, groups)
        except AgentError as error:
            self._deny(error.reason)
            return response(request, _STATUS.get(error.reason, Status.SERVICE_UNAVAILABLE), error.message)
        return response(request, status, "", groups)

    # ---- what a request is about

    def _seat(self) -> answers.Seat:
        return answers.Seat(
            desktop=self._serve.desktop,
            now=self._clock(),
            changed_s=self._changed_s,
            jobs=tuple(self._jobs.values()),
            operations=tuple(sorted(self._table)),
            max_document_bytes=self._serve.max_document_bytes,
        )

    def _printer(self, request: Request) -> Printer:
        """The printer that printer-uri names; `/` and `/ipp/print` are the default one."""
        path = path_of(request, "printer-uri")
        name = next(iter(self._printers), "") if path in DEFAULT_PATHS else printer_name(path)
        printer = self._printers.get(name)
        if printer is None:
            raise Refusal(Status.NOT_FOUND, "no such printer in this desktop", Reason.NOT_YOURS)
        return printer

    def _job(self, request: Request) -> Job:
        """The job that job-uri, or printer-uri with job-id, names."""
        operation = request.group(GroupTag.OPERATION)
        if operation.get("job-uri") is not None:
            path = path_of(request, "job-uri")
            number = int(path[1]) if path[:1] == ("jobs",) and len(path) == 2 and is_number(path[1]) else 0
            job = self._jobs.get(number)
        else:
            wanted = operation.integer("job-id")
            if wanted is None:
                raise Refusal(Status.BAD_REQUEST, "neither job-uri nor job-id", Reason.MALFORMED)
            path = path_of(request, "printer-uri")
            job = self._jobs.get(wanted)
            if job is not None and path not in ALL_PATHS and job.printer != self._printer(request).name:
                job = None
        if job is None:
            raise Refusal(Status.NOT_FOUND, "no such job in this desktop", Reason.NOT_YOURS)
        return job

    def _is_over(self, job: int) -> bool:
        known = self._jobs.get(job)
        return known is not None and known.state >= JOB_CANCELED

    def _note(self, job: Job) -> None:
        """What we know about a job of ours before the daemon's next Jobs message, which replaces it all."""
        self._jobs[job.id] = job

    # ---- printing

    def _checked_template(self, request: Request) -> tuple[ipp.Attribute, ...]:
        """The job attributes that will be ignored. Raises Refusal when the client wants all or nothing."""
        unsupported = answers.unsupported_attributes(request.group(GroupTag.JOB))
        if unsupported and request.group(GroupTag.OPERATION).boolean("ipp-attribute-fidelity"):
            raise Refusal(
                Status.ATTRIBUTES_OR_VALUES_NOT_SUPPORTED, "job attributes that are not supported", None, unsupported
            )
        return unsupported

    def _declared_format(self, request: Request, printer: Printer) -> str | None:
        """document-format, checked as far as it goes without a document. Raises Refusal."""
        operation = request.group(GroupTag.OPERATION)
        compression = operation.text("compression")
        if compression not in (None, "none"):
            raise Refusal(
                Status.COMPRESSION_NOT_SUPPORTED, "compressed documents are not supported, send them as they are",
                Reason.NOT_SUPPORTED, (ipp.keyword("compression", compression or ""),),
            )  # fmt: skip
        declared = operation.text("document-format")
        declared = None if declared is None else declared.split(";")[0].strip().lower()
        if declared is not None and not is_untyped(declared):
            _check_format(declared, printer)
        return declared

    async def _new_job(self, request: Request, printer: Printer) -> Job:
        operation, template = request.group(GroupTag.OPERATION), request.group(GroupTag.JOB)
        title = operation.text("job-name") or operation.text("document-name") or ""
        title = answers.plain_text(title) or "Untitled"
        user = answers.plain_text(operation.text("requesting-user-name") or "")
        copies = template.get("copies")
        count = copies.data if copies is not None and type(copies.data) is int else 1
        count = count if 1 <= count <= answers.MAX_COPIES else 1
        number = await self._incoming.create(printer, title, user, count)
        self._users[number] = user
        if number not in self._jobs:
            created_s = int(self._clock())
            self._note(
                Job(id=number, printer=printer.name, title=title, state=JOB_INCOMING, reason="job-incoming",
                    created_s=created_s)
            )  # fmt: skip
        return self._jobs[number]

    def _submitted(self, job: Job, size: int = 0) -> Job:
        """The job after its last document; the daemon's own word, where it has come, is further."""
        known = self._jobs.get(job.id, job)
        if known.state == JOB_INCOMING:
            known = msgspec.structs.replace(known, state=JOB_PENDING, reason="none", size_bytes=known.size_bytes + size)
            self._note(known)
        return known

    async def _print_job(self, request: Request, body: Body) -> Answer:
        printer = self._printer(request)
        ignored = self._checked_template(request)
        declared = self._declared_format(request, printer)
        mime = await _format_of(body, declared, printer)
        if mime is None:
            raise Refusal(Status.BAD_REQUEST, "Print-Job without a document", Reason.MALFORMED)
        job = await self._new_job(request, printer)
        size = await self._incoming.receive(job.id, body, mime, last=True)
        return self._job_answer(self._submitted(job, size), ignored)

    async def _validate_job(self, request: Request, body: Body) -> Answer:
        printer = self._printer(request)
        ignored = self._checked_template(request)
        self._declared_format(request, printer)
        groups = (Group(GroupTag.UNSUPPORTED, ignored),) if ignored else ()
        return Status.OK_IGNORED_OR_SUBSTITUTED if ignored else Status.OK, groups

    async def _create_job(self, request: Request, body: Body) -> Answer:
        printer = self._printer(request)
        ignored = self._checked_template(request)
        return self._job_answer(await self._new_job(request, printer), ignored)

    async def _send_document(self, request: Request, body: Body) -> Answer:
        job = self._job(request)
        last = request.group(GroupTag.OPERATION).boolean("last-document")
        if last is None:
            raise Refusal(Status.BAD_REQUEST, "Send-Document without last-document", Reason.MALFORMED)
        self._incoming.check_open(job.id)
        printer = self._printers.get(job.printer)
        if printer is None:
            raise Refusal(Status.NOT_FOUND, "the printer of this job is no longer in this desktop")
        declared = self._declared_format(request, printer)
        mime = await _format_of(body, declared, printer)
        if mime is not None:
            size = await self._incoming.receive(job.id, body, mime, last=last)
            return self._job_answer(self._submitted(job, size) if last else job, ())
        if not last:
            raise Refusal(Status.BAD_REQUEST, "an empty document that is not the last", Reason.MALFORMED)
        await self._incoming.close(job.id)
        return self._job_answer(self._submitted(job), ())

    async def _close_job(self, request: Request, body: Body) -> Answer:
        job = self._job(request)
        await self._incoming.close(job.id)
        return self._job_answer(self._submitted(job), ())

    def _job_answer(self, job: Job, ignored: tuple[ipp.Attribute, ...]) -> Answer:
        wanted = ("job-id", "job-uri", "job-state", "job-state-reasons", "job-state-message")
        group = answers.job_group(job, self._seat(), wanted)
        if ignored:
            return Status.OK_IGNORED_OR_SUBSTITUTED, (Group(GroupTag.UNSUPPORTED, ignored), group)
        return Status.OK, (group,)

    async def _cancel_job(self, request: Request, body: Body) -> Answer:
        job = self._job(request)
        if job.state >= JOB_CANCELED:
            raise Refusal(Status.NOT_POSSIBLE, f"job {job.id} is already over")
        await self._incoming.cancel(job.id)
        return Status.OK, ()

    async def _cancel_jobs(self, request: Request, body: Body) -> Answer:
        """Cancel-Jobs and Cancel-My-Jobs: everything unfinished on the printer (or all), or just job-ids of these."""
        only_mine = request.code == Operation.CANCEL_MY_JOBS
        mine = {job.id for job in self._jobs_of(request, only_mine=only_mine) if job.state < JOB_CANCELED}
        wanted = request.group(GroupTag.OPERATION).get("job-ids")
        if wanted is not None:
            ids = {value.data for value in wanted.values if isinstance(value.data, int)}
            if not ids <= mine:
                raise Refusal(Status.NOT_FOUND, "one of these jobs is not an unfinished one of this desktop",
                              Reason.NOT_YOURS)  # fmt: skip
            mine &= ids
        for job in sorted(mine):
            await self._incoming.cancel(job)
        return Status.OK, ()

    # ---- looking

    async def _get_printer_attributes(self, request: Request, body: Body) -> Answer:
        printer = self._printer(request)
        self._declared_format(request, printer)
        return Status.OK, (answers.printer_group(printer, self._seat(), requested(request)),)

    async def _get_job_attributes(self, request: Request, body: Body) -> Answer:
        return Status.OK, (answers.job_group(self._job(request), self._seat(), requested(request)),)

    async def _get_jobs(self, request: Request, body: Body) -> Answer:
        operation = request.group(GroupTag.OPERATION)
        which = operation.text("which-jobs") or "not-completed"
        if which not in answers.WHICH_JOBS:
            raise Refusal(
                Status.ATTRIBUTES_OR_VALUES_NOT_SUPPORTED, "no such kind of jobs", None,
                (ipp.keyword("which-jobs", which),),
            )  # fmt: skip
        first = operation.integer("first-job-id") or 1
        mine = self._jobs_of(request, only_mine=operation.boolean("my-jobs") or False)
        jobs = [job for job in mine if _is_which(job, which) and job.id >= first]
        jobs.sort(key=lambda job: job.id, reverse=which == "completed")
        wanted, seat = requested(request) or _DEFAULT_JOB_ATTRIBUTES, self._seat()
        return Status.OK, tuple(answers.job_group(job, seat, wanted) for job in jobs[: limit(request)])

    def _jobs_of(self, request: Request, *, only_mine: bool) -> list[Job]:
        """The jobs of the printer that printer-uri names; `/` and `/printers/` stand for all printers of the seat.
        `only_mine` leaves out those that another user of this desktop is known to have sent."""
        jobs = list(self._jobs.values())
        if path_of(request, "printer-uri") not in ALL_PATHS:
            printer = self._printer(request)
            jobs = [job for job in jobs if job.printer == printer.name]
        user = request.group(GroupTag.OPERATION).text("requesting-user-name")
        if only_mine and user is not None:
            me = answers.plain_text(user)
            jobs = [job for job in jobs if self._users.get(job.id, me) == me]
        return jobs

    async def _get_default(self, request: Request, body: Body) -> Answer:
        printer = next(iter(self._printers.values()), None)
        if printer is None:
            raise Refusal(Status.NOT_FOUND, "this desktop has no printer")
        return Status.OK, (answers.printer_group(printer, self._seat(), requested(request)),)

    async def _get_printers(self, request: Request, body: Body) -> Answer:
        operation = request.group(GroupTag.OPERATION)
        printers = list(self._printers.values())
        first = operation.text("first-printer-name")
        names = [printer.name for printer in printers]
        if first in names:
            printers = printers[names.index(first) :]
        mask = operation.integer("printer-type-mask") or 0
        if (operation.integer("printer-type") or 0) & mask != answers.PRINTER_TYPE & mask:
            printers = []
        wanted, seat = requested(request), self._seat()
        return Status.OK, tuple(answers.printer_group(each, seat, wanted) for each in printers[: limit(request)])

    async def _get_classes(self, request: Request, body: Body) -> Answer:
        """There are none; `lpstat -t` asks and takes an error badly."""
        return Status.OK, ()


def _is_which(job: Job, which: str) -> bool:
    states = {
        "all": range(JOB_PENDING, 10),
        "completed": range(JOB_CANCELED, 10),
        "not-completed": range(JOB_PENDING, JOB_CANCELED),
        "pending": (JOB_PENDING,),
        "pending-held": (JOB_INCOMING,),
        "processing": (JOB_PROCESSING, 6),
        "canceled": (JOB_CANCELED,),
        "aborted": (8,),
    }
    return job.state in states[which]


def _check_format(mime: str, printer: Printer) -> None:
    if mime not in printer.formats:
        found = "this is none of these" if mime == OCTET_STREAM else f"not {answers.plain_text(mime, 60)}"
        known = ", ".join(printer.formats)
        raise Refusal(
            Status.DOCUMENT_FORMAT_NOT_SUPPORTED, f"printer {printer.name} takes only {known}; {found}",
            Reason.NOT_SUPPORTED, (ipp.mime("document-format", answers.plain_text(mime)),),
        )  # fmt: skip


async def _format_of(body: Body, declared: str | None, printer: Printer) -> str | None:
    """The format of the document in `body`, one that the printer takes; None: there is no document. Raises Refusal."""
    start = await peek(body, SNIFF_BYTES)
    if not start:
        return None
    mime = decide(declared, start)
    _check_format(mime, printer)
    return mime
