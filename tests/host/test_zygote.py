"""Real seat workers: forked, confined, limited, and gone when they should be. Programs: tests/host/test_zygote_programs.py."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from nodeagent.errors import AgentError, Reason
from nodeagent.seats.cgroups import CgroupLimits, SeatCgroups
from nodeagent.seats.zygote import Child, Limits, Zygote
from nodeagent.transports.unix import Channel, listen
from nodeagent.wire import seat as wire
from tests.leftovers import process

pytestmark = pytest.mark.root

ROOT = Path(__file__).resolve().parents[2]
SERVICES = {"probe": "tests.fakes.seat_services:Probe", "echo": "tests.fakes.seat_services:Echo"}
UID = 0x7100_0100


@pytest.fixture
async def zygote() -> AsyncIterator[Zygote]:
    async with Zygote(services=SERVICES) as zygote:
        yield zygote


@pytest.fixture
async def cgroups() -> AsyncIterator[SeatCgroups]:
    cgroups = SeatCgroups(name=f"nodeagent-test-{os.getpid()}")
    await cgroups.prepare()
    yield cgroups
    await cgroups.remove()


class Seat:
    """The daemon's side of one worker that serves one socket."""

    def __init__(self, child: Child, channel: Channel, listener: socket.socket, path: Path) -> None:
        self.child, self.channel, self.listener, self.path = child, channel, listener, path

    @classmethod
    async def start(
        cls, zygote: Zygote, directory: Path, number: int = 0, procs: tuple[Path, ...] = (), service: str = "probe"
    ) -> Seat:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            child = await zygote.spawn_worker(
                uid=UID + number, cgroup_procs=procs, control=theirs, name=f"seat-{number}"
            )
        seat = cls(child, Channel(ours), listen(directory, f"{number}.sock"), directory / f"{number}.sock")
        seat.say(
            wire.Serve(service=service, desktop="a/b", max_document_bytes=1, max_connections=4, idle_s=60.0),
            seat.listener.fileno(),
        )
        async with asyncio.timeout(5):
            data, _ = await seat.channel.receive()
        assert wire.take_from_worker(data) == wire.Ready(service=service)
        return seat

    def say(self, message: wire.Message, *fds: int) -> None:
        self.channel.send(wire.put_message(message), fds)

    async def do(self, deed: str) -> str:
        """Have the worker do it; the empty string when it died of it."""
        loop = asyncio.get_running_loop()
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as sock:
            async with asyncio.timeout(20):
                await loop.sock_connect(sock, str(self.path))
                await loop.sock_sendall(sock, deed.encode())
                try:
                    return (await loop.sock_recv(sock, 100)).decode()
                except ConnectionResetError:
                    return ""

    def close(self) -> None:
        self.channel.close()
        self.listener.close()


async def code(child: Child) -> int:
    async with asyncio.timeout(10):
        return (await child.wait()).code


def status(pid: int) -> dict[str, str]:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {key: value.strip() for key, _, value in (line.partition(":") for line in lines)}


def descriptors(pid: int) -> dict[int, str]:
    found = {}
    for fd in os.listdir(f"/proc/{pid}/fd"):
        with contextlib.suppress(FileNotFoundError):  # our own look at it
            found[int(fd)] = os.readlink(f"/proc/{pid}/fd/{fd}")
    return found


async def test_a_worker_has_given_up_everything(zygote: Zygote, short_tmp: Path) -> None:
    seat = await Seat.start(zygote, short_tmp)
    now = status(seat.child.pid)
    assert now["Uid"].split() == now["Gid"].split() == [str(UID)] * 4
    assert now["Groups"] == ""
    for kind in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"):
        assert int(now[kind], 16) == 0, kind
    assert (now["NoNewPrivs"], now["Seccomp"], now["Threads"]) == ("1", "2", "1")
    limits = Path(f"/proc/{seat.child.pid}/limits").read_text()
    assert [line.split()[-3:-1] for line in limits.splitlines() if "core" in line] == [["0", "0"]]
    assert [line.split()[3:5] for line in limits.splitlines() if "open files" in line] == [["4096", "4096"]]
    assert Path(f"/proc/{seat.child.pid}/environ").stat().st_uid == 0  # not dumpable: closed to its own uid
    seat.close()
    assert await code(seat.child) == 0


async def test_a_worker_has_only_the_descriptors_of_its_seat(zygote: Zygote, short_tmp: Path) -> None:
    other = await Seat.start(zygote, short_tmp, 1)
    seat = await Seat.start(zygote, short_tmp, 0)
    found = descriptors(seat.child.pid)
    kinds = sorted(target.partition(":")[0] for target in found.values())
    # null, the pipe of stderr twice; control, the listener and asyncio's own pair; epoll
    assert kinds == ["/dev/null", "anon_inode", "pipe", "pipe", "socket", "socket", "socket", "socket"]
    assert found[0] == "/dev/null" and found[1] == found[2]
    assert not set(found.values()) - {"/dev/null", "anon_inode:[eventpoll]"} & set(
        descriptors(other.child.pid).values()
    )
    for one in (seat, other):
        one.close()
        assert await code(one.child) == 0


async def test_what_the_filter_refuses(zygote: Zygote, short_tmp: Path) -> None:
    seat = await Seat.start(zygote, short_tmp)
    refused = (
        *(
            "socket-unix",
            "socket-inet",
            "open-read",
            "open-write",
            "listdir",
            "unlink",
            "fork",
            "kill-parent",
            "kill-init",
        ),
        *("map-code", "prctl"),
    )
    assert {deed: await seat.do(deed) for deed in refused} == dict.fromkeys(refused, "EPERM")
    assert await seat.do("thread") == "RuntimeError"
    assert await seat.do("import") in ("EPERM", "ModuleNotFoundError")
    assert await seat.do("socketpair") == "ok"
    seat.close()
    assert await code(seat.child) == 0


@pytest.mark.parametrize("deed", ["execve", "ptrace", "mount", "unshare", "setuid"])
async def test_what_only_an_attacker_tries_kills_the_worker(zygote: Zygote, short_tmp: Path, deed: str) -> None:
    seat = await Seat.start(zygote, short_tmp)
    assert await seat.do(deed) == ""
    assert await code(seat.child) == -signal.SIGSYS
    seat.close()


async def test_a_worker_that_eats_memory_dies_alone(zygote: Zygote, cgroups: SeatCgroups, short_tmp: Path) -> None:
    assert "memory" not in cgroups.missing
    limits = CgroupLimits(memory_bytes=48 << 20, pids=16, cpu_cores=1.0)
    groups = [cgroups.create(name, limits) for name in ("hungry", "modest")]
    hungry, modest = [await Seat.start(zygote, short_tmp, n, group.procs) for n, group in enumerate(groups)]
    assert await hungry.do("eat") == ""
    assert await code(hungry.child) == -signal.SIGKILL
    assert [group.oom_kills() for group in groups] == [1, 0]
    assert await modest.do("socketpair") == "ok"
    for seat in (hungry, modest):
        seat.close()
    await modest.child.wait()
    for group in groups:
        await group.destroy()


async def test_stop_and_kill(zygote: Zygote, short_tmp: Path) -> None:
    first, second = await Seat.start(zygote, short_tmp, 0), await Seat.start(zygote, short_tmp, 1)
    first.say(wire.Stop())
    assert await code(first.child) == 0
    second.child.kill(signal.SIGTERM)  # a service manager that signals everybody: the daemon alone says when it is over
    assert await second.do("socketpair") == "ok"
    second.child.kill()
    assert await code(second.child) == -signal.SIGKILL
    second.child.kill()
    first.close()
    second.close()


async def test_what_a_worker_says_reaches_the_log_in_pieces_that_fit(
    zygote: Zygote, short_tmp: Path, caplog: pytest.LogCaptureFixture
) -> None:
    seat = await Seat.start(zygote, short_tmp)
    assert await seat.do("raise") == ""
    seat.say(wire.Jobs(jobs=()))
    assert await code(seat.child) == 70
    seat.close()
    lines = [record.getMessage() for record in caplog.records if record.name == "nodeagent.seats.zygote"]
    assert lines[0].startswith("worker seat-0: a connection to probe failed: ValueError at seat_services.py:")
    assert "asked ?[31m" in lines[1]  # the escape sequence is taken out of its teeth
    assert "the worker has a bug: RuntimeError" in lines[2]


async def test_a_worker_that_talks_too_much_is_not_listened_to_any_more(
    zygote: Zygote, short_tmp: Path, caplog: pytest.LogCaptureFixture
) -> None:
    seat = await Seat.start(zygote, short_tmp)
    for _ in range(3):
        assert await seat.do("chatter") == "ok"
    seat.close()
    assert await code(seat.child) == 0
    lines = [record.getMessage() for record in caplog.records if record.name == "nodeagent.seats.zygote"]
    assert 50 < len(lines) < 250
    assert lines[0] == "worker seat-0: line 0"


async def test_a_worker_that_cannot_be_confined_is_refused_with_the_cause(zygote: Zygote) -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        with pytest.raises(
            AgentError, match=r"worker x: cannot join cgroup /nowhere/cgroup\.procs: No such file"
        ) as caught:
            await zygote.spawn_worker(uid=UID, cgroup_procs=(Path("/nowhere/cgroup.procs"),), control=theirs, name="x")
        assert caught.value.reason == Reason.INTERNAL
        with pytest.raises(AgentError, match="uid"):
            await zygote.spawn_worker(uid=0, cgroup_procs=(), control=theirs, name="x")
        with pytest.raises(AgentError, match="over 65536"):
            await zygote.spawn_worker(uid=UID, cgroup_procs=(), control=theirs, name="x" * 70_000)
        theirs.close()
        with pytest.raises(AgentError):
            await zygote.spawn_worker(uid=UID, cgroup_procs=(), control=theirs, name="x")


async def test_a_hundred_workers_leave_no_descriptor_and_no_process(zygote: Zygote) -> None:
    async def one() -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            child = await zygote.spawn_worker(uid=UID, cgroup_procs=(), control=theirs, name="x")
        ours.close()
        assert await code(child) == 0

    await one()
    before = descriptors(zygote.pid), descriptors(os.getpid())
    for _ in range(10):
        await asyncio.gather(*(one() for _ in range(10)))
    assert len(descriptors(zygote.pid)) == len(before[0])
    assert len(descriptors(os.getpid())) == len(before[1])
    assert Path(f"/proc/{zygote.pid}/task/{zygote.pid}/children").read_text() == ""
    assert zygote._children == {}


async def test_idle_workers_share_the_memory_of_the_zygote(zygote: Zygote, short_tmp: Path) -> None:
    seats = [await Seat.start(zygote, short_tmp, number, service="echo") for number in range(8)]
    unique_kib = sorted(unique_memory_kib(seat.child.pid) for seat in seats)
    assert unique_kib[-1] <= 6 << 10, unique_kib
    for seat in seats:
        seat.close()
        await code(seat.child)


def unique_memory_kib(pid: int) -> int:
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith(("Private_Clean:", "Private_Dirty:")))


async def test_a_zygote_that_dies_takes_its_workers_and_everybody_is_told(short_tmp: Path) -> None:
    async with Zygote(services=SERVICES) as zygote:
        seat = await Seat.start(zygote, short_tmp)
        os.kill(zygote.pid, signal.SIGKILL)
        assert await code(seat.child) == -signal.SIGKILL
        with pytest.raises(AgentError, match="lost"):
            await zygote.run()
        async with asyncio.timeout(5):
            with pytest.raises(EOFError):
                await seat.channel.receive()
        seat.close()
        with pytest.raises(AgentError, match="cannot start true"):
            await zygote.spawn_program(
                ["true"], uid=None, cgroup_procs=(), stdin=0, stdout=1, stderr=2, env={}, network=True
            )
        seat.child.kill()


async def test_leaving_the_zygote_ends_its_children(short_tmp: Path) -> None:
    async with Zygote(services=SERVICES) as zygote:
        seat = await Seat.start(zygote, short_tmp)
    assert await code(seat.child) == -signal.SIGKILL
    assert not Path(f"/proc/{seat.child.pid}").exists()
    seat.close()


async def test_a_zygote_that_cannot_load_a_service_says_so() -> None:
    with pytest.raises(AgentError, match="zygote cannot work: ModuleNotFoundError: No module named 'nodeagent"):
        async with Zygote(services={"x": "nodeagent.nothing:X"}):
            pass


async def test_without_its_seccomp_profile_there_is_no_zygote(tmp_path: Path) -> None:
    with pytest.raises(AgentError, match=r"zygote cannot work: FileNotFoundError.*seat-worker\.json"):
        async with Zygote(services=SERVICES, seccomp_dir=tmp_path):
            pass


async def test_the_zygote_starts_fast() -> None:
    before = time.perf_counter()
    async with Zygote(services=SERVICES):
        assert time.perf_counter() - before < 2  # measured: 0.09 s; the bound is for a busy machine


def test_the_zygote_imports_nothing_heavy() -> None:
    script = (
        "import sys; import nodeagent.seats.zygote, nodeagent.seats.spawner; from nodeagent.services import *;"
        "from nodeagent.services import SEAT_SERVICES, seat_service; [seat_service(n) for n in SEAT_SERVICES];"
        "print({m.partition('.')[0] for m in sys.modules} & {'grpc', 'google', 'aiohttp', 'kubernetes', 'yaml', 'sqlite3'})"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("set()\n", "")


# ---- the end of the daemon


@pytest.fixture(params=[[], ["unshare", "--pid", "--fork"]], ids=["host pids", "own pid namespace"])
def doomed(request: pytest.FixtureRequest) -> Iterator[int]:
    """A daemon of its own with a zygote, workers and programs; the pid to kill."""
    outer = subprocess.Popen(
        [*request.param, sys.executable, "-m", "tests.fakes.zygote_daemon"],
        cwd=ROOT, stdout=subprocess.PIPE, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    assert outer.stdout is not None
    pid = outer.pid
    try:
        assert outer.stdout.readline() == b"ready\n"
        pid = children_of(outer.pid)[0] if request.param else outer.pid
        yield pid
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        outer.kill()
        outer.wait()
        outer.stdout.close()


def children_of(pid: int) -> list[int]:
    return [int(e) for e in os.listdir("/proc") if e.isdigit() and process(int(e))[1] == pid]


def descendants_of(pid: int) -> set[int]:
    below = children_of(pid)
    return set(below).union(*(descendants_of(child) for child in below))


@pytest.mark.parametrize("victim", ["daemon", "zygote"])
def test_nothing_outlives_a_daemon_that_is_killed(doomed: int, victim: str) -> None:
    family = descendants_of(doomed)
    # zygote, 2 workers, and twice an init with a shell and two sleeping children
    assert len(family) == 1 + 2 + 2 * 4, [process(pid) for pid in family]
    (zygote,) = children_of(doomed)
    os.kill(doomed if victim == "daemon" else zygote, signal.SIGKILL)
    deadline = time.monotonic() + 1
    while alive := [process(pid) for pid in family if process(pid)[0] not in ("", "Z")]:
        assert time.monotonic() < deadline, alive
        time.sleep(0.01)


def test_limits_are_frozen() -> None:
    with pytest.raises(AttributeError):
        Limits().files = 1  # type: ignore[misc]
