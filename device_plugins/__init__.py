"""What a USB device is to us: one file per class, each a pure leaf.

A leaf says which interfaces of a device are its own (`claims`, from descriptors alone) and what holding them means (`grant`:
which service sockets a seat gains, which nodes a container needs). It does no I/O and sees only nodeagent.model and
nodeagent.errors.

A leaf goes by every alternate setting of an interface (`Interface.types`), because drivers switch between them: a device
must not change its class when somebody begins to print.

`CLASSES` is the whole list. Each leaf in turn is shown the interfaces that no earlier one took, so that a printer with a
card slot is a printer and a stick, and a key with CCID and FIDO is one key. On every device in tests/machines the claims are
disjoint without that order too (a test), with one exception: the disk with the driver of a key looks like a stick and is the
key's (device_plugins/ukey.py). `usb` comes last and takes devices that are nobody's.
"""

from __future__ import annotations

from typing import Protocol

from device_plugins import audio, printer, storage, ukey, usb
from nodeagent.model import Device, DeviceClass, Grant, Part, UsbDevice


class Leaf(Protocol):
    """The shape of each file here."""

    @property
    def CLASS(self) -> DeviceClass: ...

    def claims(self, usb: UsbDevice, free: frozenset[int], /) -> frozenset[int]:
        """The interfaces of this device, out of `free`, that are of my class."""
        ...

    def grant(self, device: Device, /) -> Grant:
        """What holding this device means; empty where this version has nothing to give."""
        ...


CLASSES: tuple[Leaf, ...] = (ukey, printer, audio, storage, usb)


def classify(usb: UsbDevice) -> tuple[Part, ...]:
    """The parts of a device, in the order of CLASSES, with disjoint interfaces; none when it is no device to us."""
    free = frozenset(i.number for i in usb.interfaces)
    parts = []
    for leaf in CLASSES:
        if taken := leaf.claims(usb, free):
            parts.append(Part(leaf.CLASS, tuple(sorted(taken))))
            free -= taken
    return tuple(parts)


def grant(device: Device) -> Grant:
    """What the leaf of the device's class grants."""
    return next(leaf for leaf in CLASSES if device.cls == leaf.CLASS).grant(device)
