"""The /dev of a running container, changed from outside: nodes made and removed in a directory tree that a tenant controls.

The tenant may have put symbolic links, mounts or other files anywhere, and may exchange them at any moment. So no path is ever
resolved: every step is one openat(2) with O_NOFOLLOW | O_DIRECTORY | O_PATH that must stay in the mount of /dev, and that must
be a tmpfs of the container's own, which the host has not mounted. Whatever the tenant exchanges afterwards lies in that tmpfs,
so what it can reach by winning a race is its own. Which mount a descriptor is in is read from /proc: to ask a file system of
the tenant's choice (FUSE) would be to wait for the tenant.

Where a volume brings the host's own devtmpfs into the container, for all of /dev or for /dev/bus/usb, the kernel makes and
removes the nodes itself: nothing is done there.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import stat
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import msgspec

from nodeagent.errors import AgentError, Reason
from nodeagent.host import HostRoot
from nodeagent.sandboxes.device_program import START_ANEW, DeviceNumbers, Kind

MAX_DEPTH = 8
MAX_PATH = 255
MAX_MOUNTINFO_BYTES = 1 << 22
DIRECTORY_MODE = 0o755
"""As runc makes the directories above a node (libcontainer/rootfs_linux.go)."""
STEP = os.O_PATH | os.O_NOFOLLOW | os.O_DIRECTORY | os.O_CLOEXEC
TEMPORARY = ".nodeagent-"
KIND_BITS: dict[Kind, int] = {"b": stat.S_IFBLK, "c": stat.S_IFCHR}


class HostNode(msgspec.Struct, frozen=True, kw_only=True):
    """A device node as the host has it: what one in a container is made after. `mode` has permission bits only."""

    path: str
    numbers: DeviceNumbers
    mode: int
    uid: int
    gid: int


class Mount(msgspec.Struct, frozen=True):
    """A line of mountinfo: the mount's id, the major:minor of its file system, the type, and whether it opens no devices."""

    id: int
    device: str
    kind: str
    nodev: bool


def words(path: str) -> tuple[str, ...]:
    """The names below /dev that lead to a node. Raises AgentError(MALFORMED) for a path that is not plainly below /dev."""
    parts = PurePosixPath(path).parts
    plain = 2 < len(parts) <= MAX_DEPTH + 2 and parts[:2] == ("/", "dev") and ".." not in parts and "\0" not in path
    if not plain or len(path) > MAX_PATH:
        raise AgentError(Reason.MALFORMED, f"{path!r} is no path of a device node below /dev")
    return parts[2:]


def host_node(host: HostRoot, path: str, numbers: DeviceNumbers) -> HostNode:
    """The host's node at `path`. Raises AgentError(DEVICE_UNPLUGGED) when it is gone or belongs to another device by now."""
    words(path)
    try:
        found = os.lstat(host.path(path))
    except OSError as error:
        raise AgentError(Reason.DEVICE_UNPLUGGED, f"{path}: {error.strerror}", hint="plug it in again") from error
    if not _is(found, numbers):
        raise AgentError(
            Reason.DEVICE_UNPLUGGED, f"{path} is not {numbers} any more", hint="the device was exchanged meanwhile"
        )
    return HostNode(
        path=path, numbers=numbers, mode=stat.S_IMODE(found.st_mode) & 0o777, uid=found.st_uid, gid=found.st_gid
    )


class _HostsOwn(Exception):
    """The walk has come into the host's devtmpfs."""


class ContainerDev:
    """The /dev below the root directory of a container. Made by `container_dev`; valid in its block."""

    def __init__(self, fd: int, mount: Mount, mounts: dict[int, Mount]) -> None:
        self._fd = fd
        self._mount = mount
        self._mounts = mounts

    def holds(self, node: HostNode) -> bool:
        """Whether the node is there already. Raises AgentError(NOT_SUPPORTED) when something else is, or is in the way."""
        *above, name = words(node.path)
        try:
            with self._directory(above, node.path) as directory:
                return _holds(directory, name, node)
        except FileNotFoundError:
            return False
        except _HostsOwn:
            return True

    def make(self, node: HostNode) -> None:
        """Make the node, and the directories above it, unless it is there. It appears at once with its owner and mode.

        Raises AgentError(NOT_SUPPORTED); then there is no node, perhaps a directory.
        """
        *above, name = words(node.path)
        try:
            with self._directory(above, node.path, make=True) as directory:
                self._make(directory, name, node)
        except OSError as error:
            raise _cannot(node.path, error) from error
        except _HostsOwn:
            return

    def remove(self, path: str, numbers: DeviceNumbers) -> bool:
        """Remove the node if it is exactly this one; whether it was. Raises AgentError(NOT_SUPPORTED) when it cannot.

        Between the look and the unlink the tenant may put something else there; then that is removed, from its own /dev.
        """
        *above, name = words(path)
        try:
            with self._directory(above, path) as directory:
                if not _is(os.stat(name, dir_fd=directory, follow_symlinks=False), numbers):
                    return False
                os.unlink(name, dir_fd=directory)
                return True
        except (FileNotFoundError, _HostsOwn):
            return False
        except OSError as error:  # EBUSY: mounted from the host, as runc does it in a user namespace
            raise _cannot(path, error) from error

    @contextlib.contextmanager
    def _directory(self, names: list[str], path: str, *, make: bool = False) -> Iterator[int]:
        """A descriptor of a directory below /dev. Raises FileNotFoundError, AgentError(NOT_SUPPORTED), _HostsOwn."""
        if self._mount.kind == "devtmpfs":
            raise _HostsOwn
        fd = os.dup(self._fd)
        try:
            for name in names:
                below = self._step(fd, name, path, make)
                os.close(fd)
                fd = below
            yield fd
        finally:
            os.close(fd)

    def _step(self, fd: int, name: str, path: str, make: bool) -> int:
        made = False
        if make:
            with contextlib.suppress(FileExistsError):
                os.mkdir(name, 0o700, dir_fd=fd)
                made = True
        try:
            below = os.open(name, STEP, dir_fd=fd)
        except FileNotFoundError:
            raise
        except OSError as error:
            raise _cannot(path, error) from error
        try:
            self._stays(below, name, path)
            if made:
                _by_descriptor(below).chmod(DIRECTORY_MODE)  # the umask does not count
        except BaseException:
            os.close(below)
            raise
        return below

    def _stays(self, fd: int, name: str, path: str) -> None:
        mount_id = _mount_id(fd)
        if mount_id == self._mount.id:
            return
        mount = self._mounts.get(mount_id)
        if mount is not None and mount.kind == "devtmpfs":
            raise _HostsOwn
        raise AgentError(
            Reason.NOT_SUPPORTED,
            f"{path}: something is mounted at {name!r} in the container",
            hint=f"mount nothing below its /dev/{words(path)[0]} but the host's own; {START_ANEW}",
        )

    def _make(self, directory: int, name: str, node: HostNode) -> None:
        """Made under another name without any permission, given owner and mode by its descriptor, and linked from there.

        linkat(2) replaces nothing and takes the inode that was looked at, whatever its first name means by then.
        """
        if _holds(directory, name, node):
            return
        temporary = TEMPORARY + secrets.token_hex(8)
        device = os.makedev(node.numbers.major, node.numbers.minor)
        os.mknod(temporary, KIND_BITS[node.numbers.kind], device, dir_fd=directory)
        try:
            fd = os.open(temporary, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=directory)
            try:
                if _mount_id(fd) != self._mount.id or not _is(os.fstat(fd), node.numbers):
                    raise OSError(errno.EBUSY, "what is made there is exchanged at once")
                os.chown(_by_descriptor(fd), node.uid, node.gid)
                _by_descriptor(fd).chmod(node.mode)
                try:
                    os.link(_by_descriptor(fd), name, dst_dir_fd=directory, follow_symlinks=True)
                except FileExistsError:
                    if not _holds(directory, name, node):
                        raise
            finally:
                os.close(fd)
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(temporary, dir_fd=directory)


@contextlib.contextmanager
def container_dev(host: HostRoot, root_fd: int, mountinfo: bytes) -> Iterator[ContainerDev]:
    """The /dev below `root_fd`, an O_PATH descriptor of the root directory of the container's first process, whose own
    /proc/<pid>/mountinfo is given.

    Raises AgentError(NOT_SUPPORTED) when /dev is neither a tmpfs of the container's own nor the host's devtmpfs, or is one that
    opens no devices.
    """
    mounts = _mounts(mountinfo)
    try:
        fd = os.open("dev", STEP, dir_fd=root_fd)
    except OSError as error:
        raise _cannot("/dev", error) from error
    try:
        mount = mounts.get(_mount_id(fd))
        shared = mount is None or mount.device in {m.device for m in _mounts(_host_mountinfo(host)).values()}
        if mount is None or mount.kind not in ("tmpfs", "devtmpfs") or (mount.kind == "tmpfs" and shared):
            raise AgentError(
                Reason.NOT_SUPPORTED,
                "the container's /dev is not a tmpfs of its own",
                hint=f"mount no volume at its /dev; {START_ANEW}",
            )
        if mount.nodev:
            raise AgentError(
                Reason.NOT_SUPPORTED,
                "the container's /dev is mounted nodev: no node in it can be opened",
                hint=START_ANEW,
            )
        yield ContainerDev(fd, mount, mounts)
    finally:
        os.close(fd)


def _mounts(mountinfo: bytes) -> dict[int, Mount]:
    """A table of mounts by their id (proc(5), mountinfo)."""
    if len(mountinfo) > MAX_MOUNTINFO_BYTES:
        raise AgentError(Reason.TOO_LARGE, f"a table of mounts is longer than {MAX_MOUNTINFO_BYTES} bytes")
    table = {}
    for line in mountinfo.decode(errors="replace").splitlines():
        left, _, right = line.partition(" - ")
        fields = left.split(" ")
        if len(fields) > 5 and fields[0].isdigit():
            mount = Mount(int(fields[0]), fields[2], right.split(" ")[0], "nodev" in fields[5].split(","))
            table[mount.id] = mount
    return table


def _host_mountinfo(host: HostRoot) -> bytes:
    with host.path("/proc/1/mountinfo").open("rb") as file:
        return file.read(MAX_MOUNTINFO_BYTES + 1)


def _mount_id(fd: int) -> int:
    """The mount that a descriptor is in; it cannot go away while the descriptor is open (proc(5), fdinfo)."""
    text = Path(f"/proc/self/fdinfo/{fd}").read_text()
    return int(next(line for line in text.splitlines() if line.startswith("mnt_id:")).split()[1])


def _holds(directory: int, name: str, node: HostNode) -> bool:
    try:
        found = os.stat(name, dir_fd=directory, follow_symlinks=False)
    except FileNotFoundError:
        return False
    if _is(found, node.numbers):
        return True
    what = "another device" if stat.S_ISCHR(found.st_mode) or stat.S_ISBLK(found.st_mode) else "no device node"
    raise AgentError(
        Reason.NOT_SUPPORTED, f"{node.path} is {what} in the container", hint=f"remove it there, or {START_ANEW}"
    )


def _is(found: os.stat_result, numbers: DeviceNumbers) -> bool:
    device = os.makedev(numbers.major, numbers.minor)
    return stat.S_IFMT(found.st_mode) == KIND_BITS[numbers.kind] and found.st_rdev == device


def _by_descriptor(fd: int) -> Path:
    """A path to what an O_PATH descriptor means: fchownat(2) has AT_EMPTY_PATH, fchmodat(2) only since Linux 6.6."""
    return Path(f"/proc/self/fd/{fd}")


def _cannot(path: str, error: OSError) -> AgentError:
    return AgentError(
        Reason.NOT_SUPPORTED, f"{path} cannot be changed in the container: {error.strerror}", hint=START_ANEW
    )
