"""Sound devices: USB Audio Class 1 and 2. The buttons of a headset (HID) come with it, a camera's microphone too."""

from __future__ import annotations

from nodeagent.model import Device, DeviceClass, Grant, UsbDevice

CLASS = DeviceClass.AUDIO

AUDIO = 0x01
"""bInterfaceClass (USB Audio 1.0, A.1)."""


def claims(usb: UsbDevice) -> bool:
    return any(i.cls == AUDIO for i in usb.interfaces)


def grant(device: Device) -> Grant:
    """The ALSA nodes of its card; /dev/snd/seq and timer belong to the node, not to the device."""
    return Grant(nodes=tuple(n for n in device.usb.nodes if n.subsystem == "sound"))
