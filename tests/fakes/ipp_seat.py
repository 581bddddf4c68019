"""A seat that prints: `IppService` on one end of socket pairs, a daemon that keeps what it is told, clients that talk."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager
from pathlib import Path

import msgspec

from nodeagent.errors import AgentError, Reason
from nodeagent.services.ipp.service import IppService
from nodeagent.wire import ipp
from nodeagent.wire import seat as wire

PRINTER = wire.Printer(
    name="P1",
    info="Office",
    make_and_model="Model One",
    formats=("application/pdf", "application/postscript", "image/pwg-raster", "text/plain"),
    online=True,
    simulated=True,
)
SECOND = msgspec.structs.replace(PRINTER, name="P2", online=False, formats=("application/pdf", "image/urf"))
NOW = 1_795_252_970.5
OP = ipp.Operation
G = ipp.GroupTag


class Daemon:
    """The daemon as a worker's Link sees it. `told` is everything in order; documents lie in `directory`."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.told: list[wire.Message] = []
        self.jobs: dict[int, wire.Job] = {}
        self.refuse: dict[type[wire.Message], Reason] = {}
        self.gone = False
        self.prints = False
        """True: a job is printed as soon as it is submitted."""
        self.service: IppService | None = None
        self.dropped = asyncio.Event()
        self.opened = asyncio.Event()
        self._requests = 0

    def next_request(self) -> int:
        self._requests += 1
        return self._requests

    def send(self, message: wire.Message) -> None:
        if self.gone:
            raise ConnectionResetError("gone")
        wire.take_from_worker(wire.put_message(message))  # as strict as the real one
        self.told.append(message)
        if isinstance(message, wire.DropDocument):
            self.change(message.job, state=8)
            self.dropped.set()

    async def ask(self, message: wire.Message) -> tuple[wire.ToWorker, int | None]:
        self.send(message)
        await asyncio.sleep(0)
        if type(message) in self.refuse:
            raise AgentError(self.refuse[type(message)], "the daemon says no")
        match message:
            case wire.CreateJob():
                job = len(self.jobs) + 1
                self.jobs[job] = wire.Job(id=job, printer=message.printer, title=message.title, state=4, created_s=7)
                return wire.JobCreated(request=message.request, job=job), None
            case wire.OpenDocument():
                self.opened.set()
                flags = os.O_CREAT | os.O_WRONLY | os.O_EXCL
                fd = os.open(self.document(message.job, self.documents(message.job)), flags)
                return wire.DocumentOpened(request=message.request), fd
            case wire.CloseDocument():
                if message.last:
                    self.change(message.job, state=9 if self.prints else 3, size_bytes=message.size)
                return wire.Done(request=message.request), None
            case wire.CancelJob():
                self.change(message.job, state=7)
                return wire.Done(request=message.request), None
        raise AssertionError(message)

    def change(self, job: int, *, state: int, size_bytes: int = 0) -> None:
        self.jobs[job] = msgspec.structs.replace(self.jobs[job], state=state, size_bytes=size_bytes)
        self.tell_jobs()

    def tell_jobs(self) -> None:
        assert self.service is not None
        self.service.on_message(wire.Jobs(jobs=tuple(self.jobs.values())))

    def documents(self, job: int) -> int:
        return len(list(self.directory.glob(f"{job}.*")))

    def document(self, job: int, index: int = 0) -> Path:
        return self.directory / f"{job}.{index}"

    def heard(self, kind: type[wire.Message]) -> list[wire.Message]:
        return [message for message in self.told if isinstance(message, kind)]


class Answer(msgspec.Struct, frozen=True):
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def ipp(self) -> ipp.Response:
        assert self.status == 200, (self.status, self.body)
        taken = ipp.take_response(self.body)
        assert taken is not None and taken[1] == len(self.body)
        return taken[0]


class Client:
    """The desktop's end of one connection."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self._loop = asyncio.get_running_loop()
        self._unread = b""

    async def send(self, data: bytes) -> None:
        async with asyncio.timeout(10):
            await self._loop.sock_sendall(self.sock, data)

    async def _more(self) -> None:
        async with asyncio.timeout(10):
            data = await self._loop.sock_recv(self.sock, 65536)
        if not data:
            raise EOFError(self._unread)
        self._unread += data

    async def ended(self) -> bool:
        """Waits for the end of the connection; True if nothing came before it."""
        try:
            await self._more()
        except (EOFError, ConnectionResetError):
            return True
        return False

    async def read(self, *, head: bool = False) -> Answer:
        """The next response, informational ones too; EOFError when the connection ends instead."""
        while b"\r\n\r\n" not in self._unread:
            await self._more()
        text, _, self._unread = self._unread.partition(b"\r\n\r\n")
        first, *lines = text.decode().split("\r\n")
        headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
        length = 0 if head else int(headers.get("content-length", "0"))
        while len(self._unread) < length:
            await self._more()
        body, self._unread = self._unread[:length], self._unread[length:]
        return Answer(int(first.split()[1]), headers, body)

    async def ask(self, request: ipp.Request, document: bytes = b"") -> ipp.Response:
        await self.send(post(ipp.put_request(request) + document))
        return (await self.read()).ipp

    def close(self) -> None:
        self.sock.close()


class Desk:
    def __init__(self, service: IppService, daemon: Daemon, connections: asyncio.TaskGroup) -> None:
        self.service = service
        self.daemon = daemon
        self._connections = connections
        self._clients: list[Client] = []
        self._listening = ExitStack()

    def connect(self) -> Client:
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        theirs.setblocking(False)
        self._connections.create_task(self.service.connection(theirs))
        self._clients.append(Client(ours))
        return self._clients[-1]

    async def listen(self, path: Path) -> None:
        """Serve whoever connects to this socket, until the seat ends."""
        listener = socket.socket(socket.AF_UNIX)
        self._listening.callback(listener.close)
        listener.bind(str(path))
        listener.listen(16)
        listener.setblocking(False)
        accepting = self._connections.create_task(self._accept(listener))
        self._listening.callback(accepting.cancel)

    async def _accept(self, listener: socket.socket) -> None:
        while True:
            sock, _ = await asyncio.get_running_loop().sock_accept(listener)
            sock.setblocking(False)
            self._connections.create_task(self.service.connection(sock))

    def close(self) -> None:
        self._listening.close()
        for client in self._clients:
            client.close()

    @property
    def denied(self) -> dict[Reason, int]:
        return self.service.counters().denied


@asynccontextmanager
async def seat(
    directory: Path,
    *,
    printers: tuple[wire.Printer, ...] = (PRINTER, SECOND),
    idle_s: float = 10.0,
    max_bytes: int = 2**20,
) -> AsyncIterator[Desk]:
    """A seat with two printers. On the way out every client is closed, and every connection must end by itself."""
    daemon = Daemon(directory)
    serve = wire.Serve(
        service="ipp", desktop="team/alice", max_document_bytes=max_bytes, max_connections=8, idle_s=idle_s
    )
    service = daemon.service = IppService(daemon, serve, clock=lambda: NOW)
    service.on_message(wire.Printers(printers=printers))
    async with asyncio.timeout(30), asyncio.TaskGroup() as connections:
        desk = Desk(service, daemon, connections)
        try:
            yield desk
        finally:
            desk.close()


HEAD = b"POST /printers/P1 HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/ipp\r\n"


def post(body: bytes, extra: bytes = b"") -> bytes:
    return HEAD + extra + b"Content-Length: %d\r\n\r\n" % len(body) + body


def chunk(data: bytes) -> bytes:
    return b"%x\r\n" % len(data) + data + b"\r\n"


def chunked(*pieces: bytes, extra: bytes = b"") -> bytes:
    return HEAD + extra + b"Transfer-Encoding: chunked\r\n\r\n" + b"".join(map(chunk, pieces)) + b"0\r\n\r\n"


def request(
    operation: int,
    *attributes: ipp.Attribute,
    job: tuple[ipp.Attribute, ...] = (),
    version: tuple[int, int] = (2, 0),
    number: int = 1,
    printer: str | None = "P1",
) -> ipp.Request:
    """A request as libcups makes it; `printer` None leaves printer-uri out."""
    target = () if printer is None else (ipp.uri("printer-uri", f"ipp://localhost/printers/{printer}"),)
    first = (ipp.charset("attributes-charset", "utf-8"), ipp.language("attributes-natural-language", "en"))
    groups = [ipp.Group(G.OPERATION, (*first, *target, *attributes))]
    if job:
        groups.append(ipp.Group(G.JOB, job))
    return ipp.Request(version, operation, number, tuple(groups))


def message_of(response: ipp.Response) -> str:
    return response.groups[0].text("status-message") or ""
