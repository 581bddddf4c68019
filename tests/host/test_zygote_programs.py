"""Programs of the zygote: alone in their namespaces, under a seat's uid, and never left behind."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import pytest

from nodeagent.errors import AgentError, Reason
from nodeagent.seats.cgroups import CgroupLimits, SeatCgroups
from nodeagent.seats.zygote import Child, Limits, Zygote
from tests.leftovers import process

pytestmark = pytest.mark.root

UID = 0x7100_0200
ENV = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin"}
SANS = Limits()


@pytest.fixture
async def zygote() -> AsyncIterator[Zygote]:
    async with Zygote(services={}) as zygote:
        yield zygote


@pytest.fixture
async def cgroups() -> AsyncIterator[SeatCgroups]:
    cgroups = SeatCgroups(name=f"nodeagent-test-{os.getpid()}")
    await cgroups.prepare()
    yield cgroups
    await cgroups.remove()


class Running:
    """A program with its output (both streams) on a pipe."""

    def __init__(self, child: Child, reader: asyncio.StreamReader, transport: asyncio.ReadTransport) -> None:
        self.child, self.reader, self._transport = child, reader, transport

    async def finish(self) -> tuple[int, str]:
        """Exit code and everything it wrote."""
        async with asyncio.timeout(20):
            text = (await self.reader.read()).decode()
            code = (await self.child.wait()).code
        self._transport.close()
        return code, text


async def start(
    zygote: Zygote,
    *argv: str,
    uid: int | None = UID,
    procs: Sequence[Path] = (),
    stdin: str = os.devnull,
    network: bool = False,
    tmp: int = 1 << 20,
    hidden: Sequence[str] = (),
    limits: Limits = SANS,
) -> Running:
    out, out_in = os.pipe()
    try:
        with open(stdin, "rb") as file:
            child = await zygote.spawn_program(
                argv, uid=uid, cgroup_procs=procs, stdin=file.fileno(), stdout=out_in, stderr=out_in, env=ENV,
                network=network, private_tmp_bytes=tmp, hidden=hidden, limits=limits,
            )  # fmt: skip
    except BaseException:
        os.close(out)
        raise
    finally:
        os.close(out_in)
    reader = asyncio.StreamReader()
    transport, _ = await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(reader), os.fdopen(out, "rb")
    )
    return Running(child, reader, transport)


async def shell(zygote: Zygote, script: str, **options: object) -> tuple[int, str]:
    return await (await start(zygote, "/bin/sh", "-c", script, **options)).finish()  # type: ignore[arg-type]


async def test_a_seats_program_has_given_up_everything(zygote: Zygote) -> None:
    code, text = await shell(zygote, "cat /proc/self/status; umask; pwd; env")
    assert code == 0
    now = {key: value.split() for key, _, value in (line.partition(":") for line in text.splitlines())}
    assert now["Uid"] == now["Gid"] == [str(UID)] * 4
    assert now["Groups"] == []
    for kind in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"):
        assert int(now[kind][0], 16) == 0, kind
    assert (now["NoNewPrivs"], now["Seccomp"]) == (["1"], ["2"])
    assert int(now["SigBlk"][0], 16) == 0
    assert int(now["SigIgn"][0], 16) & ~(3 << 31) == 0  # but for two that belong to the C library
    assert text.splitlines()[-4:-1] == ["0077", "/", f"PATH={ENV['PATH']}"] or "PWD=/" in text


async def test_it_sees_no_process_and_no_descriptor_but_its_own(zygote: Zygote) -> None:
    code, text = await shell(zygote, "echo $$ /proc/[0-9]*; exec ls /proc/self/fd")
    assert code == 0
    assert text.split() == ["2", "/proc/1", "/proc/2", "0", "1", "2", "3"]  # init and the shell; 3 is what ls reads


async def test_hidden_directories_are_empty_and_closed(zygote: Zygote) -> None:
    code, text = await shell(
        zygote, "ls /var/lib; cat /etc/apt/sources.list; ls /usr | wc -l", hidden=("/var/lib", "/etc/apt", "/no")
    )
    assert code == 0
    assert text.count("Permission denied") == 2 and int(text.splitlines()[-1]) > 3
    assert os.listdir("/var/lib")


LOOK_AT_NETWORK = """
import fcntl, socket, struct
print([name for _, name in socket.if_nameindex()])
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
    flags, = struct.unpack("16xH", fcntl.ioctl(s, 0x8913, struct.pack("16sH", b"lo", 0)))  # SIOCGIFFLAGS
print("up" if flags & 1 else "down")
"""


async def test_without_network_there_is_only_lo_and_it_is_down(zygote: Zygote) -> None:
    running = await start(zygote, "/usr/bin/python3", "-c", LOOK_AT_NETWORK, uid=None)
    assert await running.finish() == (0, "['lo']\ndown\n")
    code, text = await shell(zygote, "cat /proc/net/dev; readlink /proc/self/ns/net /proc/self/ns/ipc")
    assert code == 0
    assert [line.split(":")[0].strip() for line in text.splitlines() if ":" in line][:1] == ["lo"]
    assert not {os.readlink("/proc/self/ns/net"), os.readlink("/proc/self/ns/ipc")} & set(text.split())
    code, text = await shell(zygote, "readlink /proc/self/ns/net", network=True)
    assert text.strip() == os.readlink("/proc/self/ns/net")


TRY = r"""
use strict; use Errno; use Socket;
sub tried { my ($result) = @_; print defined $result && $result ne -1 ? "ok" : (grep { $!{$_} } "EPERM", "EACCES")[0], "\n" }
tried(socket(my $unix, PF_UNIX, SOCK_STREAM, 0));
tried(socket(my $inet, PF_INET, SOCK_STREAM, 0));
tried(open(my $memory, "<", "/proc/1/mem"));
tried(open(my $worker, "<", "/etc/shadow"));
tried(kill(9, 1));
chroot("/") or tried(undef);
"""


async def test_what_a_seats_program_is_refused(zygote: Zygote) -> None:
    code, text = await (await start(zygote, "perl", "-e", TRY)).finish()
    # Signal 9 to process 1 is allowed and then ignored by the kernel (pid_namespaces(7)): the script goes on.
    assert (code, text.split()) == (0, ["EPERM", "EPERM", "EACCES", "EACCES", "ok", "EPERM"])
    code, text = await shell(zygote, "unshare --user true || setpriv --reuid 0 true || echo refused")
    assert code == 0 and text.endswith("refused\n")


async def test_its_tmp_is_its_own_small_and_gone_with_it(zygote: Zygote) -> None:
    name = f"nodeagent-{os.getpid()}"
    script = f"for d in /tmp /var/tmp /dev/shm; do echo x > $d/{name}.$$ || exit 9; done; ls /tmp"
    code, text = await shell(zygote, script)
    assert (code, text) == (0, f"{name}.2\n")
    for directory in ("/tmp", "/var/tmp", "/dev/shm"):
        assert not list(Path(directory).glob(f"{name}*"))
    code, text = await shell(zygote, "head -c 2000000 /dev/zero > /tmp/x; wc -c < /tmp/x")
    assert "No space left on device" in text and text.endswith("1048576\n")


async def test_a_program_of_root_keeps_its_rights_but_not_its_neighbours(zygote: Zygote) -> None:
    code, text = await shell(zygote, "id -u; echo $$; grep -E 'CapEff|Seccomp:' /proc/self/status", uid=None, tmp=0)
    ours = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("CapEff"))
    assert (code, text.splitlines()) == (0, ["0", "2", ours, "Seccomp:\t0"])


async def test_exit_codes_and_signals(zygote: Zygote) -> None:
    assert await shell(zygote, "exit 37") == (37, "")
    assert await shell(zygote, "kill -SEGV $$") == (-signal.SIGSEGV, "")
    running = await start(zygote, "sleep", "60")
    running.child.kill(signal.SIGTERM)
    assert await running.finish() == (-signal.SIGTERM, "")
    running = await start(
        zygote, "/bin/sh", "-c", "trap 'echo again' HUP; echo once; while :; do read x; sleep 0.01; done"
    )
    assert await running.reader.readline() == b"once\n"
    running.child.kill(signal.SIGHUP)
    assert await running.reader.readline() == b"again\n"
    running.child.kill()
    assert await running.finish() == (-signal.SIGKILL, "")


async def test_nothing_it_started_outlives_it(zygote: Zygote) -> None:
    running = await start(
        zygote, "/bin/sh", "-c", "setsid sleep 611 & setsid sleep 612 & sleep 0.05; echo done; exit 5"
    )
    assert await running.finish() == (5, "done\n")  # the pipe has ended, so nobody holds it any more
    assert not sleeping("611", "612")
    running = await start(zygote, "/bin/sh", "-c", "setsid sleep 613 & echo started; wait")
    assert await running.reader.readline() == b"started\n"
    running.child.kill()
    assert await running.finish() == (-signal.SIGKILL, "")
    assert not sleeping("613")


def sleeping(*seconds: str) -> list[int]:
    pids = [int(entry) for entry in os.listdir("/proc") if entry.isdigit()]
    return [pid for pid in pids if process(pid)[2] in {f"sleep {s}" for s in seconds}]


async def test_limits_kill(zygote: Zygote, tmp_path: Path) -> None:
    code, _ = await shell(zygote, "while :; do :; done", limits=Limits(cpu_s=1))
    assert code == -signal.SIGXCPU
    code, text = await shell(zygote, "trap '' XCPU; while :; do :; done", limits=Limits(cpu_s=1))
    assert code == -signal.SIGKILL
    code, text = await shell(zygote, "exec head -c 5000 /dev/zero > /tmp/x", limits=Limits(file_bytes=4096))
    assert code == -signal.SIGXFSZ
    code, text = await shell(zygote, "ulimit -n; ulimit -c", limits=Limits(files=17))
    assert text.split() == ["17", "0"]


async def test_memory_and_processes_are_limited_by_the_cgroup(zygote: Zygote, cgroups: SeatCgroups) -> None:
    group = cgroups.create("filters", CgroupLimits(memory_bytes=40 << 20, pids=12, cpu_cores=1.0))
    code, _ = await shell(zygote, "head -c 200000000 /dev/zero | tail -c 200000000", procs=group.procs)
    assert code == 128 + signal.SIGKILL and group.oom_kills() == 1
    code, text = await shell(zygote, "for i in $(seq 30); do sleep 60 & done; wait", procs=group.procs)
    assert code != 0 and "fork" in text.lower()
    running = await start(
        zygote, "/bin/sh", "-c", "for i in 1 2 3; do setsid sleep 60 & done; echo up; wait", procs=group.procs
    )
    assert await running.reader.readline() == b"up\n"
    await group.destroy()
    assert await running.finish() == (-signal.SIGKILL, "")


@pytest.mark.parametrize(
    ("argv", "options", "cause"),
    [
        (["/no/such/filter"], {}, "cannot execute /no/such/filter: No such file or directory"),
        (["no-such-filter"], {}, "cannot execute no-such-filter: No such file or directory"),
        (["/etc/passwd"], {}, "cannot execute /etc/passwd: Permission denied"),
        (
            ["true"],
            {"procs": [Path("/nowhere/cgroup.procs")]},
            r"cannot join cgroup /nowhere/cgroup\.procs: No such file",
        ),
        (["a\0b"], {}, "embedded null"),
        ([], {}, "length >= 1"),
    ],
)
async def test_what_cannot_start_says_why(
    zygote: Zygote, argv: list[str], options: dict[str, list[Path]], cause: str
) -> None:
    with pytest.raises(AgentError, match=cause) as caught:
        await start(zygote, *argv, procs=options.get("procs", []))
    assert caught.value.reason == Reason.UPSTREAM_UNAVAILABLE
    assert await shell(zygote, "exit 3") == (3, "")


async def test_a_hundred_programs_leave_nothing(zygote: Zygote) -> None:
    assert await shell(zygote, "exit 0") == (0, "")
    before = len(os.listdir(f"/proc/{zygote.pid}/fd")), len(os.listdir("/proc/self/fd"))
    for _ in range(10):
        assert await asyncio.gather(*(shell(zygote, "exit 4") for _ in range(10))) == [(4, "")] * 10
    assert (len(os.listdir(f"/proc/{zygote.pid}/fd")), len(os.listdir("/proc/self/fd"))) == before
    assert Path(f"/proc/{zygote.pid}/task/{zygote.pid}/children").read_text() == ""


async def test_the_stock_filters_work_under_all_this(zygote: Zygote, cgroups: SeatCgroups, tmp_path: Path) -> None:
    group = cgroups.create("gs", CgroupLimits(memory_bytes=384 << 20, pids=64, cpu_cores=2.0))
    (tmp_path / "page.ps").write_text("%!PS\n/Helvetica 20 selectfont 72 72 moveto (hello) show showpage\n")
    argv = ["gs", "-q", "-dSAFER", "-dBATCH", "-dNOPAUSE", "-sDEVICE=pdfwrite", "-sOutputFile=%stdout", "-"]
    out, out_in = os.pipe()
    with open(tmp_path / "page.ps", "rb") as page, open(tmp_path / "page.pdf", "wb") as pdf:
        os.close(out)
        os.close(out_in)
        child = await zygote.spawn_program(
            argv, uid=UID, cgroup_procs=group.procs, stdin=page.fileno(), stdout=pdf.fileno(), stderr=2, env=ENV,
            network=False, private_tmp_bytes=64 << 20, limits=Limits(cpu_s=30, file_bytes=64 << 20),
        )  # fmt: skip
        async with asyncio.timeout(30):
            assert (await child.wait()).code == 0
    assert (tmp_path / "page.pdf").read_bytes().startswith(b"%PDF-")
    await group.destroy()
