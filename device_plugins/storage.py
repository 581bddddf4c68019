"""USB sticks and disks: SCSI over Bulk-Only or UAS; the card slot of a printer is one.

Encrypted sticks take their PIN through a HID or vendor interface, which then is theirs; a keyboard beside a disk never is. The
disk with the driver of a security key is the key's (device_plugins/ukey.py).
"""

from __future__ import annotations

from device_plugins.usb import types
from nodeagent.model import Device, DeviceClass, Grant, UsbDevice

CLASS = DeviceClass.STORAGE

STORAGE_TRIPLES = ("08:06:50", "08:06:62")
"""Mass storage, SCSI commands; Bulk-Only Transport or UAS (USB Mass Storage Overview 1.4)."""
BESIDE = (0x08, 0x03, 0xFF)


def claims(usb: UsbDevice, free: frozenset[int]) -> frozenset[int]:
    disks = frozenset(i.number for i in usb.interfaces if set(i.types) & set(STORAGE_TRIPLES)) & free
    whole = all(i.cls in BESIDE for i in usb.interfaces)
    typing = frozenset(i.number for i in usb.interfaces if types(i))
    return free - typing if disks and whole else disks


def grant(device: Device) -> Grant:
    """The disk and its partitions as block devices."""
    return Grant(nodes=tuple(n for n in device.usb.nodes if n.subsystem == "block" and device.has(n)))
