"""What a child of the zygote gives up before it touches anything of a tenant. Everything here runs in that child.

The order matters and is the same everywhere: groups, bounding set, gid, uid, capabilities, no_new_privs, pdeath signal
(the kernel forgets it when the uid changes, prctl(2)) and a look whether the parent is still there, limits, dumpable,
seccomp filter, every other descriptor.
"""

from __future__ import annotations

import ctypes
import errno
import os
import resource
import signal
from collections.abc import Collection, Sequence
from pathlib import Path

import msgspec
import pyseccomp

from nodeagent.seats import syscalls
from nodeagent.seats.syscalls import prctl
from nodeagent.wire.zygote import Limits

MAX_OPEN_FILES = 16384
"""The zygote lowers its own limit to this, so no child has a descriptor above it."""
PRIVATE_DIRECTORIES = ("/tmp", "/var/tmp", "/dev/shm", "/run/lock")  # noqa: S108 (they are about to be covered)
"""What everybody can write to on a Linux system (FHS 3.0; /run/lock is Debian's)."""

BPF_INSTRUCTION_BYTES = 8
_OPERATORS = {
    "SCMP_CMP_NE": pyseccomp.NE,
    "SCMP_CMP_LT": pyseccomp.LT,
    "SCMP_CMP_LE": pyseccomp.LE,
    "SCMP_CMP_EQ": pyseccomp.EQ,
    "SCMP_CMP_GE": pyseccomp.GE,
    "SCMP_CMP_GT": pyseccomp.GT,
    "SCMP_CMP_MASKED_EQ": pyseccomp.MASKED_EQ,
}


# ---- seccomp profiles, in the format of the OCI runtime specification (config-linux.md, "Seccomp")


class _Argument(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    index: int
    value: int
    op: str
    value_two: int = msgspec.field(default=0, name="valueTwo")


class _Rule(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    names: tuple[str, ...]
    action: str
    args: tuple[_Argument, ...] = ()
    errno_ret: int = msgspec.field(default=errno.EPERM, name="errnoRet")
    comment: str = ""


class _Profile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    default_action: str = msgspec.field(name="defaultAction")
    syscalls: tuple[_Rule, ...]
    default_errno_ret: int = msgspec.field(default=errno.EPERM, name="defaultErrnoRet")
    comment: tuple[str, ...] = ()


class Filter:
    """A compiled filter, ready to be installed any number of times."""

    def __init__(self, program: bytes) -> None:
        self._instructions = ctypes.create_string_buffer(program, len(program))
        self._program = syscalls.SockFprog(len(program) // BPF_INSTRUCTION_BYTES, ctypes.addressof(self._instructions))

    def __len__(self) -> int:
        """BPF instructions."""
        return int(self._program.len)

    def install(self) -> None:
        """Put the calling process behind the filter, for ever. Needs no_new_privs."""
        syscalls.load_seccomp(self._program)


def compile_profile(path: Path) -> Filter:
    """Compile an OCI profile for this machine's own architecture; calls of any other kill the process.

    System calls that libseccomp does not know by name are left to the default action. Raises OSError when the file cannot
    be read, ValueError when it is not such a profile.
    """
    try:
        profile = msgspec.json.decode(path.read_bytes(), type=_Profile)
        compiled = pyseccomp.SyscallFilter(_action(profile.default_action, profile.default_errno_ret))
        for rule in profile.syscalls:
            action = _action(rule.action, rule.errno_ret)
            arguments = [pyseccomp.Arg(a.index, _OPERATORS[a.op], a.value, a.value_two) for a in rule.args]
            for name in rule.names:
                number = pyseccomp.resolve_syscall(pyseccomp.Arch.NATIVE, name)
                if number != -1:  # __NR_SCMP_ERROR: newer than this libseccomp
                    compiled.add_rule(action, number, *arguments)
    except (msgspec.DecodeError, KeyError) as error:
        raise ValueError(f"{path}: {error}") from error
    out, into = os.pipe()  # holds 64 KiB, twice what the kernel takes as a filter (BPF_MAXINSNS)
    with os.fdopen(out, "rb") as program:
        with os.fdopen(into, "wb") as file:
            compiled.export_bpf(file)
        return Filter(program.read())


def _action(name: str, errno_ret: int) -> int:
    """libseccomp's number of an OCI action. Before Linux 4.14 only a thread can be killed; a worker has no other."""
    try:
        kills_processes = pyseccomp.get_api() >= 3
    except NotImplementedError:  # libseccomp before 2.4
        kills_processes = False
    actions = {
        "SCMP_ACT_ALLOW": pyseccomp.ALLOW,
        "SCMP_ACT_ERRNO": pyseccomp.ERRNO(errno_ret),
        "SCMP_ACT_KILL_PROCESS": pyseccomp.KILL_PROCESS if kills_processes else pyseccomp.KILL,
    }
    return int(actions[name])


# ---- in the child


def join_cgroups(procs: Collection[str]) -> None:
    """Move this process into each cgroup by its `cgroup.procs` file; "0" is the writer itself. Raises OSError."""
    for path in procs:
        try:
            fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
            try:
                os.write(fd, b"0\n")
            finally:
                os.close(fd)
        except OSError as error:
            raise OSError(error.errno, f"cannot join cgroup {path}: {error.strerror}") from error


def isolate(*, network: bool, private_tmp_bytes: int, hidden: Sequence[str]) -> None:
    """For process 1 of a new pid namespace: its own mount table and /proc, on demand its own network and /tmp.

    `network` False: an empty network namespace (lo is down) and an IPC namespace. `private_tmp_bytes`: a tmpfs of that size
    over every directory that all users can write to. `hidden` directories are covered by empty ones. Raises OSError.
    """
    syscalls.unshare(syscalls.CLONE_NEWNS | (0 if network else syscalls.CLONE_NEWNET | syscalls.CLONE_NEWIPC))
    # Slave, not private: a long-lived program must not keep busy what is unmounted outside.
    syscalls.mount("", "/", "", syscalls.MS_REC | syscalls.MS_SLAVE)
    hardened = syscalls.MS_NOSUID | syscalls.MS_NODEV
    syscalls.mount("proc", "/proc", "proc", hardened | syscalls.MS_NOEXEC)
    if private_tmp_bytes:
        first, *others = [path for path in PRIVATE_DIRECTORIES if Path(path).is_dir()]
        options = f"size={private_tmp_bytes},nr_inodes=16384,mode=1777"
        syscalls.mount("tmpfs", first, "tmpfs", hardened, options)
        for path in others:
            syscalls.mount(first, path, "", syscalls.MS_BIND)
    for path in hidden:
        if Path(path).is_dir():  # it may lie below one that is covered already
            flags = hardened | syscalls.MS_NOEXEC | syscalls.MS_RDONLY
            syscalls.mount("tmpfs", path, "tmpfs", flags, "size=4096,nr_inodes=1,mode=0")


def become(uid: int, expected_parent: int) -> None:
    """Turn root into `uid` (and gid) for ever, without groups, capabilities or a way to get any.

    `expected_parent` is what getppid() must still say (0: a parent outside this pid namespace). Raises OSError.
    """
    os.setgroups([])
    _drop_bounding_set()
    os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid, uid)
    syscalls.drop_capabilities()
    try:
        prctl(syscalls.PR_CAP_AMBIENT, syscalls.PR_CAP_AMBIENT_CLEAR_ALL)
    except OSError as error:
        if error.errno != errno.EINVAL:  # kernels before 4.3 have no ambient set
            raise
    prctl(syscalls.PR_SET_NO_NEW_PRIVS, 1)
    die_with_parent(expected_parent)


def die_with_parent(expected_parent: int) -> None:
    """SIGKILL when the parent's forking thread ends (prctl(2), PR_SET_PDEATHSIG). Raises OSError if it is gone already."""
    prctl(syscalls.PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != expected_parent:
        raise OSError(errno.ESRCH, f"parent {expected_parent} has ended")


def limit(limits: Limits) -> None:
    """Set the resource limits, never above what is allowed already, and no core dumps."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _lower(resource.RLIMIT_NOFILE, limits.files)
    if limits.file_bytes:
        _lower(resource.RLIMIT_FSIZE, limits.file_bytes)
    if limits.cpu_s:
        _lower(resource.RLIMIT_CPU, limits.cpu_s, limits.cpu_s + 1)  # SIGXCPU, a second later SIGKILL


def hide() -> None:
    """Nobody of the same uid may trace this process or read its memory; its /proc entries belong to root."""
    prctl(syscalls.PR_SET_DUMPABLE, 0)


def close_all_but(keep: Collection[int]) -> None:
    low = 0
    for fd in sorted(keep):
        if low < fd:  # an empty range would close everything: closerange(0, 0) is close_range(0, -1)
            os.closerange(low, fd)
        low = fd + 1
    os.closerange(low, MAX_OPEN_FILES)


def _drop_bounding_set() -> None:
    for capability in range(64):
        try:
            prctl(syscalls.PR_CAPBSET_DROP, capability)
        except OSError as error:
            if error.errno == errno.EINVAL:  # above the last one this kernel knows
                return
            raise


def _lower(kind: int, soft: int, hard: int | None = None) -> None:
    _, ceiling = resource.getrlimit(kind)
    hard = soft if hard is None else hard
    if ceiling != resource.RLIM_INFINITY:
        soft, hard = min(soft, ceiling), min(hard, ceiling)
    resource.setrlimit(kind, (soft, hard))
