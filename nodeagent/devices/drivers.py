"""Which kernel driver has which interface of a device, and taking it away where it is in the way.

A driver is in the way where it keeps the holder of a device from using it: `NEEDLESS` is the whole list. Everything else
stays bound, because the node that is given away exists only while its driver does: hidraw, ALSA, usblp, block devices.
Interfaces that are not given away are never touched: the keyboard half of a key, the scanner half of a printer.
"""

from __future__ import annotations

import contextlib
import logging
import re
from collections.abc import Mapping

import msgspec

from device_plugins.ukey import CTAPHID, is_card
from nodeagent.errors import AgentError, Reason
from nodeagent.host import HostRoot
from nodeagent.model import Device, DeviceClass, Give, Interface, UsbDevice

log = logging.getLogger(__name__)

DRIVERS = "/sys/bus/usb/drivers"
PROBE = "/sys/bus/usb/drivers_probe"
"""The kernel picks a driver for the interface whose name is written here (Documentation/ABI/testing/sysfs-bus-usb)."""
EVERY = "*"
OUR_HANDS = ("usbfs", "usbip-host", "vfio")
"""Not kernel functions of a device but programs that hold it: libusb, an exporter."""
NEEDLESS: Mapping[tuple[DeviceClass, Give], tuple[str, ...]] = {
    (DeviceClass.UKEY, "service"): ("pn533_usb", "pn533"),
    (DeviceClass.UKEY, "node"): ("pn533_usb", "pn533"),
    **{(cls, "usb"): (EVERY,) for cls in DeviceClass},
}
"""Class and way of giving -> drivers that must let go; no row: none.

No kernel driver speaks CCID, but pn533_usb takes the ACS ACR122U, a CCID reader (072f:2200 in its device table), and pcscd
then finds it busy. A printer served through usblp needs usblp, which leaves IPP over USB (protocol 4) alone anyway; block
and ALSA nodes need their drivers. Raw USB (`usb`) is driven by the holder's own kernel.
"""
DRIVER_NAME = re.compile(r"[A-Za-z0-9_.:-]{1,64}")


class Bound(msgspec.Struct, frozen=True):
    """An interface (`1-3:1.2`) and its driver."""

    interface: str
    number: int
    driver: str


def is_given(device: Device, interface: Interface, give: Give) -> bool:
    """The agent gives this interface away, so it may do with it what is needed. Raw USB gives all of them."""
    if give == "usb":
        return True
    if device.cls is DeviceClass.UKEY and device.natural is None:  # what a key types stays the node's
        return is_card(interface) or CTAPHID in interface.hid_usages
    return interface.number in device.parts


def has_needless(cls: DeviceClass, give: Give) -> bool:
    """Drivers may have to be taken away when a device of this class is given this way."""
    return (cls, give) in NEEDLESS


def bound(host: HostRoot, usb: UsbDevice) -> tuple[Bound, ...]:
    """The interfaces of a device that have a driver right now."""
    top = host.path(usb.sysfs)
    found = []
    configuration = host.attribute(f"{usb.sysfs}/bConfigurationValue")
    for interface in usb.interfaces:
        # usb_set_configuration names an interface port:configuration.number (drivers/usb/core/message.c).
        name = f"{usb.port}:{configuration}.{interface.number}"
        with contextlib.suppress(OSError):
            driver = (top / name / "driver").readlink().name
            if DRIVER_NAME.fullmatch(driver):
                found.append(Bound(name, interface.number, driver))
    return tuple(found)


def in_the_way(host: HostRoot, device: Device, give: Give) -> tuple[Bound, ...]:
    """The drivers that must let go of a device that is given this way."""
    needless = NEEDLESS.get((device.cls, give), ())
    if not needless:
        return ()
    given = {i.number for i in device.usb.interfaces if is_given(device, i, give)}
    return tuple(
        b
        for b in bound(host, device.usb)
        if b.number in given and b.driver not in OUR_HANDS and (EVERY in needless or b.driver in needless)
    )


def unbind(host: HostRoot, usb: UsbDevice, which: Bound) -> None:
    """Take the interface from that driver. Nothing happens where another driver, or none, has it by now.

    May wait for the device: call it through SlowCalls. Raises AgentError.
    """
    if which not in bound(host, usb):
        return
    path = host.path(f"{DRIVERS}/{which.driver}/unbind")
    try:
        with open(path, "wb", buffering=0) as file:
            file.write(which.interface.encode())
    except OSError as error:
        if which not in bound(host, usb):
            return  # it was unplugged, or somebody else unbound it
        raise AgentError(
            Reason.INTERNAL,
            f"the kernel driver {which.driver} keeps {which.interface} of the device at port {usb.port}: {error.strerror}",
            hint=f"echo {which.interface} > {DRIVERS}/{which.driver}/unbind",
        ) from error
    log.info("took %s from the kernel driver %s", which.interface, which.driver)


def probe(host: HostRoot, usb: UsbDevice) -> tuple[str, ...]:
    """Let the kernel find drivers for the interfaces that have none; returns those it found one for.

    It needs no memory of what was unbound, so it also mends what a killed agent left. An interface that no driver wants
    stays as it is.
    """
    had = {b.interface for b in bound(host, usb)}
    configuration = host.attribute(f"{usb.sysfs}/bConfigurationValue")
    for interface in usb.interfaces:
        name = f"{usb.port}:{configuration}.{interface.number}"
        if name not in had:
            with contextlib.suppress(OSError), open(host.path(PROBE), "wb", buffering=0) as file:
                file.write(name.encode())
    return tuple(b.interface for b in bound(host, usb) if b.interface not in had)
