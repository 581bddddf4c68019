"""A printer that is offered, as each side needs to know it: its desktop, the spool, cupsd. Pure."""

from __future__ import annotations

from pathlib import Path

from device_plugins import printer as printers
from nodeagent.model import Device, Offer
from nodeagent.services.printing.convert import accepted_formats
from nodeagent.services.printing.cups import Queue, device_uri
from nodeagent.services.printing.spool import SpoolPrinter
from nodeagent.wire import seat as wire


def prints(offer: Offer) -> bool:
    """Whether holding the offer adds a printer to the seat."""
    return offer.give == "service" and "ipp" in offer.grant.services


def title(device: Device) -> str:
    """What a person reads in a print dialogue."""
    return (device.usb.name or device.cls.value) + (" (simulated)" if device.usb.simulated else "")


def for_desktop(offer: Offer) -> wire.Printer:
    """What the seat's worker is told; the name is the device id, which says nothing about the serial."""
    device = offer.device
    return wire.Printer(
        name=device.id,
        info=title(device),
        make_and_model=device.usb.title or "USB printer",
        formats=accepted_formats(printers.formats(device.usb.ieee1284_id)),
        online=device.present,
        simulated=device.usb.simulated,
        state_message="" if device.present else "the printer is unplugged; jobs wait for it",
    )


def for_spool(offer: Offer) -> SpoolPrinter:
    """What conversion and waiting depend on."""
    device = offer.device
    return SpoolPrinter(
        name=device.id, queue=device.id, formats=printers.formats(device.usb.ieee1284_id), online=device.present
    )


def for_cups(offer: Offer, state_dir: Path) -> Queue:
    """Raises AgentError when the path of the device cannot be written in a URI."""
    return Queue(name=offer.device.id, device_uri=device_uri(offer.device, state_dir), info=title(offer.device))
