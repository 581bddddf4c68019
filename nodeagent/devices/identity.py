"""Who a device is: the node's secret key, and device ids that are stable and say nothing.

An id is `<class>-` and 20 base32 characters (100 bits) of HMAC-SHA256 over what the device says of itself, so it
survives replug and restart, and whoever reads it learns no serial number. A new key means new ids.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import logging
import os
import re
import stat
from base64 import b32encode
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from types import MappingProxyType

import msgspec

from nodeagent.devices.matching import Kind
from nodeagent.errors import AgentError, Reason
from nodeagent.host import sync_directory, write_atomically
from nodeagent.model import Device, DeviceClass, UsbDevice

log = logging.getLogger(__name__)

KEY_BYTES = 32
KEY_NAME = "node.key"
ID_CHARS = 20
DEVICE_ID = re.compile(rf"({'|'.join(DeviceClass)})-[a-z2-7]{{{ID_CHARS}}}")
TWINS_NAME = "twins.json"
MAX_TWINS = 1024
MAX_TWINS_BYTES = 1 << 20


def node_key(state_dir: Path) -> bytes:
    """The node's key, made once. Blocks on the disk.

    Raises AgentError (state_invalid) when the file is not exactly ours: a key that others could read or that was cut short
    is never used and never replaced, because new ids would orphan every lease.
    """
    path = state_dir / KEY_NAME
    try:
        return _read(path)
    except FileNotFoundError:
        pass
    except OSError as error:
        raise _invalid(
            path, error.strerror or "cannot be read", "it must be a plain file that only root can read"
        ) from error
    try:
        made = _create(path)
    except OSError as error:
        raise _invalid(path, f"cannot be made: {error.strerror}", "state_dir must exist and be writable") from error
    if made:
        log.warning("%s: made a new node key; device ids of an earlier key are void", path)
    return _read(path)


def _read(path: Path) -> bytes:
    # O_NONBLOCK: a FIFO in its place must not hang the start.
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        found = os.fstat(fd)
        if not stat.S_ISREG(found.st_mode):
            raise _invalid(path, "is not a plain file", "move it away")
        if found.st_uid != os.geteuid():
            raise _invalid(path, f"belongs to uid {found.st_uid}", f"chown {os.geteuid()} {path}")
        if stat.S_IMODE(found.st_mode) & 0o077:
            raise _invalid(
                path, f"has mode {stat.S_IMODE(found.st_mode):04o}, others can reach it", f"chmod 600 {path}"
            )
        key = os.read(fd, KEY_BYTES + 1)
    finally:
        os.close(fd)
    if len(key) != KEY_BYTES:
        raise _invalid(
            path,
            f"has {found.st_size} bytes instead of {KEY_BYTES}",
            "restore it from a backup, or delete it: every device then gets a new id",
        )
    return key


def _create(path: Path) -> bool:
    """Put a whole, synced key in place in one step; False when another process was first, whose key then counts."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{os.urandom(4).hex()}")
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        try:
            os.fchmod(fd, 0o600)
            os.write(fd, os.urandom(KEY_BYTES))
            os.fsync(fd)
        finally:
            os.close(fd)
        made = False
        with contextlib.suppress(FileExistsError):
            os.link(temporary, path)  # unlike rename, never replaces
            made = True
    finally:
        temporary.unlink(missing_ok=True)
    sync_directory(path.parent)
    return made


def _invalid(path: Path, what: str, hint: str) -> AgentError:
    return AgentError(Reason.STATE_INVALID, f"{path}: {what}", hint=hint)


def device_id(key: bytes, cls: DeviceClass, usb: UsbDevice, *, by_port: bool = False) -> str:
    """`<class>-<20 characters>`: base32, lower case, of HMAC-SHA256(key, vendor NUL product NUL kind NUL text).

    Vendor and product are four hexadecimal digits; kind and text are `serial` and the serial number, or `port` and the
    port path when there is no serial number or `by_port` asks for it.
    """
    kind, text = ("port", usb.port) if by_port or not usb.serial else ("serial", usb.serial)
    message = "\0".join((f"{usb.vendor:04x}", f"{usb.product:04x}", kind, text)).encode()
    digest = hmac.new(key, message, hashlib.sha256).digest()
    return f"{cls}-{b32encode(digest).decode().lower()[:ID_CHARS]}"


def twin_mark(key: bytes, usb: UsbDevice) -> str:
    """What is remembered of a vendor, product and serial number that more than one device has: 32 hex digits, keyed."""
    message = "\0".join((f"{usb.vendor:04x}", f"{usb.product:04x}", "twins", usb.serial)).encode()
    return hmac.new(key, message, hashlib.sha256).hexdigest()[:32]


def twins(found: Iterable[UsbDevice]) -> frozenset[tuple[str, ...]]:
    """The ports of devices that cannot be told apart: same vendor, product and serial number, one tuple for each kind."""
    ports = defaultdict[tuple[int, int, str], set[str]](set)
    for usb in found:
        if usb.serial:
            ports[usb.vendor, usb.product, usb.serial].add(usb.port)
    return frozenset(tuple(sorted(same)) for same in ports.values() if len(same) > 1)


def identify(
    key: bytes,
    found: Iterable[tuple[Kind, UsbDevice]],
    known_twins: Collection[str] = (),
    anchors: Mapping[str, str] = MappingProxyType({}),
) -> dict[str, Device]:
    """Devices by id.

    Nobody can say which of several twins is which, so they are known by their ports, also while only one of them is there
    (`known_twins`: their marks). The exception is one that is held since before it had a twin: while it sits at its port
    (`anchors`: id by serial number -> port) it keeps its id, because a stranger who plugs in a twin must not end a seat.
    """
    found = tuple(found)
    ambiguous = {port for ports in twins(usb for _, usb in found) for port in ports}
    devices = {}
    for kind, usb in found:
        name = device_id(key, kind.part.cls, usb)
        if usb.serial and (usb.port in ambiguous or (known_twins and twin_mark(key, usb) in known_twins)):
            by_port = anchors.get(name) != usb.port
            name = device_id(key, kind.part.cls, usb, by_port=by_port)
        whole = len(kind.part.interfaces) == len(usb.interfaces)
        devices[name] = Device(
            id=name,
            cls=kind.part.cls,
            usb=usb,
            interfaces=() if whole else kind.part.interfaces,
            natural=None if kind.natural is kind.part.cls else kind.natural,
        )
    return devices


class TwinMemory:
    """The marks of twins that were ever seen, and the anchored ids, in `state_dir/twins.json`. Methods block on the disk.

    A file that cannot be read is as good as none: ids by serial number then hold until twins meet again.
    """

    def __init__(self, state_dir: Path) -> None:
        self._path = state_dir / TWINS_NAME
        self.marks: frozenset[str] = frozenset()
        self.anchors: dict[str, str] = {}

    def load(self) -> None:
        try:
            stored = msgspec.json.decode(self._path.read_bytes()[:MAX_TWINS_BYTES], type=_StoredTwins)
        except FileNotFoundError:
            return
        except (OSError, msgspec.DecodeError, UnicodeDecodeError) as error:
            log.warning("%s cannot be read (%s); it is begun anew", self._path, error)
            return
        self.marks, self.anchors = frozenset(stored.marks), stored.anchors

    def save(self) -> None:
        """Raises OSError."""
        stored = _StoredTwins(tuple(sorted(self.marks)[:MAX_TWINS]), dict(sorted(self.anchors.items())[:MAX_TWINS]))
        write_atomically(self._path, msgspec.json.encode(stored))


class _StoredTwins(msgspec.Struct, frozen=True):
    marks: tuple[str, ...] = ()
    anchors: dict[str, str] = {}
