"""Printers: USB printer class, one-way, two-way and IPP over USB; and the page languages a printer says it speaks."""

from __future__ import annotations

import re
from collections.abc import Iterable

from nodeagent.model import Device, DeviceClass, Grant, UsbDevice

CLASS = DeviceClass.PRINTER

PRINTING = "07:01:"
"""bInterfaceClass and bInterfaceSubClass; protocols 01 one-way, 02 two-way (USB Printer Class 1.1), 04 IPP over USB."""

OCTET_STREAM = "application/octet-stream"
LANGUAGES: tuple[tuple[str, str, str], ...] = (
    ("application/pdf", "PDF", r"PDF"),
    ("application/postscript", "POSTSCRIPT", r"PS[23]?|POSTSCRIPT.*"),
    ("image/pwg-raster", "PWGRaster", r"PWG(RASTER)?"),
    ("image/urf", "URF", r"URF|APPLERASTER"),
    # PCL3GUI and PCLM only sound like PCL: the one is raster for HP's own driver, the other a kind of PDF.
    ("application/vnd.hp-pcl", "PCL", r"PCL[345]?[CE]?"),
    ("application/vnd.hp-pclxl", "PCLXL", r"PCL(XL|6)"),
    ("image/jpeg", "JPEG", r"JPE?G"),
)
"""MIME type, how we write it in a command set, and what printers write (letters and digits only, upper case)."""

MAX_ID_CHARS = 1024
"""usblp reads at most 1024 bytes of device id (Linux drivers/usb/class/usblp.c)."""
MAX_COMMANDS = 64


def claims(usb: UsbDevice, free: frozenset[int]) -> frozenset[int]:
    """IPP over USB is often an alternate setting of an interface that is something else until it is switched."""
    printing = (i.number for i in usb.interfaces if any(t.startswith(PRINTING) for t in i.types))
    return frozenset(printing) & free


def grant(device: Device) -> Grant:
    """Printing needs the usblp node (or a simulated printer's file); without one only libusb programs reach the printer."""
    usb = device.usb
    usblp = tuple(n for n in usb.nodes if n.path.startswith("/dev/usb/lp") and device.has(n))
    return Grant(
        services=("ipp",) if usblp or usb.simulated else (),
        nodes=usblp or ((usb.bus_node,) if usb.bus_node else ()),
    )


def formats(untrusted_id: str) -> tuple[str, ...]:
    """The document formats (MIME) in a printer's IEEE 1284 device id, in its own order; `application/octet-stream` alone
    when it names none that we know.

    The id is `KEY:VALUE;` pairs (IEEE 1284-2000, 7.6); `COMMAND SET`, short `CMD`, lists languages with commas.
    """
    commands = ""
    for pair in untrusted_id[:MAX_ID_CHARS].split(";"):
        key, _, value = pair.partition(":")
        if key.strip().upper() in ("CMD", "COMMAND SET"):
            commands = value
            break
    found: dict[str, None] = {}
    for command in commands.split(",", MAX_COMMANDS)[:MAX_COMMANDS]:
        plain = re.sub(r"[^A-Z0-9]", "", command.upper())
        found.update((mime, None) for mime, _, pattern in LANGUAGES if re.fullmatch(pattern, plain))
    return tuple(found) or (OCTET_STREAM,)


def command_set(formats: Iterable[str]) -> str:
    """What a printer that speaks these formats writes behind `CMD:`; formats without a name there are left out."""
    names = {mime: name for mime, name, _ in LANGUAGES}
    return ",".join(names[mime] for mime in formats if mime in names)
