"""Hotplug: the kernel's device events through libudev.

The events come from the kernel's own group, not from udevd: libudev leaves the udevd group silent, without an error, where
/run/udev/control is not mounted (systemd, sd_device_monitor), as in a pod; and sysfs, which we read, is ready when the
kernel speaks. Every network namespace of the initial user namespace hears those events, so a pod would do in principle;
the socket is opened in the host's all the same, where nobody has to rely on that.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import re
import threading
from functools import cache
from typing import Any, Protocol

import msgspec

from nodeagent.devices import sysfs
from nodeagent.host import HostRoot

log = logging.getLogger(__name__)

CLONE_NEWNET = 0x40000000
EVENTS_A_TURN = 64
"""Events that one `take()` decodes, at 30 microseconds each, before the event loop gets its turn again."""
DATAGRAMS_A_DISCARD = 16384
DATAGRAM_BYTES = 8192
"""A kernel event fits into 2048 bytes plus header (UEVENT_BUFFER_SIZE)."""

BELOW_USB = re.compile(r"/usb[0-9]+/")
"""In the path of every device on a USB bus and of whatever its drivers make; other buses of a busy node stay out."""


PORT = re.compile(r"/([0-9]+-[0-9]+(?:\.[0-9]+)*)(?=/|$)")
"""A device on a bus, in the path of whatever is below it; below a hub there are several in a row."""


class Heard(msgspec.Struct, frozen=True):
    """What some events say: the ports whose devices came, went or changed, and whether anything USB was among them.

    `lost`: which ports there were cannot be told, everything has to be looked at. `more`: events are still waiting.
    """

    usb: bool = False
    ports: frozenset[str] = frozenset()
    lost: bool = False
    more: bool = False


class Hotplug(Protocol):
    """A descriptor that becomes readable when something was plugged."""

    def fileno(self) -> int: ...

    def take(self) -> Heard:
        """Take some waiting events (EVENTS_A_TURN at most). Never waits."""
        ...

    def discard(self) -> None:
        """Throw away what is waiting: the caller is about to look for itself."""
        ...

    def close(self) -> None: ...


class UdevHotplug:
    """The kernel's events of this network namespace. Raises ImportError without libudev, OSError without netlink."""

    def __init__(self, pattern: re.Pattern[str] = BELOW_USB) -> None:
        import pyudev  # loads libudev; captured trees are read without it

        self._pattern = pattern
        self._monitor: Any = pyudev.Monitor.from_netlink(pyudev.Context(), source="kernel")
        self._monitor.start()
        self._fd: int = self._monitor.fileno()

    def fileno(self) -> int:
        return self._fd

    def take(self) -> Heard:
        ports: set[str] = set()
        usb = False
        for _ in range(EVENTS_A_TURN):
            try:
                device = self._monitor.poll(timeout=0)
            except OSError as error:
                log.debug("hotplug events were lost: %s", error)  # ENOBUFS: more came than the socket holds
                return Heard(True, frozenset(ports), lost=True, more=True)
            if device is None:
                return Heard(usb, frozenset(ports))
            if self._pattern.search(device.device_path):
                usb = True
                ports.update(PORT.findall(device.device_path))
        return Heard(usb, frozenset(ports), more=True)

    def discard(self) -> None:
        errors = 0
        for _ in range(DATAGRAMS_A_DISCARD):
            try:
                os.read(self._fd, DATAGRAM_BYTES)
            except BlockingIOError:
                return
            except OSError:  # ENOBUFS comes before the events that did fit
                errors += 1
                if errors > 1:
                    return

    def close(self) -> None:
        self._monitor = None  # libudev closes the socket with its last reference


def open_hotplug(host: HostRoot) -> Hotplug | None:
    """The host's hotplug events; None, and a line in the log, when they cannot be had. Blocks: call it in a thread.

    A captured tree has no events: there is nothing to say and nothing is said.
    """
    if not _is_this_kernel(host):
        return None
    opened: list[UdevHotplug] = []

    def work() -> None:
        try:
            _enter_host_network(host)
            opened.append(UdevHotplug())
        except (OSError, ImportError) as error:
            log.warning("no hotplug events (%s); devices are found by the periodic look only", error)

    # setns changes the thread that calls it, so that thread serves for nothing else.
    thread = threading.Thread(target=work, name="open-hotplug")
    thread.start()
    thread.join()
    return opened[0] if opened else None


def _is_this_kernel(host: HostRoot) -> bool:
    return host.boot_id() == HostRoot().boot_id() != ""


def _enter_host_network(host: HostRoot) -> None:
    """Move this thread into the network namespace of the host's first process, where that is another one and can be reached."""
    try:
        with open(host.path("/proc/1/ns/net"), "rb") as namespace:
            theirs, ours = os.fstat(namespace.fileno()), os.stat("/proc/thread-self/ns/net")  # noqa: PTH116
            if (theirs.st_dev, theirs.st_ino) == (ours.st_dev, ours.st_ino):
                return
            libc = ctypes.CDLL(None, use_errno=True)
            if libc.setns(namespace.fileno(), CLONE_NEWNET) != 0:
                raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    except OSError as error:
        log.info("the host's network namespace is out of reach (%s); listening for hotplug events in our own", error)


def usb_paths(host: HostRoot) -> list[str]:
    """The sysfs path of every USB device: from libudev on the running root, else by walking the tree. Blocks."""
    if str(host.root) == "/" and (context := _context()) is not None:
        with contextlib.suppress(OSError):
            return sorted(device.sys_path for device in context.list_devices(subsystem="usb", DEVTYPE="usb_device"))
    return sysfs.usb_paths(host)


@cache
def _context() -> Any:
    """One libudev context for enumerations, which the caller runs one at a time. Finding the library starts ldconfig."""
    try:
        import pyudev

        return pyudev.Context()
    except (ImportError, OSError):
        return None
