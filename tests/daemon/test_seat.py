"""The daemon's side of a seat against a worker that lies: whatever it says, only itself is harmed."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from nodeagent.config import Config
from nodeagent.errors import AgentError, Reason
from nodeagent.metrics import Metrics
from nodeagent.model import Device, DeviceClass, Grant, Offer, PodRef, SeatState, UsbDevice
from nodeagent.seats import seat as seat_module
from nodeagent.seats.seat import Seat, SlotBinding, Surroundings
from nodeagent.seats.zygote import Exit
from nodeagent.transports.unix import Channel, listen
from nodeagent.wire import seat as wire
from tests.daemon.house import eventually


class FakeChild:
    """A worker that is a test: it dies when told to."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.dead: asyncio.Future[Exit] = asyncio.get_running_loop().create_future()

    async def wait(self) -> Exit:
        return await asyncio.shield(self.dead)

    def kill(self, number: int = 9) -> None:
        if not self.dead.done():
            self.dead.set_result(Exit(-number))


class FakeZygote:
    """Hands the worker's end of the control socket to the test."""

    def __init__(self) -> None:
        self.workers: list[tuple[FakeChild, Channel]] = []
        self.refuse = False

    async def spawn_worker(
        self, *, uid: int, cgroup_procs: Sequence[Path], control: socket.socket, **_: Any
    ) -> FakeChild:
        if self.refuse:
            raise AgentError(Reason.INTERNAL, "no room")
        child = FakeChild(1000 + len(self.workers))
        self.workers.append((child, Channel(control.dup())))
        return child


class FakeSpool:
    """Notes what it is asked; job 7 exists."""

    def __init__(self) -> None:
        self.asked: list[object] = []

    async def create(self, seat: str, message: wire.CreateJob) -> int:
        self.asked.append(message)
        return 7

    async def open_document(self, seat: str, job: int) -> int:
        if job != 7:
            raise AgentError(Reason.NOT_YOURS, f"no job {job}")
        return os.open("/dev/null", os.O_WRONLY)

    async def drop(self, seat: str, job: int, reason: Reason) -> None:
        self.asked.append((job, reason))

    def forget_incoming(self, seat: str) -> None:
        self.asked.append("forget")

    def set_printers(self, seat: str, printers: object) -> None:
        pass

    def jobs(self, seat: str) -> tuple[wire.Job, ...]:
        return ()


class FakeCgroup:
    procs = ()

    def oom_kills(self) -> int:
        return 0


OFFER = Offer(
    device=Device(id="printer-a", cls=DeviceClass.PRINTER, usb=UsbDevice(port="1-1", vendor=1, product=2, name="A")),
    rule="r",
    grant=Grant(services=("ipp",)),
)


class Scene:
    def __init__(self, directory: Path) -> None:
        self.zygote, self.spool, self.metrics = FakeZygote(), FakeSpool(), Metrics()
        around = Surroundings(
            zygote=self.zygote,  # type: ignore[arg-type]
            spool=self.spool,  # type: ignore[arg-type]
            metrics=self.metrics,
            config=Config(),
            printing=lambda _: [OFFER],
        )
        self.seat = Seat("u", PodRef("ns", "desk", "u"), 0x7000_0000, "gvisor", FakeCgroup(), around, 0.0)  # type: ignore[arg-type]
        self.listener = listen(directory, "ipp.sock")
        self.seat.join(
            SlotBinding(
                name="s",
                resource="r",
                ids=("printer-a",),
                directory=directory,
                container="c",
                listeners={"ipp": self.listener},
            )
        )

    async def worker(self, number: int = 0) -> Channel:
        """The nth worker's end, after it was told what to serve."""
        await eventually(lambda: len(self.zygote.workers) > number)
        channel = self.zygote.workers[number][1]
        printers, _ = await self.hear(channel)
        assert isinstance(printers, wire.Printers) and [p.name for p in printers.printers] == ["printer-a"]
        assert isinstance((await self.hear(channel))[0], wire.Jobs)
        serve, fds = await self.hear(channel)  # last: a client in the backlog must find its printers
        assert isinstance(serve, wire.Serve) and len(fds) == 1 and serve.desktop == "ns/desk"
        for fd in fds:
            os.close(fd)
        return channel

    @staticmethod
    async def hear(channel: Channel) -> tuple[wire.ToWorker, list[int]]:
        async with asyncio.timeout(5):
            data, fds = await channel.receive()
        return wire.take_to_worker(data), fds

    def die(self, number: int) -> None:
        child, channel = self.zygote.workers[number]
        channel.close()
        child.kill()


@asynccontextmanager
async def scene(directory: Path) -> AsyncIterator[Scene]:
    made = Scene(directory)
    life = asyncio.create_task(made.seat.run())
    try:
        yield made
    finally:
        for number in range(len(made.zygote.workers)):
            made.die(number)
        life.cancel()
        await asyncio.wait({life})
        assert made.seat.state is SeatState.CLOSED
        assert made.listener.fileno() == -1


def restarts(made: Scene, reason: str) -> float:
    return made.metrics.registry.get_sample_value("nodeagent_seat_worker_restarts_total", {"reason": reason}) or 0.0


async def test_ready_makes_it_live(short_tmp: Path) -> None:
    async with scene(short_tmp) as made:
        channel = await made.worker()
        assert made.seat.state is SeatState.BOUND
        channel.send(wire.put_message(wire.Ready(service="ipp")))
        await eventually(made.seat.live.is_set)
        assert made.seat.state is SeatState.LIVE and made.seat.worker_pid == 1000


async def test_a_dead_worker_is_replaced_and_its_half_jobs_forgotten(short_tmp: Path) -> None:
    async with scene(short_tmp) as made:
        await made.worker()
        made.die(0)
        await made.worker(1)
        assert restarts(made, "exit") == 1
        assert "forget" in made.spool.asked


@pytest.mark.parametrize(
    "said", [b"\xff", b"\x80", b"\x81\xa4type\xa5Serve", wire.put_message(wire.Stop()), b"\x81\xa4type\xa1\xff"]
)
async def test_a_worker_that_breaks_the_protocol_is_replaced(short_tmp: Path, said: bytes) -> None:
    async with scene(short_tmp) as made:
        channel = await made.worker()
        channel.send(said)
        await eventually(lambda: restarts(made, "protocol") == 1)


async def test_a_worker_that_does_not_answer_is_replaced(short_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(seat_module, "PING_S", 0.02)
    monkeypatch.setattr(seat_module, "HUNG_S", 0.3)
    async with scene(short_tmp) as made:
        channel = await made.worker()
        for _ in range(3):
            assert (await made.hear(channel))[0] == wire.Ping()
            channel.send(wire.put_message(wire.Pong()))
        assert restarts(made, "hung") == 0
        await eventually(lambda: restarts(made, "hung") == 1)


async def test_only_printers_and_jobs_of_the_seat(short_tmp: Path) -> None:
    async with scene(short_tmp) as made:
        channel = await made.worker()
        channel.send(wire.put_message(wire.CreateJob(request=1, printer="printer-b", title="x")))
        answer, _ = await made.hear(channel)
        assert isinstance(answer, wire.Refused) and answer.reason is Reason.NOT_YOURS and not made.spool.asked
        channel.send(wire.put_message(wire.CreateJob(request=2, printer="printer-a", title="x")))
        assert (await made.hear(channel))[0] == wire.JobCreated(request=2, job=7)
        channel.send(wire.put_message(wire.OpenDocument(request=3, job=7)))
        answer, fds = await made.hear(channel)
        assert answer == wire.DocumentOpened(request=3) and len(fds) == 1
        os.close(fds[0])
        channel.send(wire.put_message(wire.OpenDocument(request=4, job=8)))
        answer, fds = await made.hear(channel)
        assert isinstance(answer, wire.Refused) and fds == []
        channel.send(wire.put_message(wire.DropDocument(job=7, reason=Reason.TOO_LARGE)))
        await eventually(lambda: (7, Reason.TOO_LARGE) in made.spool.asked)


async def test_descriptors_from_a_worker_are_closed(short_tmp: Path) -> None:
    async with scene(short_tmp) as made:
        channel = await made.worker()
        with (short_tmp / "x").open("wb") as file:
            channel.send(wire.put_message(wire.Ready(service="ipp")), [file.fileno()])
            await eventually(made.seat.live.is_set)
            inode = os.fstat(file.fileno()).st_ino
        held = [
            os.readlink(f"/proc/self/fd/{fd}")
            for fd in os.listdir("/proc/self/fd")
            if os.path.exists(f"/proc/self/fd/{fd}")
        ]
        assert str(short_tmp / "x") not in held and inode


async def test_counters_add_up_over_lives_and_never_go_back(short_tmp: Path) -> None:
    async with scene(short_tmp) as made:
        channel = await made.worker()

        def count(bytes_in: int, denied: int) -> bytes:
            return wire.put_message(wire.Counters(service="ipp", bytes_in=bytes_in, denied={Reason.NOT_YOURS: denied}))

        for bytes_in, denied in ((100, 2), (50, 1), (150, 3)):
            channel.send(count(bytes_in, denied))
        channel.send(wire.put_message(wire.Counters(service="pcsc", bytes_in=10**9)))
        channel.send(wire.put_message(wire.Ready(service="ipp")))
        await eventually(made.seat.live.is_set)
        assert made.seat.moved_bytes[0] == 150 and made.seat.denied[Reason.NOT_YOURS] == 3
        made.die(0)
        channel = await made.worker(1)
        before = made.seat.denied[Reason.NOT_YOURS]
        channel.send(count(10, 1))
        channel.send(wire.put_message(wire.Ready(service="ipp")))
        await eventually(made.seat.live.is_set)
        assert made.seat.denied[Reason.NOT_YOURS] == before + 1
        assert made.metrics.registry.get_sample_value(
            "nodeagent_seat_bytes_total", {"service": "pcsc", "direction": "in"}
        ) is None  # fmt: skip


async def test_a_zygote_that_cannot_fork_is_asked_again(short_tmp: Path) -> None:
    made = Scene(short_tmp)
    made.zygote.refuse = True
    life = asyncio.create_task(made.seat.run())
    await eventually(lambda: restarts(made, "spawn") >= 1)
    made.zygote.refuse = False
    await made.worker()
    made.die(0)
    life.cancel()
    await asyncio.wait({life})
