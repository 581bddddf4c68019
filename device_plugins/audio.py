"""Sound devices: USB Audio Class 1 and 2. The buttons of a headset (HID) come with it; a camera's microphone is one too."""

from __future__ import annotations

from nodeagent.model import Device, DeviceClass, Grant, UsbDevice

CLASS = DeviceClass.AUDIO

AUDIO = "01:"
"""bInterfaceClass (USB Audio 1.0, A.1)."""
HID = 0x03
CONSUMER, TELEPHONY = 0x0C, 0x0B
"""HID usage pages of a headset's buttons (HID Usage Tables, 14 and 15)."""
VENDOR_PAGE = 0xFF00
"""From here on pages are the vendor's own; headsets put one beside their buttons."""


def claims(usb: UsbDevice, free: frozenset[int]) -> frozenset[int]:
    sound = frozenset(i.number for i in usb.interfaces if any(t.startswith(AUDIO) for t in i.types)) & free
    buttons = frozenset(
        i.number for i in usb.interfaces
        if i.cls == HID and i.hid_usages and all(_button(u >> 16) for u in i.hid_usages)
    )  # fmt: skip
    return sound | (buttons & free) if sound else sound


def _button(page: int) -> bool:
    return page in (CONSUMER, TELEPHONY) or page >= VENDOR_PAGE


def grant(device: Device) -> Grant:
    """The ALSA nodes of its card; /dev/snd/seq and timer belong to the node, not to the device."""
    return Grant(nodes=tuple(n for n in device.usb.nodes if n.subsystem == "sound" and device.has(n)))
