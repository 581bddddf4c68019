"""Every other USB device, given raw.

Hubs are wiring. Keyboards and mice that are nothing else are the node's own console: whoever holds such a node reads what
is typed there, so no rule can offer them.
"""

from __future__ import annotations

from nodeagent.model import Device, DeviceClass, Grant, UsbDevice

CLASS = DeviceClass.USB

HUB = 0x09
HID = 0x03
CONSOLE_TRIPLES = ("03:01:01", "03:01:02")
"""Boot keyboard and boot mouse (HID 1.11, 4.2 and 4.3)."""
CONSOLE_USAGES = (0x0001_0002, 0x0001_0006, 0x0001_0007)
"""Generic desktop: mouse, keyboard, keypad (HID Usage Tables, 4)."""


def claims(usb: UsbDevice) -> bool:
    hub = any(i.cls == HUB for i in usb.interfaces)
    types = any(i.triple in CONSOLE_TRIPLES or set(CONSOLE_USAGES) & set(i.hid_usages) for i in usb.interfaces)
    only_hid = all(i.cls == HID for i in usb.interfaces)
    return bool(usb.interfaces) and not hub and not (types and only_hid)


def grant(device: Device) -> Grant:
    """The usbfs node and every node its drivers made."""
    return Grant(nodes=device.usb.nodes)
