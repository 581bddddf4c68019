"""Simulated devices: the descriptors a real one of that model would show. They enter the inventory by the same door.

Vendor id 0000 is nobody's, and `simulated` marks them wherever they show.
"""

from __future__ import annotations

from device_plugins import printer
from nodeagent.config import SimulatedDevice
from nodeagent.model import Interface, UsbDevice

VENDOR = 0x0000
MANUFACTURER = "nodeagent"

MODELS: dict[str, tuple[int, str, tuple[Interface, ...]]] = {
    "printer": (0x0001, "Simulated printer", (Interface(0, 0x07, 0x01, 0x02),)),
    "smartcard": (0x0002, "Simulated smart card", (Interface(0, 0x0B, 0x00, 0x00),)),
    "audio": (0x0003, "Simulated headset", (Interface(0, 0x01, 0x01, 0x00), Interface(1, 0x01, 0x02, 0x00))),
    "stick": (0x0004, "Simulated stick", (Interface(0, 0x08, 0x06, 0x50),)),
}
"""Model -> product id, name, interfaces."""


def usb_device(simulated: SimulatedDevice) -> UsbDevice:
    """What the bus would say of it. A printer says in its IEEE 1284 device id which formats it speaks."""
    product, name, interfaces = MODELS[simulated.model]
    ieee1284_id = ""
    if simulated.model == "printer":
        commands = printer.command_set(simulated.formats)
        ieee1284_id = f"MFG:{MANUFACTURER};CMD:{commands};MDL:{name};CLS:PRINTER;SN:{simulated.serial};"
    return UsbDevice(
        port=f"sim-{simulated.serial}",
        vendor=VENDOR,
        product=product,
        serial=simulated.serial,
        manufacturer=MANUFACTURER,
        name=name,
        interfaces=interfaces,
        ieee1284_id=ieee1284_id,
        simulated=True,
    )
