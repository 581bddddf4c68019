"""Seat cgroups on the real cgroup file systems of this machine, v1, v2 or both."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
from pathlib import Path

import pytest

from nodeagent.errors import AgentError
from nodeagent.seats import cgroups as module
from nodeagent.seats.cgroups import CgroupLimits, Hierarchy, SeatCgroup, SeatCgroups, find

pytestmark = pytest.mark.root

LIMITS = CgroupLimits(memory_bytes=64 << 20, pids=20, cpu_cores=0.5)
NAME = f"nodeagent-test-{os.getpid()}"


def join(seat: SeatCgroup, script: str) -> subprocess.Popen[bytes]:
    """A shell that joins the seat and says `in` before it does anything else."""
    joins = "; ".join(f"echo 0 > {path}" for path in seat.procs)
    shell = subprocess.Popen(["/bin/sh", "-c", f"{joins}; echo in; {script}"], stdout=subprocess.PIPE)
    assert shell.stdout is not None and shell.stdout.readline() == b"in\n"
    return shell


async def reap(shell: subprocess.Popen[bytes]) -> int:
    assert shell.stdout is not None
    shell.stdout.close()
    return await asyncio.to_thread(shell.wait, 10)


async def test_destroy_kills_everything_and_leaves_no_directory() -> None:
    cgroups = SeatCgroups(name=NAME)
    await cgroups.prepare()
    seat = cgroups.create("one", LIMITS)
    shell = join(seat, "trap '' TERM; for i in 1 2 3 4 5; do setsid sleep 600 & done; wait")
    assert all(str(shell.pid) in path.read_text().split() for path in seat.procs)
    destroying = asyncio.ensure_future(seat.destroy())
    assert await reap(shell) == -signal.SIGKILL
    await destroying
    assert not any(path.parent.exists() for path in seat.procs)
    await seat.destroy()
    await cgroups.remove()
    assert not any(path.parent.parent.exists() for path in seat.procs)


async def test_a_process_that_forks_all_the_time_does_not_escape() -> None:
    cgroups = SeatCgroups(name=NAME)
    await cgroups.prepare()
    seat = cgroups.create("bomb", LIMITS)
    shell = join(seat, "b() { (b) & (b) & }; while :; do b 2>/dev/null; done 2>/dev/null")
    await seat.destroy()
    await reap(shell)
    assert not any(path.parent.exists() for path in seat.procs)
    await cgroups.remove()


async def test_seats_of_a_daemon_that_died_are_swept_when_the_next_one_starts() -> None:
    dead = SeatCgroups(name=NAME)
    await dead.prepare()
    shell = join(dead.create("left-over", LIMITS), "exec sleep 600")
    cgroups = SeatCgroups(name=NAME)
    await cgroups.prepare()
    assert await reap(shell) == -signal.SIGKILL
    seat = cgroups.create("left-over", LIMITS)
    assert [path.read_text() for path in seat.procs] == [""] * len(seat.procs)
    await cgroups.remove()


async def test_limits_are_what_the_kernel_says() -> None:
    cgroups = SeatCgroups(name=NAME)
    await cgroups.prepare()
    seat = cgroups.create("one", LIMITS)
    for directory, hierarchy in seat._directories.items():
        for file, value in module.settings(hierarchy, LIMITS):
            path = directory / file.removeprefix("?")
            if path.exists():
                assert path.read_text().strip() == value
    assert seat.oom_kills() == 0
    await cgroups.remove()


async def test_a_cgroup_that_cannot_be_emptied_is_an_error_and_not_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    cgroups = SeatCgroups(name=NAME)
    await cgroups.prepare()
    seat = cgroups.create("stuck", LIMITS)
    shell = join(seat, "exec sleep 600")
    with monkeypatch.context() as patch:
        patch.setattr(module, "DESTROY_PAUSE_S", 0.001)
        patch.setattr(module, "_kill", lambda directory: None)
        with pytest.raises(AgentError, match="seat stuck cannot be removed"):
            await seat.destroy()
    shell.kill()
    await reap(shell)
    await cgroups.remove()


async def test_a_pure_v2_hierarchy_is_killed_in_one_write() -> None:
    """The unified hierarchy of a hybrid machine has no controllers but kills and removes like any other."""
    unified = Path("/sys/fs/cgroup/unified")
    if not unified.is_dir():
        (hierarchy,) = [h for h in find(Path("/")) if h.version == 2][:1]
        unified = hierarchy.own
    directory = unified / NAME
    directory.mkdir()
    seat = SeatCgroup("v2", {directory: Hierarchy(unified, 2, ())})
    shell = join(seat, "sleep 600 & sleep 600")
    await seat.destroy()
    assert await reap(shell) == -signal.SIGKILL
    assert not directory.exists()
