"""What the processes of one container may open: the device cgroup of v1, the BPF programs of v2, or both.

Which of them counts is told by where the container's name stands in /proc/<pid>/cgroup: a hybrid host has both trees, and the
runtime uses one of them. A cgroup that lets everything through (a privileged container) is left as it is, for a refusal of one
stale number would there hit whichever device gets that number next.

Who changes this besides us: `runc update` writes the rules of the container's specification again (before runc 1.0), systemd
does at `systemctl daemon-reload` (v1 and v2, where it manages the cgroup). So a change is no fact for good: ask again.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path, PurePosixPath

import msgspec

from nodeagent.errors import AgentError, Reason
from nodeagent.host import HostRoot
from nodeagent.sandboxes import bpf
from nodeagent.sandboxes.device_program import START_ANEW, DeviceNumbers, Rule, amended, put_program, take_program

PERMISSIONS = "rw"
"""What the device plugin asks for its nodes."""
EVERYTHING = "a *:* rwm"
MAX_FILE_BYTES = 1 << 20
MAX_NESTED = 8
"""Cgroups between the container's own and that of its first process; an init system inside makes one or two."""
EXCHANGE_TRIES = 4
PROGRAM_NAME = "nodeagent_dev"


class DeviceCgroups(msgspec.Struct, frozen=True):
    """Directories of one container: in v1 its own and those down to its first process, in v2 its own."""

    v1: tuple[Path, ...] = ()
    v2: Path | None = None


def find(host: HostRoot, container_id: str, cgroups: str) -> DeviceCgroups:
    """Where the container with `container_id` is, given /proc/<pid>/cgroup of its first process.

    containerd, CRI-O and Docker put the id into the name of the cgroup; what is below it belongs to the container and may have
    any name. Raises AgentError(NOT_SUPPORTED) when no device cgroup has the id in its name.
    """
    v1: tuple[Path, ...] = ()
    v2: Path | None = None
    for line in cgroups.splitlines():
        _, named, where = line.split(":", 2)
        path = PurePosixPath(where)
        own = next((n for n, part in enumerate(path.parts) if container_id and container_id in part), None)
        if own is None or ".." in path.parts:
            continue
        chain = [PurePosixPath(*path.parts[: n + 1]) for n in range(own, len(path.parts))]
        if "devices" in named.split(","):
            v1 = tuple(_mounted(host, "devices", step) for step in chain[:MAX_NESTED])
        elif not named:
            v2 = _mounted(host, "", chain[0])
    if not v1 and v2 is None:
        raise AgentError(
            Reason.NOT_SUPPORTED,
            f"no device cgroup of the host is named after container {container_id[:12]}",
            hint=f"nodes can be changed under containerd, CRI-O and Docker with the cgroup namespace of the host; {START_ANEW}",
        )
    return DeviceCgroups(v1, v2)


def change(cgroups: DeviceCgroups, rules: Sequence[Rule]) -> None:
    """Allow or refuse reading and writing of devices. Writes nothing where the answer is already as wanted.

    Raises AgentError when a rule could not be set, FileNotFoundError when the container is gone.
    """
    for directory in cgroups.v1:
        _change_v1(directory, rules)
    if cgroups.v2 is not None:
        _change_v2(cgroups.v2, rules, may_be_without=bool(cgroups.v1))


def _change_v1(directory: Path, rules: Iterable[Rule]) -> None:
    """Exceptions of the list are kept by exact numbers; a wildcard of the specification stays (security/device_cgroup.c)."""
    lines = _read_or_raise(directory / "devices.list").splitlines()
    if EVERYTHING in lines:
        return
    listed: dict[str, str] = {}
    for line in lines:
        device, _, access = line.rpartition(" ")
        listed[device] = listed.get(device, "") + access
    for rule in rules:
        access = listed.get(str(rule.numbers), "")
        if rule.allowed and not set(PERMISSIONS) <= set(access):
            _write_v1(directory, "devices.allow", rule.numbers, PERMISSIONS)
        elif not rule.allowed and access:
            _write_v1(directory, "devices.deny", rule.numbers, "rwm")


def _write_v1(directory: Path, name: str, numbers: DeviceNumbers, access: str) -> None:
    try:
        fd = os.open(directory / name, os.O_WRONLY | os.O_CLOEXEC)
        try:
            os.write(fd, f"{numbers} {access}".encode())
        finally:
            os.close(fd)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENODEV):  # ENODEV: removed after it was opened (kernfs)
            raise FileNotFoundError(error.errno, error.strerror, str(directory)) from error
        # EPERM: the cgroup above does not have what is to be given (devcgroup_update_access).
        raise AgentError(
            Reason.NOT_SUPPORTED,
            f"{name} of {directory} does not take {numbers} {access}: {error.strerror}",
            hint=f"a cgroup above the container's must allow the device; {START_ANEW}",
        ) from error


def _change_v2(directory: Path, rules: Sequence[Rule], *, may_be_without: bool) -> None:
    """`may_be_without`: v1 guards the devices, and the kernel may be too old (4.15) for programs of v2."""
    cgroup_fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        for _ in range(EXCHANGE_TRIES):
            if _amend_all(cgroup_fd, rules):
                return
    except OSError as error:
        if not (may_be_without and error.errno in (errno.EINVAL, errno.ENOSYS)):
            raise _explained(directory, error) from error
        return
    finally:
        os.close(cgroup_fd)
    raise AgentError(
        Reason.INTERNAL,
        f"somebody else keeps exchanging the device programs of {directory}",
        hint="the agent tries again at its next comparison",
    )


def _amend_all(cgroup_fd: int, rules: Sequence[Rule]) -> bool:
    """False when a program was exchanged by somebody else meanwhile.

    All programs must allow an access: systemd attaches one of its own beside the runtime's where it manages the cgroup.
    """
    present = bpf.attached(cgroup_fd)
    for program_id in present.ids:
        try:
            with _closing(bpf.opened(program_id)) as old_fd:
                program = take_program(bpf.instructions(old_fd))
                wanted = amended(program, rules)
                if wanted == program:
                    continue
                with _closing(bpf.load(put_program(wanted), PROGRAM_NAME)) as new_fd:
                    bpf.exchange(cgroup_fd, old_fd, new_fd, present.flags)
        except OSError as error:
            if error.errno == errno.ENOENT:
                return False
            raise
    return True


def _explained(directory: Path, error: OSError) -> AgentError:
    if isinstance(error, bpf.Refused):
        what = f"the kernel does not take the device program of {directory} again"
    else:
        what = f"the device program of {directory} cannot be exchanged"
    return AgentError(
        Reason.NOT_SUPPORTED,
        f"{what}: {error.strerror}",
        hint=f"bpf(2) needs CAP_SYS_ADMIN and, before Linux 5.11, room in RLIMIT_MEMLOCK; {START_ANEW}",
    )


@contextlib.contextmanager
def _closing(fd: int) -> Iterator[int]:
    try:
        yield fd
    finally:
        os.close(fd)


def _mounted(host: HostRoot, controller: str, path: PurePosixPath) -> Path:
    """The directory of a cgroup in the hierarchy of a v1 controller, or in v2 (""). Raises AgentError(NOT_SUPPORTED) when the
    hierarchy cannot be reached: that must not look like a cgroup that has ended.
    """
    for line in _read(host.path("/proc/1/mountinfo")).splitlines():
        left, _, right = line.partition(" - ")
        kind, _, options = right.partition(" ")
        if kind != ("cgroup" if controller else "cgroup2"):
            continue
        if controller and controller not in options.split()[-1].split(","):
            continue
        top, point = left.split()[3:5]
        if path.is_relative_to(top) and host.path(f"{point}/cgroup.procs").exists():
            return host.path(str(point / path.relative_to(top)))
    raise AgentError(
        Reason.NOT_SUPPORTED,
        f"the cgroups of the host ({f'v1 {controller}' if controller else 'v2'}) are not mounted where the agent can see them",
        hint="mount the host's / with its submounts (mountPropagation: HostToContainer) at host_root",
    )


def _read_or_raise(path: Path) -> str:
    with path.open("rb") as file:
        return file.read(MAX_FILE_BYTES).decode(errors="replace")


def _read(path: Path) -> str:
    try:
        return _read_or_raise(path)
    except OSError:
        return ""
