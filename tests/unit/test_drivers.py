"""Which drivers are in the way, over every recorded machine."""

from __future__ import annotations

from pathlib import Path

import pytest

from nodeagent.devices import drivers
from nodeagent.devices.drivers import Bound
from nodeagent.model import Device, DeviceClass, Give, Interface, UsbDevice
from tests import machines
from tests.unit.test_claims import bind, devices


@pytest.mark.parametrize(
    ("machine", "port", "give", "taken"),
    [
        ("yubikey", "1-3", "node", set()),
        ("yubikey", "1-3", "service", set()),
        ("yubikey", "1-3", "usb", {0, 1, 2}),
        ("stick", "2-1", "node", set()),
        ("stick", "2-1", "block", set()),
        ("stick", "2-1", "usb", {0}),
        ("laserjet", "1-4", "service", set()),
        ("laserjet", "1-4", "usb", {0}),
    ],
)
def test_only_raw_usb_needs_drivers_away(tmp_path: Path, machine: str, port: str, give: Give, taken: set[int]) -> None:
    host = machines.machine(tmp_path, machine)
    device = devices(host)[f"id-{port}"]
    for interface in device.usb.interfaces:
        bind(host, f"{port}:1.{interface.number}", "some-driver")
    assert {b.number for b in drivers.in_the_way(host, device, give)} == taken


@pytest.mark.parametrize("give", ["node", "service"])
def test_the_nfc_driver_lets_go_of_a_ccid_reader_and_the_rest_of_the_device_stays(tmp_path: Path, give: Give) -> None:
    host = machines.machine(tmp_path, "yubikey")
    device = devices(host)["id-1-3"]
    bind(host, "1-3:1.0", "pn533_usb")
    bind(host, "1-3:1.2", "pn533_usb")
    assert drivers.in_the_way(host, device, give) == (Bound("1-3:1.2", 2, "pn533_usb"),)


def test_a_program_that_holds_the_device_is_no_driver(tmp_path: Path) -> None:
    host = machines.machine(tmp_path, "stick")
    bind(host, "2-1:1.0", "usbfs")
    assert drivers.in_the_way(host, devices(host)["id-2-1"], "usb") == ()


def test_unbinding_what_another_driver_has_by_now_does_nothing(tmp_path: Path) -> None:
    host = machines.machine(tmp_path, "stick")
    unbind = bind(host, "2-1:1.0", "uas")
    drivers.unbind(host, devices(host)["id-2-1"].usb, Bound("2-1:1.0", 0, "usb-storage"))
    assert unbind.read_text() == ""


def test_what_a_key_types_and_what_other_parts_are_is_not_given(tmp_path: Path) -> None:
    key = devices(machines.machine(tmp_path, "yubikey"))["id-1-3"]
    assert [i.number for i in key.usb.interfaces if drivers.is_given(key, i, "node")] == [1, 2]
    combo = UsbDevice(port="1-1", vendor=1, product=2, interfaces=(Interface(0, 7, 1, 2), Interface(1, 8, 6, 80)))
    disk = Device(id="storage-x", cls=DeviceClass.STORAGE, usb=combo, interfaces=(1,))
    assert [i.number for i in combo.interfaces if drivers.is_given(disk, i, "node")] == [1]
    token = Device(id="ukey-x", cls=DeviceClass.UKEY, usb=combo, natural=DeviceClass.USB)
    assert all(drivers.is_given(token, i, "node") for i in combo.interfaces)
