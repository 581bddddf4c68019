"""The worker in this process: what it does with what the daemon says. Its confinement is tests/host/test_zygote.py."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from nodeagent.errors import AgentError, Reason
from nodeagent.seats.worker import Worker, main
from nodeagent.transports.unix import Channel, listen
from nodeagent.wire import seat as wire
from tests.fakes.seat_services import Echo, Probe


class Daemon:
    """The daemon's end of a worker's control socket, and desktops that connect."""

    def __init__(self, channel: Channel, directory: Path) -> None:
        self.channel = channel
        self._directory = directory
        self._listeners: list[socket.socket] = []

    def serve(self, *names: str, service: str = "probe", max_connections: int = 2) -> None:
        listeners = [listen(self._directory, name) for name in names]
        self._listeners += listeners
        self.say(
            wire.Serve(
                service=service, desktop="a/b", max_document_bytes=1, max_connections=max_connections, idle_s=60.0
            ),
            *[s.fileno() for s in listeners],
        )

    def say(self, message: wire.Message, *fds: int) -> None:
        self.channel.send(wire.put_message(message), fds)

    async def hear(self) -> wire.FromWorker:
        async with asyncio.timeout(5):
            return wire.take_from_worker((await self.channel.receive())[0])

    async def connect(self, name: str = "a.sock") -> socket.socket:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        await asyncio.get_running_loop().sock_connect(sock, str(self._directory / name))
        return sock

    def close(self) -> None:
        self.channel.close()
        for listener in self._listeners:
            listener.close()


async def exchange(sock: socket.socket, data: bytes) -> bytes:
    loop = asyncio.get_running_loop()
    async with asyncio.timeout(5):
        await loop.sock_sendall(sock, data)
        return await loop.sock_recv(sock, 4096)


@asynccontextmanager
async def working(directory: Path) -> AsyncIterator[tuple[Daemon, asyncio.Task[None]]]:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    daemon, channel = Daemon(Channel(ours), directory), Channel(theirs)
    life = asyncio.ensure_future(Worker(channel, {"probe": Probe, "echo": Echo}).run())
    try:
        yield daemon, life
    finally:
        daemon.close()
        await asyncio.wait([life], timeout=5)
        channel.close()


async def test_serves_every_listener_of_a_service_and_says_ready_each_time(short_tmp: Path) -> None:
    async with working(short_tmp) as (daemon, _):
        daemon.serve("a.sock", "b.sock")
        assert await daemon.hear() == wire.Ready(service="probe")
        daemon.serve("c.sock")
        assert await daemon.hear() == wire.Ready(service="probe")
        for name in ("a.sock", "b.sock", "c.sock"):
            with await daemon.connect(name) as sock:
                assert await exchange(sock, b"socketpair") == b"ok"


async def test_counts_and_tells_once_a_second(short_tmp: Path) -> None:
    async with working(short_tmp) as (daemon, _):
        daemon.serve("a.sock", service="echo")
        await daemon.hear()
        with await daemon.connect() as sock:
            assert await exchange(sock, b"hello") == b"hello"
        assert await daemon.hear() == wire.Counters(service="echo", bytes_in=5, bytes_out=5, connections=1)


async def test_one_connection_too_many_is_closed_and_counted(short_tmp: Path) -> None:
    async with working(short_tmp) as (daemon, _):
        daemon.serve("a.sock", max_connections=2)
        await daemon.hear()
        first, second = await daemon.connect(), await daemon.connect()
        assert await exchange(first, b"socketpair") == await exchange(second, b"socketpair") == b"ok"
        with await daemon.connect() as third:
            assert await asyncio.get_running_loop().sock_recv(third, 1) == b""
        counters = await daemon.hear()
        assert isinstance(counters, wire.Counters) and counters.denied == {Reason.TOO_MANY: 1}
        first.close()
        assert await exchange(second, b"socketpair") == b"ok"
        second.close()


async def test_a_bug_in_one_connection_ends_only_that_connection(
    short_tmp: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    async with working(short_tmp) as (daemon, _):
        daemon.serve("a.sock")
        await daemon.hear()
        with await daemon.connect() as good, await daemon.connect() as bad:
            assert await exchange(good, b"socketpair") == b"ok"
            assert await exchange(bad, b"raise") == b""
            assert await exchange(good, b"socketpair") == b"ok"
            counters = await daemon.hear()
            assert isinstance(counters, wire.Counters) and counters.denied == {Reason.INTERNAL: 1}
    assert "connection to probe failed: ValueError at seat_services.py:" in capfd.readouterr().err


async def test_a_question_gets_its_answer_and_descriptor(short_tmp: Path) -> None:
    async with working(short_tmp) as (daemon, _):
        daemon.serve("a.sock")
        await daemon.hear()
        with await daemon.connect() as sock:
            asking = asyncio.ensure_future(exchange(sock, b"document"))
            create = await daemon.hear()
            assert isinstance(create, wire.CreateJob)
            daemon.say(wire.Done(request=create.request + 100))  # nobody asked
            daemon.say(wire.JobCreated(request=create.request, job=7))
            question = await daemon.hear()
            assert question == wire.OpenDocument(request=question.request, job=7)  # type: ignore[union-attr]
            with (short_tmp / "spool").open("wb") as file:
                daemon.say(wire.DocumentOpened(request=question.request), file.fileno())  # type: ignore[union-attr]
            assert await asking == b"ok"
            assert (short_tmp / "spool").read_bytes() == b"whole document"


async def test_a_refusal_is_the_agents_error_and_late_descriptors_are_closed(short_tmp: Path) -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    daemon, channel = Channel(ours), Channel(theirs)
    worker = Worker(channel, {})
    life = asyncio.ensure_future(worker.run())
    request = worker.next_request()
    asking = asyncio.ensure_future(worker.ask(wire.OpenDocument(request=request, job=1)))
    await daemon.receive()
    daemon.send(wire.put_message(wire.Refused(request=request, reason=Reason.NOT_YOURS, message="no")))
    with pytest.raises(AgentError, match="no") as caught:
        await asking
    assert caught.value.reason == Reason.NOT_YOURS

    request = worker.next_request()
    asking = asyncio.ensure_future(worker.ask(wire.OpenDocument(request=request, job=1)))
    await daemon.receive()
    asking.cancel()
    await asyncio.wait([asking])
    before = len(os.listdir("/proc/self/fd"))
    with open(os.devnull, "rb") as file:
        daemon.send(wire.put_message(wire.DocumentOpened(request=request)), [file.fileno()])
    asking = asyncio.ensure_future(worker.ask(wire.OpenDocument(request=worker.next_request(), job=1)))
    await daemon.receive()  # the worker has read everything before
    assert len(os.listdir("/proc/self/fd")) == before
    daemon.close()
    with pytest.raises(ConnectionError):
        await asking
    with pytest.raises(ConnectionError):
        worker.send(wire.Ready(service="x"))
    await life
    channel.close()


async def test_stop_lets_a_connection_finish_what_it_has_received(short_tmp: Path) -> None:
    async with working(short_tmp) as (daemon, life):
        daemon.serve("a.sock", max_connections=3)
        await daemon.hear()
        with await daemon.connect() as idle, await daemon.connect() as busy:
            assert await exchange(idle, b"socketpair") == b"ok"
            asking = asyncio.ensure_future(exchange(busy, b"document"))
            create = await daemon.hear()
            daemon.say(wire.Stop())
            assert await asyncio.get_running_loop().sock_recv(idle, 1) == b""
            daemon.say(wire.Refused(request=create.request, reason=Reason.INTERNAL, message="x"))  # type: ignore[union-attr]
            assert await asking == b""
            async with asyncio.timeout(5):
                await life
        daemon.close()  # its duplicate of the listener was the last
        with socket.socket(socket.AF_UNIX) as late, pytest.raises(ConnectionRefusedError):
            late.connect(str(short_tmp / "a.sock"))


async def test_the_end_of_the_daemon_ends_everything_at_once(short_tmp: Path) -> None:
    async with working(short_tmp) as (daemon, life):
        daemon.serve("a.sock")
        await daemon.hear()
        with await daemon.connect() as sock:
            assert await exchange(sock, b"socketpair") == b"ok"
            daemon.channel.close()
            assert await asyncio.get_running_loop().sock_recv(sock, 1) == b""
            async with asyncio.timeout(5):
                await life


async def test_news_that_came_before_the_service_reach_it(short_tmp: Path) -> None:
    made: list[Echo] = []

    class Noted(Echo):
        def __init__(self, *arguments: object) -> None:
            super().__init__(*arguments)  # type: ignore[arg-type]
            made.append(self)

    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    daemon, channel = Daemon(Channel(ours), short_tmp), Channel(theirs)
    life = asyncio.ensure_future(Worker(channel, {"probe": Noted}).run())
    daemon.say(wire.Printers(printers=()))
    daemon.say(wire.Jobs(jobs=()))
    daemon.say(wire.Jobs(jobs=(wire.Job(id=1, printer="p", title="t", state=3),)))
    daemon.serve("a.sock")
    await daemon.hear()
    daemon.serve("b.sock")
    await daemon.hear()
    assert len(made) == 1
    assert [type(m) for m in made[0].news] == [wire.Printers, wire.Jobs]
    assert made[0].news[1] == wire.Jobs(jobs=(wire.Job(id=1, printer="p", title="t", state=3),))
    daemon.close()
    await life
    channel.close()


def test_a_bug_of_the_service_itself_is_one_line_and_exit_70(capfd: pytest.CaptureFixture[str]) -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        ours.send(
            wire.put_message(
                wire.Serve(service="probe", desktop="a/b", max_document_bytes=1, max_connections=1, idle_s=1.0)
            )
        )
        ours.send(wire.put_message(wire.Jobs(jobs=())))
        assert main(theirs, {"probe": Probe}) == 70
    error = capfd.readouterr().err
    assert error.count("\n") == 1
    assert "RuntimeError at seat_services.py:" in error and "a bug of the service" in error
