"""The cgroups of the seats: below the agent's own, so that one hostile seat dies alone and all of them count as the agent.

    <own cgroup of the daemon>/
        nodeagent/               the daemon and its zygote (v2 only: a cgroup that has controllers for others holds no process)
        nodeagent-seats/<seat>/  a worker and the programs that work for it

Works with cgroup v1, v2 and both at once (a controller is in one of them). Where the hierarchies are mounted and which part
of them this process sees is read from /proc/self: in a container the mount may begin at the container's own cgroup.
Sources: cgroups(7), Documentation/admin-guide/cgroup-v2.rst and cgroup-v1/memory.rst of the kernel.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import signal
from itertools import islice
from pathlib import Path, PurePosixPath

import msgspec

from nodeagent.errors import AgentError, Reason

log = logging.getLogger(__name__)

CONTROLLERS = ("memory", "pids", "cpu")
OWN_LEAF = "nodeagent"
CPU_PERIOD_US = 100_000
"""The default of the kernel's CPU bandwidth control; v1 wants it said in the same unit as the quota."""
MOVE_PASSES = 3
"""A process may fork while it is being moved; its child is met in the next pass."""
DESTROY_TRIES = 60
DESTROY_PAUSE_S = 0.05
CHUNK_BYTES, MAX_CHUNKS = 1 << 14, 1 << 10


class CgroupLimits(msgspec.Struct, frozen=True, kw_only=True):
    """What all processes of one seat may use together."""

    memory_bytes: int
    pids: int
    cpu_cores: float


class Hierarchy(msgspec.Struct, frozen=True):
    """One mounted hierarchy: the directory of our own cgroup in it, and what is taken from it."""

    own: Path
    version: int
    controllers: tuple[str, ...]


class SeatCgroup:
    """The cgroup of one seat: a directory in each hierarchy."""

    def __init__(self, name: str, directories: dict[Path, Hierarchy]) -> None:
        self.name = name
        self._directories = directories

    @property
    def procs(self) -> tuple[Path, ...]:
        """The files that a process writes "0" to in order to join. Empty where there are no cgroups."""
        return tuple(directory / "cgroup.procs" for directory in self._directories)

    def oom_kills(self) -> int:
        """How many of its processes the kernel killed because the seat was over its memory. 0 before Linux 4.13 on v1."""
        for directory, hierarchy in self._directories.items():
            if "memory" in hierarchy.controllers:
                text = _read(directory / ("memory.events" if hierarchy.version == 2 else "memory.oom_control"))
                for line in text.splitlines():
                    key, _, value = line.partition(" ")
                    if key == "oom_kill" and value.isdigit():
                        return int(value)
        return 0

    async def destroy(self) -> None:
        """Kill every process in it and remove it. Raises AgentError when it is still there after about three seconds."""
        for directory, hierarchy in self._directories.items():
            if "pids" in hierarchy.controllers:
                _write(directory / "pids.max", "0")  # nothing in it can fork away from the signals
        for attempt in range(DESTROY_TRIES):
            left = [directory for directory in self._directories if not _remove(directory)]
            if not left:
                return
            for directory in left:
                _kill(directory)
            await asyncio.sleep(DESTROY_PAUSE_S if attempt else 0)
        raise AgentError(
            Reason.INTERNAL,
            f"cgroup of seat {self.name} cannot be removed: {', '.join(map(str, left))}",
            hint="a process in it does not die; the agent tries again when it starts",
        )


class SeatCgroups:
    """All seat cgroups of this daemon. Calls touch the cgroup file system only, which is memory, and do not block.

    `root` is where this process's own `/proc` and `/sys` are (another directory in tests, never the host's root in a
    container). `name` is the directory that holds the seats; two daemons that share a cgroup need two names.
    """

    def __init__(self, root: Path = Path("/"), *, name: str = "nodeagent-seats") -> None:
        self._root = root
        self._name = name
        self._hierarchies: tuple[Hierarchy, ...] = ()
        self._delegated: dict[
            Path, tuple[str, ...]
        ] = {}  # our v2 cgroup -> controllers that it did not hand down before

    @property
    def missing(self) -> tuple[str, ...]:
        """Controllers that this machine does not give us: seats run without the limit."""
        present = {c for hierarchy in self._hierarchies for c in hierarchy.controllers}
        return tuple(c for c in CONTROLLERS if c not in present)

    async def prepare(self) -> None:
        """Find our place, make room for seats and remove those of a daemon that died here. Before `create`, under the state lock.

        A machine without some or all controllers is no error: `missing` tells, and so does the log.
        """
        usable = []
        for hierarchy in find(self._root):
            try:
                usable.append(self._make_room(hierarchy))
            except OSError as error:
                log.warning("cgroup %s cannot hold seats: %s", hierarchy.own, error)
        self._hierarchies = tuple(usable)
        if self.missing:
            log.warning("seats have no limit for %s: no such cgroup controller here", ", ".join(self.missing))
        await self._sweep()

    def create(self, name: str, limits: CgroupLimits) -> SeatCgroup:
        """Make the cgroup of seat `name` (a safe file name) with its limits. Raises AgentError."""
        directories = {hierarchy.own / self._name / name: hierarchy for hierarchy in self._hierarchies}
        try:
            for directory, hierarchy in directories.items():
                directory.mkdir(exist_ok=True)
                for file, value in settings(hierarchy, limits):
                    _set(directory / file, value)
        except OSError as error:
            for directory in directories:
                _remove(directory)
            raise AgentError(Reason.INTERNAL, f"cannot make the cgroup of seat {name}: {error}") from error
        return SeatCgroup(name, directories)

    async def remove(self) -> None:
        """Undo `prepare` and `create`, with everything that still runs in a seat; the daemon moves back to where it was."""
        await self._sweep()
        for hierarchy in self._hierarchies:
            _remove(hierarchy.own / self._name)
        for own, controllers in self._delegated.items():
            for controller in controllers:
                _write(own / "cgroup.subtree_control", f"-{controller}")
            if (own / OWN_LEAF).exists():
                _move_all(own / OWN_LEAF, own)
                _remove(own / OWN_LEAF)
        self._hierarchies, self._delegated = (), {}

    def _make_room(self, hierarchy: Hierarchy) -> Hierarchy:
        if hierarchy.version == 2:
            hierarchy = self._delegate(hierarchy)
        (hierarchy.own / self._name).mkdir(exist_ok=True)
        if hierarchy.version == 2:
            _enable(hierarchy.own / self._name, hierarchy.controllers)
        return hierarchy

    def _delegate(self, hierarchy: Hierarchy) -> Hierarchy:
        """Hand the controllers of our v2 cgroup down, after moving every process of it into a leaf ("no internal processes")."""
        own = hierarchy.own.parent if hierarchy.own.name == OWN_LEAF else hierarchy.own
        if (own / "cgroup.type").exists():  # every cgroup but the root of the hierarchy, which is exempt, has it
            (own / OWN_LEAF).mkdir(exist_ok=True)
            if left := _move_all(own, own / OWN_LEAF):
                log.warning("processes %s of cgroup %s cannot be moved to its leaf", left, own)
        before = _read(own / "cgroup.subtree_control").split()
        enabled = _enable(own, hierarchy.controllers)
        self._delegated[own] = tuple(c for c in enabled if c not in before)
        return Hierarchy(own, 2, enabled)

    async def _sweep(self) -> None:
        """Kill and remove every seat cgroup that is there."""
        found: dict[str, dict[Path, Hierarchy]] = {}
        for hierarchy in self._hierarchies:
            for directory in (hierarchy.own / self._name).iterdir():
                if directory.is_dir():
                    found.setdefault(directory.name, {})[directory] = hierarchy
        for name, directories in found.items():
            try:
                await SeatCgroup(name, directories).destroy()
            except AgentError as error:
                log.error("%s", error)


def find(root: Path) -> list[Hierarchy]:
    """The hierarchies that have one of our controllers, v2 first, with the directory of this process's cgroup in each."""
    own = {}
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, named, where = line.split(":", 2)
        own[named] = PurePosixPath(where)
    found: list[Hierarchy] = []
    taken: set[str] = set()
    mounts = [mount for line in _read(root / "proc/self/mountinfo").splitlines() if (mount := _cgroup_mount(line))]
    for version, top, point, options in sorted(mounts, key=lambda mount: -mount[0]):
        for controllers, path in own.items():
            if (version == 2) != (controllers == "") or not set(controllers.split(",")) - {""} <= options:
                continue
            if ".." in top.parts or not path.is_relative_to(top):
                continue  # a mount that does not show our cgroup
            directory = root / str(point).lstrip("/") / path.relative_to(top)
            names = _read(directory / "cgroup.controllers").split() if version == 2 else controllers.split(",")
            ours = tuple(c for c in CONTROLLERS if c in names and c not in taken)
            if ours and os.access(directory, os.W_OK):
                taken.update(ours)
                found.append(Hierarchy(directory, version, ours))
    return found


def _cgroup_mount(line: str) -> tuple[int, PurePosixPath, PurePosixPath, set[str]] | None:
    """Version, root of the mount in its hierarchy, mount point and super options of a mountinfo line (proc(5))."""
    left, _, right = line.partition(" - ")
    kind, _, options = right.partition(" ")
    if kind not in ("cgroup", "cgroup2"):
        return None
    top, point = left.split()[3:5]
    return 2 if kind == "cgroup2" else 1, PurePosixPath(top), PurePosixPath(point), set(options.split()[-1].split(","))


def settings(hierarchy: Hierarchy, limits: CgroupLimits) -> list[tuple[str, str]]:
    """File and value of each limit in `hierarchy`, in the order in which they must be written.

    `?`: the file may be absent, or refuse because a cgroup above us is stricter already.
    """
    quota_us = max(1000, int(limits.cpu_cores * CPU_PERIOD_US))
    v1 = {
        "memory": [
            ("memory.limit_in_bytes", str(limits.memory_bytes)),
            ("?memory.memsw.limit_in_bytes", str(limits.memory_bytes)),  # only with swap accounting
        ],
        "pids": [("pids.max", str(limits.pids))],
        # A quota above that of a parent is EINVAL in v1 only (sched/core.c, tg_cfs_schedulable_down).
        "cpu": [("cpu.cfs_period_us", str(CPU_PERIOD_US)), ("?cpu.cfs_quota_us", str(quota_us))],
    }
    v2 = {
        "memory": [
            ("memory.max", str(limits.memory_bytes)),
            ("?memory.swap.max", "0"),
            ("?memory.oom.group", "0"),  # since 4.19; the kubelet sets it above us
        ],
        "pids": [("pids.max", str(limits.pids))],
        "cpu": [("cpu.max", f"{quota_us} {CPU_PERIOD_US}")],
    }
    return [pair for c in hierarchy.controllers for pair in (v2 if hierarchy.version == 2 else v1)[c]]


def _set(path: Path, value: str) -> None:
    """Write a limit. Raises OSError, except for a file named `?...` that is not there or refuses."""
    optional = path.name.startswith("?")
    path = path.with_name(path.name.removeprefix("?"))
    fd = -1
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
        os.write(fd, value.encode())
    except OSError as error:
        if not (optional and error.errno in (errno.ENOENT, errno.EACCES, errno.EINVAL)):
            raise OSError(error.errno, f"{path} does not take {value}: {error.strerror}") from error
    finally:
        if fd >= 0:
            os.close(fd)


def _write(path: Path, value: str) -> bool:
    try:
        _set(path, value)
    except OSError:
        return False
    return True


def _enable(directory: Path, controllers: tuple[str, ...]) -> tuple[str, ...]:
    """Give the children of a v2 cgroup these controllers, one by one; returns those that they have."""
    for controller in controllers:
        if not _write(directory / "cgroup.subtree_control", f"+{controller}"):
            log.warning("cgroup %s does not hand down controller %s", directory, controller)
    enabled = _read(directory / "cgroup.subtree_control").split()
    return tuple(c for c in controllers if c in enabled)


def _members(directory: Path) -> list[int]:
    """Pids in a cgroup; those outside our pid namespace read as 0 and are left out."""
    return [int(word) for word in _read(directory / "cgroup.procs").split() if word.isdigit() and word != "0"]


def _move_all(source: Path, target: Path) -> list[int]:
    """Move every process of one cgroup to another; returns those that stay."""
    for _ in range(MOVE_PASSES):
        for pid in _members(source):
            _write(target / "cgroup.procs", str(pid))
    return _members(source)


def _kill(directory: Path) -> None:
    if _write(directory / "cgroup.kill", "1"):  # v2 since 5.14
        return
    for pid in _members(directory):
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            pass


def _remove(directory: Path) -> bool:
    """Whether the cgroup is gone now. A directory with living processes is EBUSY."""
    try:
        directory.rmdir()
    except FileNotFoundError:
        return True
    except OSError:
        return False
    return True


def _read(path: Path) -> str:
    try:
        with path.open("rb") as file:
            chunks = iter(lambda: file.read(CHUNK_BYTES), b"")
            return b"".join(islice(chunks, MAX_CHUNKS)).decode(errors="replace")
    except OSError:
        return ""
