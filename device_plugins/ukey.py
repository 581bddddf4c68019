"""Security keys and smart-card readers: CCID (PC/SC), FIDO, and tokens with a protocol of their vendor.

The last kind (many SKF tokens: plain HID reports, or SCSI commands to a small CD-ROM) cannot be told from descriptors; it is
found as `usb` or `storage` until a rule says `as: ukey`.
"""

from __future__ import annotations

from device_plugins.usb import types
from nodeagent.model import Device, DeviceClass, DeviceNode, Grant, Interface, UsbDevice

CLASS = DeviceClass.UKEY

SMART_CARD = 0x0B
"""bInterfaceClass of a chip-card interface device (USB CCID 1.1)."""
CTAPHID = 0xF1D0_0001
"""HID usage of a FIDO authenticator (CTAP 2.1, 11.2.8)."""
BESIDE = (0x03, 0xFF)
"""What a key has besides: one-time passwords that it types, its vendor's own."""
DISK = 0x08
DRIVER_DISK_VENDORS = (0x096E, 0x163C)
"""Feitian, Watchdata: the disk beside their card interface is a CD-ROM with the driver. On other devices it is a stick or a slot
for memory cards (Nitrokey Storage, readers for both kinds of card)."""
KEY_VENDORS = (0x1050, 0x20A0, 0x096E)
"""Yubico, Nitrokey, Feitian: what types on their devices with CCID is a key, not a keyboard (usb.ids, CCID's list of readers)."""


def claims(usb: UsbDevice, free: frozenset[int]) -> frozenset[int]:
    """A key with all that it has; of a keyboard with a card slot only the slot."""
    own = frozenset(i.number for i in usb.interfaces if is_card(i) or CTAPHID in i.hid_usages) & free
    if not own or _is_keyboard(usb):
        return own
    beside = (*BESIDE, DISK) if usb.vendor in DRIVER_DISK_VENDORS else BESIDE
    return own | (frozenset(i.number for i in usb.interfaces if i.cls in beside) & free)


def is_card(interface: Interface) -> bool:
    """Whether one of its settings is a chip-card interface."""
    return any(t.startswith(f"{SMART_CARD:02x}:") for t in interface.types)


def _is_keyboard(usb: UsbDevice) -> bool:
    """Descriptors do not tell a keyboard with a card slot from a key that types; FIDO and the vendor do."""
    fido = any(CTAPHID in i.hid_usages for i in usb.interfaces)
    return any(types(i) for i in usb.interfaces) and not fido and usb.vendor not in KEY_VENDORS


def grant(device: Device) -> Grant:
    """CCID drivers open the device through libusb, FIDO clients its hidraw node, a vendor's library one of the three below.

    The hidraw node of another interface is not granted: on a key that also types (OTP) it is a keyboard. Nor is the raw device
    of a keyboard with a card slot, through which its holder could read what the console types.
    """
    usb = device.usb
    own = [i for i in usb.interfaces if i.number in device.parts]
    fido = {i.number for i in own if CTAPHID in i.hid_usages}
    nodes = [n for n in usb.nodes if n.subsystem == "hidraw" and n.interface in fido]
    if any(map(is_card, own)) and usb.bus_node and not _is_keyboard(usb):
        nodes.append(usb.bus_node)
    return Grant(nodes=tuple(n for n in usb.nodes if n in nodes) or _vendor(device))


def _vendor(device: Device) -> tuple[DeviceNode, ...]:
    """HID reports, SCSI commands, or the raw device."""
    usb = device.usb
    typing = {i.number for i in usb.interfaces if types(i)}
    quiet = tuple(n for n in usb.nodes if n.subsystem == "hidraw" and device.has(n) and n.interface not in typing)
    scsi = tuple(n for n in usb.nodes if n.subsystem == "scsi_generic" and device.has(n))
    return quiet + scsi or ((usb.bus_node,) if usb.bus_node and not typing else ())
