"""What the root daemon and a seat worker say to each other.

One message is one SOCK_SEQPACKET datagram of at most `MAX_MESSAGE` bytes: MessagePack of a tagged struct, with at
most `MAX_FDS` descriptors beside it (SCM_RIGHTS). The daemon treats a worker as hostile: everything it receives is
decoded strictly into `FromWorker`, and any failure to decode ends that worker.

    daemon                                   worker
    Printers(...), Jobs(...)          ->
    Serve(service) + listening fds    ->
                                      <-     Ready
                                      <-     CreateJob(request=1, printer, title)
    JobCreated(request=1, job)        ->
                                      <-     OpenDocument(request=2, job)
    DocumentOpened(request=2) + fd    ->     writes the document into the fd
                                      <-     CloseDocument(request=3, job, format, size, last)
    Done(request=3)                   ->
    Jobs(...)                         ->     whenever a job of the seat changes
                                      <-     Counters(...)  once a second while they change
"""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta

from nodeagent.errors import Reason

MAX_MESSAGE = 64 * 1024
MAX_FDS = 32
MAX_PRINTERS = 32
MAX_JOBS = 64
"""Jobs of one seat that are told to its worker: all unfinished ones and the newest finished ones."""

Text = Annotated[str, Meta(max_length=255)]
"""Text that came from a desktop: bounded, never interpreted by the daemon."""
Name = Annotated[str, Meta(max_length=63, pattern=r"^[A-Za-z0-9._-]+\Z")]
Mime = Annotated[str, Meta(max_length=63, pattern=r"^[a-z0-9.+-]+/[a-zA-Z0-9.+-]+\Z")]
Count = Annotated[int, Meta(ge=0, le=2**53)]
Request = Annotated[int, Meta(ge=1, le=2**31 - 1)]
JobId = Annotated[int, Meta(ge=1, le=2**31 - 1)]


class Message(msgspec.Struct, frozen=True, kw_only=True, tag=True, forbid_unknown_fields=True):
    """Base of every message; the tag is the class name."""


# ---- daemon -> worker


class Serve(Message, frozen=True, kw_only=True):
    """Serve `service` on the listening sockets beside this message (one per slot of the seat). Repeated when a slot joins."""

    service: str
    desktop: str
    """Who the seat belongs to, `namespace/pod`: shown as the owner of its jobs."""
    max_document_bytes: int
    max_connections: int
    idle_s: float


class Printer(msgspec.Struct, frozen=True, kw_only=True):
    """A printer of the seat as its desktop sees it."""

    name: str
    info: str
    make_and_model: str
    formats: tuple[str, ...]
    """Document formats (MIME) that can be printed on it, after filtering; the first is the default."""
    online: bool
    """False: unplugged. Jobs are still accepted and wait."""
    simulated: bool = False
    state_message: str = ""


class Printers(Message, frozen=True, kw_only=True):
    """The printers of the seat, all of them, each time they change."""

    printers: tuple[Printer, ...]


class Job(msgspec.Struct, frozen=True, kw_only=True):
    """A job as its seat sees it. `state` is the IPP job-state (RFC 8011 5.3.7): 3 pending, 4 held (incoming),
    5 processing, 7 cancelled, 8 aborted, 9 completed. Times are Unix seconds, 0 = not yet."""

    id: int
    printer: str
    title: str
    state: int
    reason: str = "none"
    """job-state-reasons keyword."""
    message: str = ""
    size_bytes: int = 0
    created_s: int = 0
    processing_s: int = 0
    completed_s: int = 0


class Jobs(Message, frozen=True, kw_only=True):
    """Every job of the seat that it may know of, each time one changes; at most MAX_JOBS."""

    jobs: tuple[Job, ...]


class JobCreated(Message, frozen=True, kw_only=True):
    request: int
    job: int


class DocumentOpened(Message, frozen=True, kw_only=True):
    """The descriptor beside this message takes the document; it is a regular file open for writing."""

    request: int


class Done(Message, frozen=True, kw_only=True):
    request: int


class Refused(Message, frozen=True, kw_only=True):
    request: int
    reason: Reason
    message: str


class Ping(Message, frozen=True, kw_only=True):
    """Say Pong: a worker that does not is taken for hung."""


class Stop(Message, frozen=True, kw_only=True):
    """Finish: close listeners, end connections after what is already accepted, exit 0."""


ToWorker = Serve | Printers | Jobs | JobCreated | DocumentOpened | Done | Refused | Ping | Stop


# ---- worker -> daemon


class Ready(Message, frozen=True, kw_only=True):
    """The worker listens on every socket it was given for `service`."""

    service: Name


class Pong(Message, frozen=True, kw_only=True):
    """To a Ping."""


class CreateJob(Message, frozen=True, kw_only=True):
    request: Request
    printer: Name
    title: Text
    user: Text = ""
    """What the client called itself: shown, never trusted."""
    copies: Annotated[int, Meta(ge=1, le=999)] = 1


class OpenDocument(Message, frozen=True, kw_only=True):
    request: Request
    job: JobId


class CloseDocument(Message, frozen=True, kw_only=True):
    """The document is whole. `last` submits the job; with size 0 and last the job ends without a further document."""

    request: Request
    job: JobId
    format: Mime
    size: Count
    last: bool


class DropDocument(Message, frozen=True, kw_only=True):
    """The client went away or broke the rules in mid-document: the whole job is aborted and never prints. No answer."""

    job: JobId
    reason: Reason


class CancelJob(Message, frozen=True, kw_only=True):
    request: Request
    job: JobId


class Counters(Message, frozen=True, kw_only=True):
    """Totals since the worker started. `denied` counts refused attempts by reason."""

    service: Name
    bytes_in: Count = 0
    bytes_out: Count = 0
    connections: Count = 0
    denied: Annotated[dict[Reason, Count], Meta(max_length=32)] = {}


FromWorker = Ready | Pong | CreateJob | OpenDocument | CloseDocument | DropDocument | CancelJob | Counters

_encoder = msgspec.msgpack.Encoder()
_from_worker: msgspec.msgpack.Decoder[FromWorker] = msgspec.msgpack.Decoder(FromWorker)
_to_worker: msgspec.msgpack.Decoder[ToWorker] = msgspec.msgpack.Decoder(ToWorker)


def put_message(message: Message) -> bytes:
    """Encode one message; raises ValueError when it would not fit into one datagram."""
    data = _encoder.encode(message)
    if len(data) > MAX_MESSAGE:
        raise ValueError(f"{type(message).__name__} of {len(data)} bytes is over {MAX_MESSAGE}")
    return data


def take_from_worker(untrusted_data: bytes) -> FromWorker:
    """Decode what a worker sent; raises msgspec.DecodeError (ValidationError is one) for anything else."""
    try:
        return _from_worker.decode(untrusted_data)
    except UnicodeDecodeError as error:  # msgspec lets it pass for text that is not UTF-8
        raise msgspec.DecodeError(f"text that is not UTF-8: {error.reason}") from error


def take_to_worker(data: bytes) -> ToWorker:
    return _to_worker.decode(data)
