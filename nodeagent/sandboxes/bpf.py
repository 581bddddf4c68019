"""bpf(2) for the programs that guard the devices of a cgroup v2 (BPF_PROG_TYPE_CGROUP_DEVICE): look, read, load, exchange.

Layouts and numbers are from the kernel's uapi header linux/bpf.h; the parts used here have not changed since Linux 4.15, which
brought this program type. Needs CAP_SYS_ADMIN (or CAP_BPF and CAP_NET_ADMIN). Every call raises OSError.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import struct

import msgspec

SYSCALL = {"x86_64": 321, "aarch64": 280, "riscv64": 280, "loongarch64": 280}
"""__NR_bpf (asm/unistd_64.h, asm-generic/unistd.h)."""

PROG_LOAD, PROG_ATTACH, PROG_DETACH = 5, 8, 9
PROG_GET_FD_BY_ID, OBJ_GET_INFO_BY_FD, PROG_QUERY = 13, 15, 16
PROG_TYPE_CGROUP_DEVICE = 15
CGROUP_DEVICE = 6
F_ALLOW_MULTI, F_REPLACE = 2, 4

MAX_ATTACHED = 64
"""BPF_CGROUP_MAX_PROGS (kernel/bpf/cgroup.c)."""
MAX_PROGRAM_BYTES = 8 * 65536
INFO = struct.Struct("<II8sIIQQQIIQ16s")
"""The head of struct bpf_prog_info, up to the name; the kernel fills in as much as it is asked for."""
LOG_BYTES = 1 << 16
LICENSE = ctypes.create_string_buffer(b"Apache-2.0")
"""Only programs that call GPL-only functions need another one; ours call none."""

_syscall = ctypes.CDLL(None, use_errno=True).syscall
_syscall.restype = ctypes.c_long


class Attached(msgspec.Struct, frozen=True):
    """The device programs of one cgroup, without those of its ancestors, and the flags they were attached with."""

    ids: tuple[int, ...]
    flags: int


class Refused(OSError):
    """The verifier does not take a program; `said` is the end of its log."""

    def __init__(self, error: OSError, said: str) -> None:
        super().__init__(error.errno, f"{error.strerror}: {said}" if said else error.strerror)
        self.said = said


def attached(cgroup_fd: int) -> Attached:
    """What is attached to the cgroup directory opened as `cgroup_fd`. ENOSYS, EINVAL: a kernel without this program type."""
    ids = (ctypes.c_uint32 * MAX_ATTACHED)()
    answer = _bpf(
        PROG_QUERY, struct.pack("<IIIIQI", cgroup_fd, CGROUP_DEVICE, 0, 0, ctypes.addressof(ids), MAX_ATTACHED)
    )
    flags, _, count = struct.unpack_from("<IQI", answer.raw, 12)
    return Attached(tuple(ids[:count]), flags)


def opened(program_id: int) -> int:
    """A descriptor of the program, which the caller closes. ENOENT: it is gone."""
    return _bpf_fd(PROG_GET_FD_BY_ID, struct.pack("<I", program_id))


def instructions(program_fd: int) -> bytes:
    """The program as the verifier left it, 8 bytes an instruction. EPERM: the kernel does not show it."""
    length = _described(program_fd, 0, 0)[4]
    if not 0 < length <= MAX_PROGRAM_BYTES:
        raise OSError(errno.EPERM, f"the kernel shows {length} bytes of the program")
    buffer = ctypes.create_string_buffer(length)
    shown = _described(program_fd, length, ctypes.addressof(buffer))
    if not shown[6] or shown[4] != length:  # a blinded program is kept back without an error (kernel/bpf/syscall.c)
        raise OSError(errno.EPERM, "the kernel does not show the program")
    return buffer.raw


def load(program: bytes, name: str) -> int:
    """Load a device program of `name` (15 letters, digits or `_`); a descriptor, which the caller closes.

    Raises Refused with what the verifier said, when it is the verifier that objects.
    """
    log = ctypes.create_string_buffer(LOG_BYTES)
    try:
        return _load(program, name, None)
    except OSError as error:
        first = error
    try:
        return _load(program, name, log)
    except OSError:
        said = log.value.decode(errors="replace").strip().splitlines()
        raise Refused(first, " / ".join(said[-3:])) from first


def exchange(cgroup_fd: int, old_fd: int, new_fd: int, flags: int) -> None:
    """Put the new program into the place of the old one. ENOENT: the old one is not attached any more, nothing was done.

    One step since Linux 5.6 (BPF_F_REPLACE). Before it, both are attached for a moment and what either of them refuses is
    refused. Programs attached without F_ALLOW_MULTI are alone, and the kernel always exchanges them in one step.
    """
    if not flags & F_ALLOW_MULTI:
        attach(cgroup_fd, new_fd, flags)
        return
    try:
        attach(cgroup_fd, new_fd, flags | F_REPLACE, old_fd)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        attach(cgroup_fd, new_fd, flags)
        try:
            detach(cgroup_fd, old_fd)
        except OSError:
            detach(cgroup_fd, new_fd)
            raise


def attach(cgroup_fd: int, program_fd: int, flags: int, replaced_fd: int = 0) -> None:
    """Attach a program; all programs of a cgroup and of its ancestors must allow an access."""
    _bpf(PROG_ATTACH, struct.pack("<IIIII", cgroup_fd, program_fd, CGROUP_DEVICE, flags, replaced_fd))


def detach(cgroup_fd: int, program_fd: int) -> None:
    _bpf(PROG_DETACH, struct.pack("<III", cgroup_fd, program_fd, CGROUP_DEVICE))


def _described(program_fd: int, length: int, address: int) -> tuple[int, ...]:
    described = ctypes.create_string_buffer(INFO.size)
    INFO.pack_into(described, 0, 0, 0, b"", 0, length, 0, address, 0, 0, 0, 0, b"")
    _bpf(OBJ_GET_INFO_BY_FD, struct.pack("<IIQ", program_fd, INFO.size, ctypes.addressof(described)))
    return INFO.unpack(described.raw)


def _load(program: bytes, name: str, log: ctypes.Array[ctypes.c_char] | None) -> int:
    buffer = ctypes.create_string_buffer(program, len(program))
    return _bpf_fd(
        PROG_LOAD,
        struct.pack(
            "<IIQQIIQII16s",
            *(PROG_TYPE_CGROUP_DEVICE, len(program) // 8, ctypes.addressof(buffer), ctypes.addressof(LICENSE)),
            *((1, len(log), ctypes.addressof(log)) if log else (0, 0, 0)),
            *(0, 0, name.encode()[:15]),
        ),
    )


def _bpf(command: int, attributes: bytes) -> ctypes.Array[ctypes.c_char]:
    """The attributes after the call; some commands answer in them."""
    buffer = ctypes.create_string_buffer(attributes, 128)  # zeros that an older kernel does not know are no error
    _call(command, buffer)
    return buffer


def _bpf_fd(command: int, attributes: bytes) -> int:
    return _call(command, ctypes.create_string_buffer(attributes, 128))


def _call(command: int, buffer: ctypes.Array[ctypes.c_char]) -> int:
    number = SYSCALL.get(platform.machine())
    if number is None:
        raise OSError(errno.ENOSYS, f"bpf(2) has no number here for {platform.machine()}")
    result: int = _syscall(ctypes.c_long(number), ctypes.c_int(command), buffer, ctypes.c_uint(len(buffer)))
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"bpf({command}): {os.strerror(code)}")
    return result
