"""IPP to our own cupsd over its Unix socket: just the operations the spool needs.

One connection per request, HTTP/1.0, so an answer ends with its connection. `PeerCred` is how cupsd knows root by the
socket's credentials (cups/auth.c); the socket's directory lets nobody else near.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Sequence
from pathlib import Path

import msgspec

from nodeagent.errors import AgentError, Reason
from nodeagent.wire import ipp
from nodeagent.wire.ipp import Attribute, Group, GroupTag, IppError, Operation, Request, Response, Status

TIMEOUT_S = 10.0
"""For an answer."""
MAX_RESPONSE_BYTES = 8 << 20
RAW = "application/vnd.cups-raw"
ERROR_POLICY = "retry-current-job"
IDLE = 3
STOPPED = 5
"""printer-state (RFC 8011 5.4.11)"""
JOB_ATTRIBUTES = ("job-id", "job-name", "job-state", "job-state-reasons", "job-printer-state-message")
QUEUE_ATTRIBUTES = ("printer-name", "device-uri", "printer-info", "printer-state", "printer-is-accepting-jobs")


class Queue(msgspec.Struct, frozen=True):
    """A raw queue of cupsd: every byte goes to the device as it is."""

    name: str
    device_uri: str
    info: str


class CupsJob(msgspec.Struct, frozen=True):
    """A job as cupsd has it. `state` is the IPP job-state (RFC 8011 5.3.7); `message` is the back end's."""

    id: int
    state: int
    reasons: tuple[str, ...] = ()
    message: str = ""

    @property
    def finished(self) -> bool:
        return self.state >= 7


class CupsRefused(AgentError):
    """cupsd answered, and the answer was no: nothing was changed. `status` is the IPP status code."""

    def __init__(self, what: str, response: Response) -> None:
        said = response.group(GroupTag.OPERATION).text("status-message") or f"status 0x{response.code:04x}"
        reason = Reason.DEVICE_UNKNOWN if response.code == Status.NOT_FOUND else Reason.UPSTREAM_UNAVAILABLE
        super().__init__(reason, f"cupsd refused {what}: {said}")
        self.status = response.code


class CupsClient:
    """Methods raise CupsRefused for a no, and AgentError(UPSTREAM_UNAVAILABLE) when there was no answer: then what was asked
    for may have happened or not."""

    def __init__(self, path: Path) -> None:
        self._path = path

    async def ping(self) -> None:
        """Any answer will do."""
        await self._ask("a sign of life", Operation.CUPS_GET_DEFAULT, (), allowed=(Status.NOT_FOUND,))

    async def queues(self) -> dict[str, Queue | None]:
        """The queues by name; None for one that has to be set up again."""
        wanted = ipp.keyword("requested-attributes", *QUEUE_ATTRIBUTES)
        response = await self._ask("its queues", Operation.CUPS_GET_PRINTERS, (wanted,), allowed=(Status.NOT_FOUND,))
        found: dict[str, Queue | None] = {}
        for group in response.groups_of(GroupTag.PRINTER):
            name = group.text("printer-name") or ""
            works = group.integer("printer-state") != STOPPED and group.boolean("printer-is-accepting-jobs")
            queue = Queue(name, group.text("device-uri") or "", group.text("printer-info") or "")
            found[name] = queue if works else None
        return found

    async def set_queue(self, queue: Queue) -> None:
        """Create the queue or change it. A job that is just printing starts again when the device changes."""
        attributes = (
            ipp.uri("device-uri", queue.device_uri),
            ipp.text("printer-info", queue.info),
            ipp.enum("printer-state", IDLE),
            ipp.boolean("printer-is-accepting-jobs", True),
            ipp.boolean("printer-is-shared", False),
            ipp.name("printer-error-policy", ERROR_POLICY),
        )
        await self._ask(
            f"the queue {queue.name}", Operation.CUPS_ADD_MODIFY_PRINTER, (_printer(queue.name),),
            Group(GroupTag.PRINTER, attributes), path="/admin/",
        )  # fmt: skip
        # A job that the change has stopped would start again with cupsd's next look for work, up to 10 s later.
        await self._ask(
            f"work on the queue {queue.name}", Operation.RESUME_PRINTER, (_printer(queue.name),), path="/admin/"
        )

    async def delete_queue(self, name: str) -> None:
        """Delete a queue with its jobs; one that is not there is no error."""
        await self._ask(
            f"to delete the queue {name}", Operation.CUPS_DELETE_PRINTER, (_printer(name),), path="/admin/",
            allowed=(Status.NOT_FOUND,),
        )  # fmt: skip

    async def submit(self, queue: str, key: str, document: Path, copies: int) -> int:
        """Print a file as it is; the job is called `key`, which begins with cups_watch.KEY_PREFIX. Returns cupsd's number of it.

        The job holds the file's path, not its bytes: the back end reads them from the spool, so a document lies on disk once.
        """
        response = await self._ask(
            f"a job for the queue {queue}", Operation.PRINT_JOB,
            (_printer(queue), _ROOT, ipp.name("job-name", key), ipp.mime("document-format", RAW)),
            Group(GroupTag.JOB, (ipp.integer("copies", copies),)), path=f"/printers/{queue}",
            data=f"{document}\n".encode(),
        )  # fmt: skip
        number = response.group(GroupTag.JOB).integer("job-id")
        if number is None:
            raise AgentError(Reason.UPSTREAM_UNAVAILABLE, "cupsd took a job without giving it a number")
        return number

    async def jobs(self, first: int = 1) -> dict[str, CupsJob]:
        """All jobs with that number or a higher one, finished ones too, by key."""
        response = await self._ask(
            "its jobs", Operation.GET_JOBS,
            (ipp.uri("printer-uri", "ipp://localhost/"), _ROOT, ipp.integer("limit", 10_000),
             ipp.integer("first-job-id", first), ipp.keyword("which-jobs", "all"),
             ipp.keyword("requested-attributes", *JOB_ATTRIBUTES)),
        )  # fmt: skip
        found = {}
        for group in response.groups_of(GroupTag.JOB):
            found[group.text("job-name") or ""] = CupsJob(
                group.integer("job-id") or 0, group.integer("job-state") or 0, group.texts("job-state-reasons"),
                group.text("job-printer-state-message") or "",
            )  # fmt: skip
        return found

    async def cancel(self, job: int) -> None:
        """Cancel a job; one that has ended or is not there is no error."""
        await self._ask(
            f"to cancel job {job}", Operation.CANCEL_JOB,
            (ipp.uri("printer-uri", "ipp://localhost/"), ipp.integer("job-id", job), _ROOT), path="/jobs/",
            allowed=(Status.NOT_FOUND, Status.NOT_POSSIBLE),
        )  # fmt: skip

    async def _ask(
        self, what: str, operation: Operation, attributes: Sequence[Attribute], *groups: Group, path: str = "/",
        data: bytes = b"", allowed: Sequence[int] = (),
    ) -> Response:  # fmt: skip
        request = Request((2, 0), operation, 1, (Group(GroupTag.OPERATION, (*_START, *attributes)), *groups))
        body = ipp.put_request(request)
        head = (
            f"POST {path} HTTP/1.0\r\nHost: localhost\r\nAuthorization: PeerCred root\r\n"
            f"Content-Type: application/ipp\r\nContent-Length: {len(body) + len(data)}\r\n\r\n"
        )
        try:
            async with asyncio.timeout(TIMEOUT_S):
                answer = await self._exchange(head.encode() + body + data)
            taken = ipp.take_response(answer)
        except (OSError, IppError) as error:
            words = "no answer in time" if isinstance(error, TimeoutError) else str(error)
            raise AgentError(Reason.UPSTREAM_UNAVAILABLE, f"asked cupsd for {what}: {words}") from error
        if taken is None:
            raise AgentError(Reason.UPSTREAM_UNAVAILABLE, f"asked cupsd for {what}: the answer ends too early")
        response = taken[0]
        if not response.successful and response.code not in allowed:
            raise CupsRefused(what, response)
        return response

    async def _exchange(self, data: bytes) -> bytes:
        """Send, and return the body of the answer. Raises OSError (TimeoutError and ConnectionError are two)."""
        loop = asyncio.get_running_loop()
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
            sock.setblocking(False)
            await loop.sock_connect(sock, str(self._path))
            try:
                await loop.sock_sendall(sock, data)
            except (BrokenPipeError, ConnectionResetError):
                pass  # cupsd may refuse before it has read everything
            answer = bytearray()
            while chunk := await loop.sock_recv(sock, 65536):
                answer += chunk
                if len(answer) > MAX_RESPONSE_BYTES:
                    raise OSError(f"an answer of more than {MAX_RESPONSE_BYTES} bytes")
        head, _, body = bytes(answer).partition(b"\r\n\r\n")
        status = head.split(b"\r\n", 1)[0].split(b" ")
        if len(status) < 2 or status[1] != b"200":
            raise OSError(
                f"HTTP status {status[1].decode(errors='replace')}" if len(status) > 1 else "the connection ended"
            )
        return body


_START = (ipp.charset("attributes-charset", "utf-8"), ipp.language("attributes-natural-language", "en"))
_ROOT = ipp.name("requesting-user-name", "root")


def _printer(queue: str) -> Attribute:
    return ipp.uri("printer-uri", f"ipp://localhost/printers/{queue}")
