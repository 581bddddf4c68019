"""What a USB device is to us: one file per class, each a pure leaf.

A leaf says which devices are its own (`claims`, from descriptors alone) and what holding one means (`grant`: which service
sockets a seat gains, which nodes a container needs). It does no I/O and sees only nodeagent.model and nodeagent.errors.

`CLASSES` is the whole list. The claims of its leaves are disjoint on every device in tests/machines (a test); on a device
that two of them would claim the first in the list wins. `usb` comes last and claims what is left, except what is no device
to us: hubs, and the keyboards and mice that belong to the node's own console.
"""

from __future__ import annotations

from typing import Protocol

from device_plugins import audio, printer, storage, ukey, usb
from nodeagent.model import Device, DeviceClass, Grant, UsbDevice


class Leaf(Protocol):
    """The shape of each file here."""

    @property
    def CLASS(self) -> DeviceClass: ...

    def claims(self, usb: UsbDevice, /) -> bool:
        """This device is of my class."""
        ...

    def grant(self, device: Device, /) -> Grant:
        """What holding this device means; empty where this version has nothing to give."""
        ...


CLASSES: tuple[Leaf, ...] = (ukey, printer, audio, storage, usb)


def classify(usb: UsbDevice) -> DeviceClass | None:
    """The class of the first leaf that claims the device; None when it is no device to us."""
    return next((leaf.CLASS for leaf in CLASSES if leaf.claims(usb)), None)


def grant(device: Device) -> Grant:
    """What the leaf of the device's class grants."""
    return next(leaf for leaf in CLASSES if device.cls == leaf.CLASS).grant(device)
