"""Every other USB device, given raw.

Hubs are wiring. Keyboards and mice are the node's own console: whoever holds such a node reads what is typed there, so
only a rule that says so (`input: true`) offers them.
"""

from __future__ import annotations

from nodeagent.model import Device, DeviceClass, Grant, Interface, UsbDevice

CLASS = DeviceClass.USB

HUB = 0x09
CONSOLE_TRIPLES = ("03:01:01", "03:01:02")
"""Boot keyboard and boot mouse (HID 1.11, 4.2 and 4.3)."""
CONSOLE_USAGES = (0x0001_0001, 0x0001_0002, 0x0001_0006, 0x0001_0007)
"""Generic desktop: pointer, mouse, keyboard, keypad (HID Usage Tables, 4)."""


def claims(usb: UsbDevice, free: frozenset[int]) -> frozenset[int]:
    """All or nothing: raw means the whole device."""
    nobody_else = len(free) == len({i.number for i in usb.interfaces})
    return free if nobody_else and not any(i.cls == HUB for i in usb.interfaces) else frozenset()


def types(interface: Interface) -> bool:
    """Whether it is a keyboard or a mouse."""
    return bool(set(interface.types) & set(CONSOLE_TRIPLES)) or bool(set(CONSOLE_USAGES) & set(interface.hid_usages))


def grant(device: Device) -> Grant:
    """The usbfs node and every node its drivers made."""
    return Grant(nodes=device.usb.nodes)
