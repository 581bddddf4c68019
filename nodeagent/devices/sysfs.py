"""USB devices as sysfs shows them, live or captured. Every read is bounded and may find nothing: devices leave while read.

What is a fact for as long as a device stays plugged is read once (`known`): its texts, because the kernel takes the
device's lock to show them and a device stuck in a reset holds it for half a minute (drivers/usb/core/sysfs.c,
usb_string_attr); what its drivers told (HID usages, IEEE 1284 id), because a program that takes the device over through
libusb, as CUPS's usb back end does, unbinds the driver and the attribute goes away. `bConfigurationValue` takes that lock
too; the active configuration is read off the names of the interfaces' directories, `<port>:<configuration>.<number>`.
"""

from __future__ import annotations

import logging
import os
import re
import unicodedata
from collections import defaultdict
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import msgspec

from nodeagent.host import HostRoot
from nodeagent.model import DeviceNode, Interface, UsbDevice
from nodeagent.wire import descriptors, hid

log = logging.getLogger(__name__)

BUS = "/sys/bus/usb/devices"
MAX_DEVICES = 1024
"""Devices of one node; a bus holds 127."""
MAX_TEXT = 126
"""A string descriptor holds 126 UTF-16 units (USB 2.0, 9.6.7)."""
MAX_ID_TEXT = 1024
MAX_INTERFACES = 32
"""USB_MAXINTERFACES of the kernel."""
MAX_NODES = 64
MAX_DIRECTORIES = 256
"""Looked into below one device; a headset has about 30."""
MAX_DEPTH = 10
"""A partition of a stick is 8 below its device."""
MAX_CONNECT_TYPE = 16
PIECE_BYTES = 16 << 10
UNSHOWN = frozenset({"Cc", "Cf", "Cs", "Co"})
BUSY = frozenset({"power", "queue", "statistics", "integrity", "mq", "trace", "holders", "slaves", "leds", "wakeup"})
"""Directories that hold no nodes and many files."""


def usb_paths(host: HostRoot) -> list[str]:
    """The host's path of every USB device, hubs too, by walking sysfs; empty where there is no USB."""
    try:
        names = [entry.name for entry in host.path(BUS).iterdir()]
    except OSError:
        return []
    return [f"{BUS}/{name}" for name in sorted(names) if ":" not in name]


class _Below:
    """What was found in the directories below a device."""

    def __init__(self) -> None:
        self.interfaces: list[Interface] = []
        self.nodes: list[DeviceNode] = []
        self.usages: dict[int, tuple[int, ...]] = {}
        self.ieee1284_id = ""
        self.configuration = 0


def read_devices(host: HostRoot, paths: Sequence[str], known: Mapping[str, UsbDevice]) -> tuple[UsbDevice, ...]:
    """The devices at these sysfs paths that are configured and authorised, by port; `known` is the last answer, by port."""
    if len(paths) > MAX_DEVICES:
        log.warning("%d USB devices; those after the first %d are not looked at", len(paths), MAX_DEVICES)
    root, sys = host.root.resolve(), host.path("/sys").resolve()
    if not sys.is_relative_to(root):
        return ()
    tops = (_directory(host.path(path), sys) for path in paths[:MAX_DEVICES])
    found = (_read_device(top, f"/{top.relative_to(root)}", known) for top in tops if top is not None)
    return tuple(sorted((usb for usb in found if usb is not None), key=lambda usb: usb.port))


def _read_device(top: Path, sysfs: str, known: Mapping[str, UsbDevice]) -> UsbDevice | None:
    """One device; None for what is none: a hub, a device that is going, not yet configured, or not authorised."""
    attribute = partial(_text, str(top))
    # A device behind `authorized` 0 is blocked by its administrator (USBGuard); it has no interfaces either.
    if attribute("bDeviceClass") == "09" or attribute("authorized") == "0":
        return None
    vendor, product = _hex(attribute("idVendor"), 4), _hex(attribute("idProduct"), 4)
    if vendor is None or product is None:
        return None
    below = _below(top)
    # Between its appearance and its configuration a device has no interfaces, so nobody could say what it is.
    if not below.interfaces:
        return None
    before = known.get(top.name)
    if before and not _same_stay(before, vendor, product, below.nodes):
        before = None
    usages = {i.number: i.hid_usages for i in before.interfaces} if before else {}
    interfaces, types = _with_settings(top, below, before)
    return UsbDevice(
        port=top.name,
        vendor=vendor,
        product=product,
        serial=(before and before.serial) or clean(attribute("serial")),
        manufacturer=(before and before.manufacturer) or clean(attribute("manufacturer")),
        name=(before and before.name) or clean(attribute("product")),
        interfaces=tuple(
            msgspec.structs.replace(i, hid_usages=below.usages.get(i.number) or usages.get(i.number, ()))
            for i in interfaces
        ),
        interface_types=types,
        nodes=tuple(sorted(below.nodes, key=lambda n: (n.interface, n.path))),
        ieee1284_id=below.ieee1284_id or (before.ieee1284_id if before else ""),
        connect_type=(before and before.connect_type) or _connect_type(top),
        sysfs=sysfs,
    )


def _same_stay(before: UsbDevice, vendor: int, product: int, nodes: list[DeviceNode]) -> bool:
    """It was not unplugged in between: each stay on the bus has a number of its own, and with it another usbfs node."""
    stay = [n for n in nodes if n.interface < 0 and n.subsystem == "usb"]
    return bool(stay) and stay[0] in before.nodes and (before.vendor, before.product) == (vendor, product)


def _with_settings(top: Path, below: _Below, before: UsbDevice | None) -> tuple[tuple[Interface, ...], tuple[str, ...]]:
    """The interfaces with their alternate settings, and the types of all settings of the active configuration.

    The descriptors are read again when an interface was switched to another setting or another configuration was chosen.
    """
    found = tuple(sorted(below.interfaces))
    if before and before.interface_types:
        known = {(i.number, i.triple): i.alternates for i in before.interfaces}
        if [*known] == [(i.number, i.triple) for i in found]:
            kept = (msgspec.structs.replace(i, alternates=known[i.number, i.triple]) for i in found)
            return tuple(kept), before.interface_types
    try:
        taken = descriptors.take_descriptors(_bytes(str(top), "descriptors", descriptors.MAX_BYTES))
    except ValueError as error:
        log.debug("%s: %s", top, error)
        return found, ()
    alternates = defaultdict[int, list[str]](list)
    settings = taken.settings(below.configuration)
    for setting in settings:
        alternates[setting.number].append(setting.triple)
    several = {number: tuple(triples) for number, triples in alternates.items() if len(triples) > 1}
    return (
        tuple(msgspec.structs.replace(i, alternates=several.get(i.number, ())) for i in found),
        tuple(setting.triple for setting in settings),
    )


def _connect_type(top: Path) -> str:
    """The kernel's word for the port that the device sits in; empty where it has none.

    The device's link `port` leads to the port. Older kernels lack the link, but the port is a child of its hub's interface
    all the same, `port3` at first and now `usb1-port3` (drivers/usb/core/port.c).
    """
    hub, number = top.parent.name, re.split(r"[-.]", top.name)[-1]
    interface = top.parent / (f"{hub[3:]}-0:1.0" if hub.startswith("usb") else f"{hub}:1.0")
    for port in (top / "port", interface / f"{hub}-port{number}", interface / f"port{number}"):
        if found := clean(_text(str(port), "connect_type"), MAX_CONNECT_TYPE):
            return found
    return ""


def clean(untrusted_text: str, limit: int = MAX_TEXT) -> str:
    """A device's text without control, format, surrogate and private characters (a terminal or a log would obey them),
    on one line, at most `limit` characters."""
    kept = "".join(
        " " if c.isspace() else c for c in untrusted_text if c.isspace() or unicodedata.category(c) not in UNSHOWN
    )
    return " ".join(kept.split())[:limit].rstrip()


def _directory(link: Path, sys: Path) -> Path | None:
    """The device's own directory; None when it is gone or, in a captured tree, a link that leads out of it."""
    try:
        real = link.resolve(strict=True)
    except (OSError, RuntimeError):
        return None
    return real if real.is_relative_to(sys) else None


def _hex(text: str, digits: int) -> int | None:
    return int(text, 16) if re.fullmatch(rf"[0-9a-fA-F]{{{digits}}}", text) else None


def _below(top: Path) -> _Below:
    """Walk the device's directories, not those of devices plugged into it."""
    found = _Below()
    stack = [(str(top), -1, 0)]
    looked = 0
    while stack and looked < MAX_DIRECTORIES:
        directory, interface, depth = stack.pop()
        looked += 1
        try:
            with os.scandir(directory) as entries:
                files, directories = set(), []
                for entry in entries:
                    if entry.is_dir(follow_symlinks=False):
                        directories.append(entry.name)
                    else:
                        files.add(entry.name)
        except OSError:
            continue
        if depth and "idVendor" in files:
            continue
        if "bInterfaceNumber" in files and len(found.interfaces) < MAX_INTERFACES:
            read = _interface(directory)
            if read is not None:
                found.interfaces.append(read)
                interface = read.number
                found.configuration = _configuration(directory)
            if "ieee1284_id" in files:
                found.ieee1284_id = clean(_text(directory, "ieee1284_id"), MAX_ID_TEXT)
        if "report_descriptor" in files:
            found.usages[interface] = _usages(directory)
        if "dev" in files and len(found.nodes) < MAX_NODES and (node := _node(directory, interface)):
            found.nodes.append(node)
        if depth < MAX_DEPTH:
            wanted = (n for n in sorted(directories, reverse=True) if n not in BUSY and not n.startswith("ep_"))
            stack.extend((f"{directory}/{name}", interface, depth + 1) for name in wanted)
    if stack:
        log.debug("%s: more than %d directories below it; the rest was not looked at", top, MAX_DIRECTORIES)
    return found


def _interface(directory: str) -> Interface | None:
    names = ("bInterfaceNumber", "bInterfaceClass", "bInterfaceSubClass", "bInterfaceProtocol")
    number, cls, subclass, protocol = (_hex(_text(directory, name), 2) for name in names)
    if number is None or cls is None or subclass is None or protocol is None:
        return None
    return Interface(number, cls, subclass, protocol)


def _configuration(directory: str) -> int:
    """The kernel names the directory of an interface `<port>:<configuration>.<number>` (drivers/usb/core/message.c)."""
    named = re.search(r":([0-9]{1,3})\.[0-9]{1,3}$", directory)
    return int(named[1]) if named else 0


def _usages(directory: str) -> tuple[int, ...]:
    try:
        return hid.usages(_bytes(directory, "report_descriptor", hid.MAX_DESCRIPTOR))
    except ValueError as error:
        log.debug("%s: %s", directory, error)
        return ()


def _node(directory: str, interface: int) -> DeviceNode | None:
    """The node that udev or devtmpfs made for this directory, from its uevent file (Documentation/ABI/testing/sysfs-uevent)."""
    lines = _text(directory, "uevent").splitlines()
    event = dict(line.split("=", 1) for line in lines if "=" in line)
    name, major, minor = event.get("DEVNAME", ""), event.get("MAJOR", ""), event.get("MINOR", "")
    if not re.fullmatch(r"[A-Za-z0-9._:!+-]+(/[A-Za-z0-9._:!+-]+)*", name) or ".." in name.split("/"):
        return None
    if not (re.fullmatch(r"[0-9]{1,7}", major) and re.fullmatch(r"[0-9]{1,7}", minor)):
        return None
    try:
        subsystem = Path(directory, "subsystem").readlink().name
    except OSError:
        return None
    return DeviceNode(f"/dev/{name}", subsystem, int(major), int(minor), interface)


def _bytes(directory: str, name: str, limit: int) -> bytes:
    try:
        with open(f"{directory}/{name}", "rb") as file:
            found = b""
            while len(found) <= limit and (piece := file.read(min(PIECE_BYTES, limit + 1 - len(found)))):
                found += piece
            return found
    except OSError:
        return b""


def _text(directory: str, name: str) -> str:
    return _bytes(directory, name, 4096).decode(errors="replace").strip("\0\n\t ")
