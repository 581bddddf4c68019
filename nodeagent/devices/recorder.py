"""Makes recordings: reads what sysfs shows of USB devices, and hears what the kernel says, without serial numbers.

What is taken is an allow-list of attributes, by the kind of directory they stand in; nothing is taken from anywhere else.
"""

from __future__ import annotations

import os
import re
import select
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec

from nodeagent.devices import serials, sysfs
from nodeagent.devices.recording import COMPONENT, MAX_DIRECTORIES, MAX_UEVENTS, Tree, Uevent
from nodeagent.devices.udev import BELOW_USB
from nodeagent.errors import AgentError, Reason
from nodeagent.host import HostRoot
from nodeagent.wire import descriptors

DEVICE_FILES = frozenset({
    "authorized", "bConfigurationValue", "bDeviceClass", "bDeviceProtocol", "bDeviceSubClass", "bMaxPacketSize0", "bMaxPower",
    "bNumConfigurations", "bNumInterfaces", "bcdDevice", "bmAttributes", "busnum", "dev", "descriptors", "devnum", "devpath",
    "idProduct", "idVendor", "manufacturer", "maxchild", "product", "removable", "serial", "speed", "uevent", "version",
})  # fmt: skip
INTERFACE_FILES = frozenset({
    "authorized", "bAlternateSetting", "bInterfaceClass", "bInterfaceNumber", "bInterfaceProtocol", "bInterfaceSubClass",
    "bNumEndpoints", "iad_bFirstInterface", "iad_bFunctionClass", "iad_bFunctionProtocol", "iad_bFunctionSubClass",
    "iad_bInterfaceCount", "ieee1284_id", "uevent",
})  # fmt: skip
PORT_FILES = frozenset({"connect_type"})
OTHER_FILES = frozenset({"dev", "report_descriptor", "uevent"})
"""Of what drivers made below an interface: input, hidraw, sound, block, tty, net."""
BINARY = frozenset({"descriptors", "report_descriptor"})
LINKS = frozenset({"driver", "port", "subsystem"})

MAX_VALUE_BYTES = descriptors.MAX_BYTES
MAX_TAKEN_BYTES = 16 << 20


class Recorder:
    """Reads directories of one host; remembers the serial numbers that it met, so that each has one stand-in."""

    def __init__(self, host: HostRoot) -> None:
        self._host = host
        self._root = host.root.resolve()
        self._bytes = 0
        self.stand_ins = serials.StandIns()

    def tree(self, ports: Sequence[str] = ()) -> Tree:
        """All devices, or those at these ports with what is plugged into them and the hubs on their way.

        Raises AgentError (device_unknown) for a port without a device. Blocks on sysfs.
        """
        tops = self._tops()
        if missing := [port for port in ports if port not in tops]:
            there = ", ".join(sorted(tops)) or "none"
            raise AgentError(
                Reason.DEVICE_UNKNOWN, f"there is no USB device at port {', '.join(missing)}", hint=f"ports: {there}"
            )
        wanted = [top for port, top in tops.items() if not ports or any(_within(port, chosen) for chosen in ports)]
        read: dict[str, _Read] = {}
        for top in wanted:
            on_the_way = [hub for hub in tops.values() if hub != top and top.is_relative_to(hub)]
            for directory in (*(d for hub in on_the_way for d in _hub(hub, top)), *_below(top)):
                if len(read) < MAX_DIRECTORIES and self._name(directory) not in read:
                    read[self._name(directory)] = self._read(directory)
        for name, found in read.items():
            serials.learn(name.rpartition("/")[2], found.texts, self.stand_ins)
        return {
            serials.path(name, self.stand_ins): files
            for name, found in sorted(read.items())
            if (files := self._files(name, found))
        }

    def directory(self, devpath: str) -> dict[str, str]:
        """What the directory of a kernel event holds now; nothing when it has gone already."""
        top = self._host.path(f"/sys{devpath}")
        if not top.is_dir():
            return {}
        found = self._read(top)
        serials.learn(top.name, found.texts, self.stand_ins)
        return self._files(f"/sys{devpath}", found)

    def path(self, devpath: str) -> str:
        """The path of a kernel event as the recording has it."""
        return serials.path(devpath, self.stand_ins)

    def _tops(self) -> dict[str, Path]:
        sys = self._host.path("/sys").resolve()
        tops = {}
        for path in sysfs.usb_paths(self._host)[: sysfs.MAX_DEVICES]:
            top = self._host.path(path).resolve()
            if top.is_relative_to(sys) and sys.is_relative_to(self._root) and top.is_dir():
                tops[top.name] = top
        return tops

    def _name(self, directory: Path) -> str:
        return f"/{directory.relative_to(self._root)}"

    def _read(self, directory: Path) -> _Read:
        try:
            names = {entry.name for entry in os.scandir(directory) if not entry.is_dir(follow_symlinks=False)}
        except OSError:
            return _Read({}, {}, {})
        if "idVendor" in names:
            kept = DEVICE_FILES
        elif "bInterfaceNumber" in names:
            kept = INTERFACE_FILES
        else:
            kept = PORT_FILES if "connect_type" in names else OTHER_FILES
        texts: dict[str, str] = {}
        binaries: dict[str, bytes] = {}
        for name in sorted(names & kept):
            data = self._bytes_of(directory / name)
            if data is None:
                continue
            if name in BINARY:
                binaries[name] = data
            else:
                texts[name] = data.decode(errors="replace").removesuffix("\n")
        links = {name: where for name in sorted(names & LINKS) if (where := self._target(directory / name))}
        return _Read(texts, binaries, links if texts or binaries else {})

    def _bytes_of(self, path: Path) -> bytes | None:
        try:
            with path.open("rb") as file:
                data = file.read(MAX_VALUE_BYTES)
        except OSError:
            return None
        self._bytes += len(data)
        if self._bytes > MAX_TAKEN_BYTES:
            raise AgentError(
                Reason.TOO_LARGE,
                f"the devices have more than {MAX_TAKEN_BYTES >> 20} MiB to record",
                hint="name the ports of some",
            )
        return data

    def _target(self, link: Path) -> str:
        """Where a link of sysfs leads, below /sys; nothing when it leads elsewhere."""
        try:
            where = os.path.normpath(link.parent / link.readlink())
        except OSError:
            return ""
        sys = str(self._root / "sys")
        return where.removeprefix(sys) if where.startswith(f"{sys}/") else ""

    def _files(self, name: str, found: _Read) -> dict[str, str]:
        texts = serials.remove(name.rpartition("/")[2], found.texts, self.stand_ins)
        return {
            **{name: _escaped(text) for name, text in texts.items()},
            **{name: f"hex:{data.hex()}" for name, data in found.binaries.items()},
            **{name: f"->{where}" for name, where in found.links.items()},
        }


class _Read(msgspec.Struct, frozen=True):
    texts: dict[str, str]
    binaries: dict[str, bytes]
    links: dict[str, str]


def _within(port: str, chosen: str) -> bool:
    """`1-1.4` is plugged into `1-1`, and everything of bus 1 into `usb1`."""
    bus = chosen.removeprefix("usb")
    return port == chosen or port.startswith((f"{chosen}.", f"{bus}-" if bus != chosen else f"{chosen}."))


def _hub(hub: Path, top: Path) -> Iterator[Path]:
    """A hub on the way to a device: itself, its interfaces, and the port that leads on."""
    yield hub
    number = re.split(r"[-.]", top.relative_to(hub).parts[0])[-1]
    for interface in (name for name in _directories(hub) if ":" in name):
        yield hub / interface
        for port in _directories(hub / interface):
            if re.search(rf"port{number}$", port):
                yield hub / interface / port


def _below(top: Path) -> Iterator[Path]:
    """The directories of one device, not those of devices plugged into it."""
    stack = [(top, 0)]
    looked = 0
    while stack and looked < sysfs.MAX_DIRECTORIES:
        directory, depth = stack.pop()
        looked += 1
        if depth and (directory / "idVendor").exists():
            continue
        yield directory
        if depth < sysfs.MAX_DEPTH:
            inside = reversed(_directories(directory))
            wanted = (n for n in inside if n not in sysfs.BUSY and not n.startswith("ep_"))
            stack.extend((directory / name, depth + 1) for name in wanted)


def _directories(directory: Path) -> list[str]:
    """The names of the directories in one, none when it is gone; a name that no recording could give out again is left out."""
    try:
        found = [entry.name for entry in os.scandir(directory) if entry.is_dir(follow_symlinks=False)]
    except OSError:
        return []
    return sorted(name for name in found if COMPONENT.fullmatch(name))


def _escaped(text: str) -> str:
    """A device may call itself `->/etc`."""
    return f"hex:{text.encode().hex()}" if text.startswith(("hex:", "->")) else text


class Event(msgspec.Struct, frozen=True):
    """What the kernel said, `at_s` seconds after listening began."""

    at_s: float
    action: str
    devpath: str


class KernelEvents:
    """What the kernel says about USB devices from now on. Raises ImportError without libudev, OSError without netlink."""

    def __init__(self, pattern: re.Pattern[str] = BELOW_USB) -> None:
        import pyudev  # loads libudev; captured trees are recorded without it

        self._pattern = pattern
        self._monitor: Any = pyudev.Monitor.from_netlink(pyudev.Context(), source="kernel")
        self._monitor.start()
        self._began = time.monotonic()

    def heard(self, seconds: float) -> Iterator[Event]:
        """The events as they come, until so many seconds after the beginning, at most MAX_UEVENTS.

        Blocks. Raises OSError (ENOBUFS) when more came than the socket holds.
        """
        count = 0
        while count < MAX_UEVENTS and (left := self._began + seconds - time.monotonic()) > 0:
            if not select.select([self._monitor.fileno()], [], [], left)[0]:
                return
            device = self._monitor.poll(timeout=0)
            if device is not None and self._pattern.search(device.device_path):
                count += 1
                yield Event(round(time.monotonic() - self._began, 3), str(device.action), device.device_path)


def uevent(recorder: Recorder, event: Event) -> Uevent:
    """The event, with what its directory holds now."""
    files = {} if event.action == "remove" else recorder.directory(event.devpath)
    return Uevent(at_s=event.at_s, action=event.action, devpath=recorder.path(event.devpath), files=files)
