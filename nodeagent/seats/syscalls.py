"""System calls that Python 3.11 has no name for, under their own names. Each raises OSError with the call in its text.

Constants are from the kernel's uapi headers (linux/prctl.h, linux/sched.h, linux/mount.h, linux/capability.h) and are the
same on x86-64, arm64 and loongarch64.
"""

from __future__ import annotations

import ctypes
import os

PR_SET_PDEATHSIG = 1
PR_SET_DUMPABLE = 4
PR_SET_NAME = 15
PR_SET_SECCOMP = 22
PR_CAPBSET_DROP = 24
PR_SET_NO_NEW_PRIVS = 38
PR_CAP_AMBIENT = 47
PR_CAP_AMBIENT_CLEAR_ALL = 4
SECCOMP_MODE_FILTER = 2

CLONE_NEWNS = 0x0002_0000
CLONE_NEWIPC = 0x0800_0000
CLONE_NEWPID = 0x2000_0000
CLONE_NEWNET = 0x4000_0000

MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC = 1, 2, 4, 8
MS_BIND, MS_REC, MS_SLAVE = 0x1000, 0x4000, 1 << 19

_LINUX_CAPABILITY_VERSION_3 = 0x2008_0522

_libc = ctypes.CDLL(None, use_errno=True)
_libc.prctl.argtypes = [ctypes.c_int, *[ctypes.c_ulong] * 4]
_libc.mount.argtypes = [ctypes.c_char_p, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_ulong, ctypes.c_char_p]


def _checked(result: int, what: str) -> None:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")


def prctl(option: int, argument: int = 0, third: int = 0) -> None:
    _checked(_libc.prctl(option, argument, third, 0, 0), f"prctl({option}, {argument})")


def set_name(name: str) -> None:
    """What `ps` shows: the first 15 bytes (TASK_COMM_LEN)."""
    buffer = ctypes.create_string_buffer(name.encode(errors="replace")[:15])
    prctl(PR_SET_NAME, ctypes.addressof(buffer))


def unshare(flags: int) -> None:
    _checked(_libc.unshare(flags), f"unshare({flags:#x})")


def setns(fd: int, kind: int) -> None:
    _checked(_libc.setns(fd, kind), f"setns({kind:#x})")


def mount(source: str, target: str, kind: str, flags: int, options: str = "") -> None:
    _checked(
        _libc.mount(source.encode(), target.encode(), kind.encode(), flags, options.encode()),
        f"mount {kind or source} on {target}",
    )


def drop_capabilities() -> None:
    """Empty the effective, permitted and inheritable sets of this thread (capset(2)); the ambient set follows them."""
    header = (ctypes.c_uint32 * 2)(_LINUX_CAPABILITY_VERSION_3, 0)
    _checked(_libc.capset(header, (ctypes.c_uint32 * 6)()), "capset")


class SockFprog(ctypes.Structure):
    """`struct sock_fprog` (linux/filter.h): a seccomp program as the kernel takes it."""

    _fields_ = (("len", ctypes.c_ushort), ("filter", ctypes.c_void_p))


def load_seccomp(program: SockFprog) -> None:
    """Install a filter; needs no_new_privs or CAP_SYS_ADMIN (seccomp(2))."""
    prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.addressof(program))
