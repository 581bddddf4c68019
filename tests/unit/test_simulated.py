"""Simulated devices look like real ones of their class."""

import pytest

import device_plugins
from device_plugins import printer
from nodeagent.config import SimulatedDevice
from nodeagent.devices.simulated import MODELS, VENDOR, usb_device


@pytest.mark.parametrize(
    ("model", "cls"), [("printer", "printer"), ("smartcard", "ukey"), ("audio", "audio"), ("stick", "storage")]
)
def test_class(model: str, cls: str) -> None:
    usb = usb_device(SimulatedDevice(model=model, serial="S1"))  # type: ignore[arg-type]
    assert [part.cls for part in device_plugins.classify(usb)] == [cls]
    assert (usb.port, usb.serial, usb.simulated, usb.vendor) == ("sim-S1", "S1", True, VENDOR)
    assert usb.name.startswith("Simulated ")
    assert usb.nodes == ()


def test_every_model_is_tested_and_differs() -> None:
    assert sorted(MODELS) == ["audio", "printer", "smartcard", "stick"]
    assert len({product for product, _, _ in MODELS.values()}) == len(MODELS)


@pytest.mark.parametrize(
    "formats", [("application/postscript",), ("image/urf", "application/pdf"), ("application/octet-stream",)]
)
def test_a_printer_says_its_formats_as_a_real_one_does(formats: tuple[str, ...]) -> None:
    usb = usb_device(SimulatedDevice(model="printer", serial="P1", formats=formats))  # type: ignore[arg-type]
    assert printer.formats(usb.ieee1284_id) == formats
    assert usb.ieee1284_id.endswith(";SN:P1;")
