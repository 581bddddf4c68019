"""What a test may leave behind: nothing. Snapshots of this process and the machine, and their difference.

`Snapshot.take()` before a test, `leftovers(before)` after it: a list of sentences, empty when the house is clean.
What is just ending (a thread that returns, a child that dies, a socket that waits for the garbage collector) gets
`GRACE_S` to do so.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import gc
import os
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

GRACE_S = 1.5
POLL_S = 0.02

THREADS_THAT_STAY = (
    "_poll_wrapper",  # grpc.aio: one poller for the process, until the last channel and server are collected
    "pytest_timeout",
)
FILES_THAT_STAY = (
    "/dev/null",
    "/dev/urandom",  # libraries keep one for the life of the process
    "/proc/self/fd",  # our own look
    ".pyc",
)
CGROUPS_THAT_STAY = ("nodeagent", "nodeagent-seats")  # seats/cgroups.py: rooms for seats, not seats
PR_SET_CHILD_SUBREAPER = 36  # prctl(2)


class Snapshot(NamedTuple):
    threads: frozenset[int]
    children: frozenset[int]
    files: Counter[str]
    mounts: frozenset[str]
    cgroups: frozenset[str]

    @classmethod
    def take(cls) -> Snapshot:
        return cls(
            frozenset(t.ident or 0 for t in threading.enumerate()),
            frozenset(children()),
            open_files(),
            frozenset(mounts()),
            frozenset(own_cgroups()),
        )


# ---- children: ours, and orphans of ours

_forked: set[int] = set()


def watch_children() -> None:
    """Once per session: orphaned grandchildren come to us (PR_SET_CHILD_SUBREAPER) instead of to init, and the pids
    that this process itself forks are noted, because a zombie is a fault only of who forked it."""
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)

    def noting(call: Callable[..., int]) -> Callable[..., int]:
        def noted(*args: Any, **kwargs: Any) -> int:
            if pid := call(*args, **kwargs):
                _forked.add(pid)
            return pid

        return noted

    os.fork = noting(os.fork)
    os.posix_spawn, os.posix_spawnp = noting(os.posix_spawn), noting(os.posix_spawnp)
    subprocess._fork_exec = noting(subprocess._fork_exec)  # type: ignore[attr-defined]


def children() -> Iterator[int]:
    """Pids whose parent is this process, dead or alive. Orphans that have ended are reaped on the way: their own
    parent is gone and nobody else would."""
    me = os.getpid()
    for entry in os.listdir("/proc"):
        if not entry.isdigit():
            continue
        state, parent, _ = process(int(entry))
        if parent != me:
            continue
        pid = int(entry)
        if state == "Z" and pid not in _forked:
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, os.WNOHANG)
            continue
        yield pid


def process(pid: int) -> tuple[str, int, str]:
    """State letter, parent and command line (or name) of a process; ("", 0, "") when there is none (proc(5))."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(errors="replace")
        command = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
    except OSError:
        return "", 0, ""
    name = stat[stat.index("(") + 1 : stat.rindex(")")]
    fields = stat[stat.rindex(")") + 2 :].split()
    return fields[0], int(fields[1]), command or name


# ---- descriptors, mounts, cgroups


def open_files() -> Counter[str]:
    """How often each target is open. Numbers do not matter: a library may close and open the same thing again."""
    count: Counter[str] = Counter()
    for fd in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            target = os.readlink(f"/proc/self/fd/{fd}")
            if not target.endswith(FILES_THAT_STAY) and not target.startswith(f"/proc/{os.getpid()}/"):
                count[target] += 1
    return count


def mounts() -> Iterator[str]:
    """`mount point (type)` of every mount we see. Other test runs on this machine keep theirs below /tmp too."""
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        left, _, right = line.partition(" - ")
        yield f"{left.split()[4]} ({right.split()[0]})"


def own_cgroups() -> Iterator[str]:
    """Directories below our own cgroup in every mounted hierarchy, v1 and v2.

    Where our cgroup is the root of a hierarchy everybody's groups are below it; there only those count that carry the
    agent's name. What a daemon in this process makes for good (CGROUPS_THAT_STAY) does not.
    """
    ours = {}
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, where = line.split(":", 2)
        ours[controllers] = Path(where)
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        left, _, right = line.partition(" - ")
        kind, _, options = right.split(" ", 2)
        if kind not in ("cgroup", "cgroup2"):
            continue
        root, point = left.split()[3:5]
        for name, path in ours.items():
            if (kind == "cgroup2") != (name == "") or not set(name.split(",")) - {""} <= set(options.split(",")):
                continue
            if path.name in CGROUPS_THAT_STAY:
                path = path.parent  # a daemon in this process moved it into a leaf
            for directory, below, _ in os.walk(os.path.normpath(os.path.join(point, os.path.relpath(path, root)))):
                for child in below:
                    full = os.path.join(directory, child)
                    if child not in CGROUPS_THAT_STAY and (str(path) != root or "nodeagent" in full):
                        yield full


# ---- more than one test run on a machine

_presence: int = -1


def announce() -> None:
    """Hold a shared lock while this test session lives, so that another one knows it is not alone."""
    global _presence
    _presence = os.open(f"/tmp/.nodeagent-tests-{os.getuid()}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    fcntl.flock(_presence, fcntl.LOCK_SH)


def alone() -> bool:
    """No other test session runs here, so every mount and cgroup that appears is ours."""
    try:
        fcntl.flock(_presence, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    finally:
        fcntl.flock(_presence, fcntl.LOCK_SH)
    return True


# ---- the difference


def leftovers(before: Snapshot, own: tuple[str, ...] = ()) -> list[str]:
    """What is there now and was not there `before`, after at most GRACE_S, as sentences. `own`: path prefixes of
    this session, below which every mount is ours."""
    deadline = time.monotonic() + GRACE_S
    found = _difference(before, own)
    collected = False
    while found and time.monotonic() < deadline:
        if not collected:
            gc.collect()  # cycles keep sockets and grpc channels alive
            collected = True
        else:
            time.sleep(POLL_S)
        found = _difference(before, own)
    return found


def _difference(before: Snapshot, own: tuple[str, ...]) -> list[str]:
    found = []
    for thread in threading.enumerate():
        if thread.ident not in before.threads and not any(name in thread.name for name in THREADS_THAT_STAY):
            found.append(f"thread {thread.name!r}{_where(thread)}")
    for pid in set(children()) - before.children:
        state, _, command = process(pid)
        if state:
            found.append(f"{'zombie' if state == 'Z' else 'child'} process {pid}: {command[:200]}")
    for target, count in (open_files() - before.files).items():
        found.append(f"{count} open descriptor{'s' * (count > 1)} on {target}{_peer(target)}")
    strangers = not alone()
    for mount in set(mounts()) - before.mounts:
        if not strangers or mount.startswith(own):
            found.append(f"mount {mount}")
    for cgroup in set(own_cgroups()) - before.cgroups:
        if not strangers or set(_members(cgroup)) & set(children()):
            found.append(f"cgroup {cgroup}")
    return found


def _where(thread: threading.Thread) -> str:
    frame = sys._current_frames().get(thread.ident or 0)
    return f" in {frame.f_code.co_filename}:{frame.f_lineno}" if frame else ""


def _members(cgroup: str) -> list[int]:
    try:
        return [int(pid) for pid in Path(cgroup, "cgroup.procs").read_text().split()]
    except (OSError, ValueError):
        return []


def _peer(target: str) -> str:
    """For `socket:[inode]`, the name of the Unix socket (proc_net_unix lists inode and path)."""
    if not target.startswith("socket:["):
        return ""
    inode = target[8:-1]
    with contextlib.suppress(OSError):
        for line in Path("/proc/net/unix").read_text(errors="replace").splitlines()[1:]:
            fields = line.split()
            if fields[6] == inode:
                return f" (unix {' '.join(fields[7:]) or 'unnamed'})"
    return ""


def fail_on(found: list[str]) -> None:
    """Fail the running test with every leftover."""
    if found:
        pytest.fail("the test left behind:\n  " + "\n  ".join(sorted(found)), pytrace=False)
