"""A seat worker: the one process that reads what a desktop says, without rights and behind a seccomp filter.

It is forked from the zygote, is told by the daemon over its control socket what to serve, accepts the connections of its
seat and gives each one to the service (`services/`), which it connects with the daemon (`Link`). It starts no thread, opens
no file, imports nothing.
"""

from __future__ import annotations

import asyncio
import errno
import os
import socket
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import PurePath

from nodeagent.errors import AgentError, Reason
from nodeagent.services import Link, SeatService
from nodeagent.transports.unix import Channel
from nodeagent.wire import seat as wire

STOP_GRACE_S = 0.7
"""After Stop, connections have this long to end by themselves; the daemon waits a second before it kills."""
COUNT_S = 1.0
FULL_S = 0.2
"""Pause of a listener after the descriptors of the process ran out."""
MAX_QUESTIONS = 1024
"""Unanswered questions to the daemon: a connection asks one at a time."""
OUT_OF_ROOM = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})

EX_SOFTWARE = 70
"""sysexits.h: there is a bug, in the service or here."""
GOODBYE = wire.put_message(wire.Stop())

Constructor = Callable[[Link, wire.Serve], SeatService]


class Offered:
    """A service of this seat: its code, its listening sockets, its connections."""

    def __init__(self, serve: wire.Serve, service: SeatService) -> None:
        self.serve = serve
        self.service = service
        self.accepting: list[asyncio.Task[None]] = []
        self.connections: dict[asyncio.Task[None], socket.socket] = {}
        self.denied: Counter[Reason] = Counter()
        self.told: wire.Counters | None = None

    def counters(self) -> wire.Counters:
        """What the service counted, and what was refused or failed before and around it."""
        counted = self.service.counters()
        denied = Counter(counted.denied)
        denied.update(self.denied)
        return wire.Counters(
            service=counted.service,
            bytes_in=counted.bytes_in,
            bytes_out=counted.bytes_out,
            connections=counted.connections,
            denied=dict(denied),
        )


class Worker:
    """One life. `run` returns when the daemon is gone or has said Stop; it raises what is a bug."""

    def __init__(self, channel: Channel, constructors: Mapping[str, Constructor]) -> None:
        self._channel = channel
        self._constructors = constructors
        self._offered: dict[str, Offered] = {}
        self._news: dict[type[wire.Message], wire.Printers | wire.Jobs] = {}  # the latest of each kind
        self._questions: dict[int, asyncio.Future[tuple[wire.ToWorker, int | None]]] = {}
        self._last_request = 0
        self._active = asyncio.Event()
        self._gone = False

    async def run(self) -> None:
        async with asyncio.TaskGroup() as self._tasks:
            counting = self._tasks.create_task(self._count())
            try:
                await self._listen()
                if not self._gone:
                    await self._stop()
            finally:
                counting.cancel()
                for offered in self._offered.values():
                    for task in (*offered.accepting, *offered.connections):
                        task.cancel()

    # ---- Link

    def next_request(self) -> int:
        self._last_request = self._last_request % (2**31 - 1) + 1
        return self._last_request

    def send(self, message: wire.Message) -> None:
        if self._gone:
            raise ConnectionAbortedError("the daemon is gone")
        self._channel.send(wire.put_message(message))

    async def ask(self, message: wire.Message) -> tuple[wire.ToWorker, int | None]:
        assert isinstance(message, wire.CreateJob | wire.OpenDocument | wire.CloseDocument | wire.CancelJob)
        if len(self._questions) >= MAX_QUESTIONS:
            raise AgentError(Reason.TOO_MANY, f"{MAX_QUESTIONS} questions to the daemon are unanswered")
        answer: asyncio.Future[tuple[wire.ToWorker, int | None]] = asyncio.get_running_loop().create_future()
        self._questions[message.request] = answer
        try:
            self.send(message)
            await asyncio.wait([answer])
        except asyncio.CancelledError:
            if answer.done() and not answer.exception() and (fd := answer.result()[1]) is not None:
                os.close(fd)
            raise
        finally:
            del self._questions[message.request]
        told, fd = answer.result()
        if isinstance(told, wire.Refused):
            raise AgentError(told.reason, told.message)
        return told, fd

    # ---- from the daemon

    async def _listen(self) -> None:
        """Do what the daemon says until Stop (returns) or until it is gone (then as well, with everything cut)."""
        while True:
            try:
                data, fds = await self._channel.receive()
            except (EOFError, ConnectionError):
                return self._daemon_is_gone()
            match wire.take_to_worker(data):
                case wire.Serve() as serve:
                    self._serve(serve, [socket.socket(fileno=fd) for fd in fds])
                    self.send(wire.Ready(service=serve.service))
                case wire.Printers() | wire.Jobs() as news:
                    self._news[type(news)] = news
                    for offered in self._offered.values():
                        offered.service.on_message(news)
                case wire.Ping():
                    self.send(wire.Pong())
                case wire.Stop():
                    return None
                case answer:
                    self._on_answer(answer, fds[0] if fds else None)

    def _on_answer(
        self, answer: wire.JobCreated | wire.DocumentOpened | wire.Done | wire.Refused, fd: int | None
    ) -> None:
        question = self._questions.get(answer.request)
        if question is not None and not question.done():
            question.set_result((answer, fd))
        elif fd is not None:
            os.close(fd)  # whoever asked has gone away

    def _serve(self, serve: wire.Serve, listeners: list[socket.socket]) -> None:
        offered = self._offered.get(serve.service)
        if offered is None:
            offered = self._offered[serve.service] = Offered(serve, self._constructors[serve.service](self, serve))
            for news in self._news.values():
                offered.service.on_message(news)
        for listener in listeners:
            listener.setblocking(False)
            offered.accepting.append(self._tasks.create_task(self._accept(offered, listener)))

    def _daemon_is_gone(self) -> None:
        self._gone = True
        for question in self._questions.values():
            if not question.done():
                question.set_exception(ConnectionAbortedError("the daemon is gone"))

    async def _stop(self) -> None:
        """Stop accepting and let connections finish what they have received already; all of them, if there is time."""
        busy: list[asyncio.Task[None]] = []
        for offered in self._offered.values():
            for task in offered.accepting:
                task.cancel()
            for task, sock in offered.connections.items():
                busy.append(task)
                try:
                    sock.shutdown(socket.SHUT_RD)  # what is in the buffer can still be read, then comes the end
                except OSError:
                    pass
        if busy:
            listening = self._tasks.create_task(self._listen())  # they may wait for answers
            await asyncio.wait(busy, timeout=STOP_GRACE_S)
            listening.cancel()
            self._tell_counters()

    # ---- connections

    async def _accept(self, offered: Offered, listener: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        with listener:
            while True:
                try:
                    sock, _ = await loop.sock_accept(listener)
                except OSError as error:
                    if error.errno not in OUT_OF_ROOM:
                        raise
                    offered.denied[Reason.TOO_MANY] += 1
                    self._active.set()
                    await asyncio.sleep(FULL_S)
                    continue
                if len(offered.connections) >= offered.serve.max_connections:
                    sock.close()
                    offered.denied[Reason.TOO_MANY] += 1
                else:
                    task = self._tasks.create_task(self._connection(offered, sock))
                    offered.connections[task] = sock
                    task.add_done_callback(offered.connections.pop)
                self._active.set()

    async def _connection(self, offered: Offered, sock: socket.socket) -> None:
        try:
            await offered.service.connection(sock)
        except Exception as error:
            offered.denied[Reason.INTERNAL] += 1
            complain(f"a connection to {offered.serve.service} failed", error)
        finally:
            sock.close()

    async def _count(self) -> None:
        """Once a second while there are connections, and once after the last, tell what has changed."""
        while True:
            await self._active.wait()
            await asyncio.sleep(COUNT_S)
            if not any(offered.connections for offered in self._offered.values()):
                self._active.clear()
            self._tell_counters()

    def _tell_counters(self) -> None:
        for offered in self._offered.values():
            counters = offered.counters()
            if counters != offered.told:
                try:
                    self.send(counters)
                except ConnectionError:
                    return  # _listen sees it too
                offered.told = counters


def complain(what: str, error: BaseException) -> None:
    """One line on standard error, which the zygote reads: where it happened and the exception. Opens no source file."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    where, trace = "", error.__traceback__
    while trace is not None:
        where = f"{PurePath(trace.tb_frame.f_code.co_filename).name}:{trace.tb_lineno}"
        trace = trace.tb_next
    try:
        os.write(2, f"{what}: {type(error).__name__} at {where}: {error}\n".encode(errors="replace"))
    except OSError:
        pass  # it has said too much already


async def _live(control: socket.socket, constructors: Mapping[str, Constructor]) -> None:
    channel = Channel(control)
    try:
        await Worker(channel, constructors).run()
    finally:
        channel.close()


def main(control: socket.socket, constructors: Mapping[str, Constructor]) -> int:
    """Live as a worker on a fresh event loop; returns the exit status."""
    try:
        asyncio.run(_live(control, constructors))
    except BaseException as error:
        complain("the worker has a bug", error)
        return EX_SOFTWARE
    return 0
