"""Security keys and smart-card readers: CCID (PC/SC) and FIDO.

A token that speaks only a vendor's own protocol (many SKF tokens: plain HID reports, or SCSI commands to a small CD-ROM)
cannot be told from its descriptors; it is found as `usb` or `storage`.
"""

from __future__ import annotations

from nodeagent.model import Device, DeviceClass, Grant, UsbDevice

CLASS = DeviceClass.UKEY

SMART_CARD = 0x0B
"""bInterfaceClass of a chip-card interface device (USB CCID 1.1)."""
CTAPHID = 0xF1D0_0001
"""HID usage of a FIDO authenticator (CTAP 2.1, 11.2.8)."""


def claims(usb: UsbDevice) -> bool:
    return any(i.cls == SMART_CARD or CTAPHID in i.hid_usages for i in usb.interfaces)


def grant(device: Device) -> Grant:
    """CCID drivers open the device through libusb, FIDO clients its hidraw node.

    The hidraw node of another interface is not granted: on a key that also types (OTP) it is a keyboard.
    """
    usb = device.usb
    fido = {i.number for i in usb.interfaces if CTAPHID in i.hid_usages}
    ccid = any(i.cls == SMART_CARD for i in usb.interfaces)
    return Grant(
        nodes=tuple(
            n
            for n in usb.nodes
            if (n.subsystem == "hidraw" and n.interface in fido) or (n.subsystem == "usb" and n.interface < 0 and ccid)
        )
    )
