"""USB sticks and disks: SCSI over Bulk-Only or UAS, and nothing else.

A printer with a card slot, or a security key that carries its driver on a small disk, is not a stick. Encrypted sticks take
their PIN through a HID or vendor interface and are.
"""

from __future__ import annotations

from nodeagent.model import Device, DeviceClass, Grant, UsbDevice

CLASS = DeviceClass.STORAGE

STORAGE_TRIPLES = ("08:06:50", "08:06:62")
"""Mass storage, SCSI commands; Bulk-Only Transport or UAS (USB Mass Storage Overview 1.4)."""
BESIDE = (0x08, 0x03, 0xFF)


def claims(usb: UsbDevice) -> bool:
    return any(i.triple in STORAGE_TRIPLES for i in usb.interfaces) and all(i.cls in BESIDE for i in usb.interfaces)


def grant(device: Device) -> Grant:
    """The disk and its partitions as block devices."""
    return Grant(nodes=tuple(n for n in device.usb.nodes if n.subsystem == "block"))
