"""The leaves: who claims what on the recorded devices, what holding it means, and what a printer says it speaks."""

import tempfile
from functools import cache
from pathlib import Path
from typing import get_args

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

import device_plugins
from device_plugins import printer, usb
from nodeagent import config
from nodeagent.config import PageLanguage
from nodeagent.devices import matching
from nodeagent.model import Device, DeviceClass, DeviceNode, Grant, Interface, UsbDevice
from tests import machines
from tests.machines import expected

NODES_OF = {
    ("card-reader", "1-5", "ukey"): {"/dev/bus/usb/001/006"},
    # Whoever has the raw device reads what the console types.
    ("console", "1-3", "ukey"): set(),
    ("desk-hub", "1-1.4", "ukey"): {"/dev/hidraw3"},
    ("encrypted-stick", "1-1", "storage"): {"/dev/sdb", "/dev/sdb1"},
    ("epass", "1-2", "ukey"): {"/dev/bus/usb/001/003", "/dev/hidraw1"},
    ("epass", "1-4", "ukey"): {"/dev/bus/usb/001/005"},
    ("headset", "1-6", "audio"): {"/dev/snd/controlC1", "/dev/snd/pcmC1D0c", "/dev/snd/pcmC1D0p"},
    ("hid-tokens", "1-1", "ukey"): {"/dev/hidraw0"},
    ("ipp-usb-epson", "1-4", "printer"): {"/dev/usb/lp0"},
    ("laserjet", "1-4", "printer"): {"/dev/usb/lp0"},
    ("multifunction", "1-2", "printer"): {"/dev/usb/lp0"},
    ("multifunction", "1-2", "storage"): {"/dev/sdb"},
    ("pin-pads", "1-2", "ukey"): {"/dev/bus/usb/001/003"},
    ("scsi-tokens", "1-1", "ukey"): {"/dev/sg1"},
    ("stick", "2-1", "storage"): {"/dev/sdb", "/dev/sdb1"},
    ("storage-keys", "1-1", "storage"): {"/dev/sdb", "/dev/sdb1", "/dev/sdc"},
    ("storage-keys", "1-2", "ukey"): {"/dev/bus/usb/001/003"},
    ("uac2-dongle", "1-1", "audio"): {"/dev/snd/controlC1", "/dev/snd/pcmC1D0p"},
    ("webcam", "1-1", "audio"): {"/dev/snd/controlC1", "/dev/snd/pcmC1D0c"},
    # hidraw0 is its keyboard interface: whoever reads it sees one-time passwords typed by the key.
    ("yubikey", "1-3", "ukey"): {"/dev/bus/usb/001/009", "/dev/hidraw1"},
}
CAMERA = "0e:01:00", "0e:02:00", "01:01:00", "01:02:00"
DRIVER_DISKS = {("epass", "1-4"), ("scsi-tokens", "1-2")}
"""Claimed by two classes, which device_plugins/__init__ names as the one exception."""


@cache
def recorded(machine: str) -> dict[str, UsbDevice]:
    with tempfile.TemporaryDirectory() as root:
        return expected.devices(machine, Path(root))


def of(*triples: str, simulated: bool = False, vendor: int = 1) -> UsbDevice:
    parts = [[int(part, 16) for part in t.split(":")] for t in triples]
    interfaces = tuple(Interface(n, cls, sub, protocol) for n, (cls, sub, protocol) in enumerate(parts))
    return UsbDevice(port="1-1", vendor=vendor, product=2, interfaces=interfaces, simulated=simulated)


def parts(usb: UsbDevice) -> dict[str, tuple[int, ...]]:
    return {part.cls.value: part.interfaces for part in device_plugins.classify(usb)}


def every() -> list[tuple[str, str]]:
    return [(machine, port) for machine in machines.NAMES for port in recorded(machine)]


def test_every_recorded_device_is_in_the_table() -> None:
    nothing = {where for where, row in expected.EXPECTED.items() if not row}
    assert set(every()) == set(expected.EXPECTED) - nothing


@pytest.mark.parametrize("found", expected.classified(), ids=lambda c: f"{c.machine}-{c.port}")
def test_classes_and_rules(found: expected.Classified) -> None:
    assert found.found == found.expected


@pytest.mark.parametrize(("machine", "port"), every())
def test_every_class_on_every_recorded_device(machine: str, port: str) -> None:
    """Whatever is free, a class takes of it only what is there; and no interface is of two classes."""
    device = recorded(machine)[port]
    numbers = frozenset(i.number for i in device.interfaces)
    claimed: dict[int, str] = {}
    for leaf in device_plugins.CLASSES:
        taken = leaf.claims(device, numbers)
        assert taken <= numbers and not leaf.claims(device, frozenset())
        assert leaf.claims(device, taken) <= taken
        if leaf is usb:
            continue
        for number in taken:
            assert number not in claimed or (machine, port) in DRIVER_DISKS, f"{claimed[number]} and {leaf.CLASS}"
            claimed[number] = leaf.CLASS
    given = [number for part in device_plugins.classify(device) for number in part.interfaces]
    assert len(given) == len(set(given)) and set(given) <= numbers


@pytest.mark.parametrize(("machine", "port"), every())
def test_a_driver_that_switches_a_setting_changes_no_class(machine: str, port: str) -> None:
    device = recorded(machine)[port]
    before = device_plugins.classify(device)
    for place, interface in enumerate(device.interfaces):
        for triple in interface.alternates:
            cls, subclass, protocol = (int(part, 16) for part in triple.split(":"))
            switched = msgspec.structs.replace(interface, cls=cls, subclass=subclass, protocol=protocol)
            interfaces = (*device.interfaces[:place], switched, *device.interfaces[place + 1 :])
            assert device_plugins.classify(msgspec.structs.replace(device, interfaces=interfaces)) == before


@pytest.mark.parametrize(("machine", "port", "cls"), NODES_OF)
def test_nodes(machine: str, port: str, cls: str) -> None:
    usb_device = recorded(machine)[port]
    rules = config.parse(expected.POLICY).devices.rules
    kind = next(k for k in matching.kinds(usb_device, rules) if k.part.cls == cls)
    device = Device(id="x", cls=kind.part.cls, usb=usb_device, interfaces=kind.part.interfaces)
    assert {n.path for n in device_plugins.grant(device).nodes} == NODES_OF[machine, port, cls]


@pytest.mark.parametrize(("machine", "port"), every())
def test_no_node_of_a_keyboard_but_raw(machine: str, port: str) -> None:
    """Of the classes that are not raw, none grants a node of an interface that types."""
    device = recorded(machine)[port]
    typing = {i.number for i in device.interfaces if usb.types(i)}
    for part in device_plugins.classify(device):
        if part.cls is not DeviceClass.USB:
            granted = device_plugins.grant(Device(id="x", cls=part.cls, usb=device, interfaces=part.interfaces)).nodes
            assert not {n.interface for n in granted} & typing


def test_usb_is_last_and_every_class_has_a_leaf() -> None:
    assert [leaf.CLASS for leaf in device_plugins.CLASSES] == list(DeviceClass)
    assert device_plugins.CLASSES[-1] is usb


@pytest.mark.parametrize(
    ("triples", "found"),
    [
        (["07:01:01"], {"printer": (0,)}),
        (["07:01:04"], {"printer": (0,)}),
        (["07:02:01"], {"usb": (0,)}),
        (["07:01:02", "08:06:50", "ff:00:00"], {"printer": (0,), "storage": (1,)}),
        (["0b:00:00"], {"ukey": (0,)}),
        (["0b:00:00", "ff:00:00"], {"ukey": (0, 1)}),
        (["03:01:01", "0b:00:00"], {"ukey": (1,)}),  # a keyboard with a card slot
        (["0b:00:00", "08:06:50"], {"ukey": (0,), "storage": (1,)}),  # a reader for both kinds of card
        (["08:06:62"], {"storage": (0,)}),
        (["08:06:50", "ff:00:00"], {"storage": (0, 1)}),  # an encrypted stick
        (["08:06:50", "03:00:00"], {"storage": (0, 1)}),
        (["08:06:50", "03:01:01"], {"storage": (0,)}),  # a stick that types
        (["08:06:50", "0a:00:00"], {"storage": (0,)}),
        (["08:04:00"], {"usb": (0,)}),  # a floppy drive
        (CAMERA, {"audio": (2, 3)}),
        (["ff:00:00"], {"usb": (0,)}),
        (["03:00:00"], {"usb": (0,)}),
        (["03:01:01"], {"usb": (0,)}),  # for a rule that says `input: true`
        (["09:00:00"], {}),
        (["ff:00:00", "09:00:00"], {}),
        ([], {}),
    ],
)
def test_classify(triples: list[str], found: dict[str, tuple[int, ...]]) -> None:
    assert parts(of(*triples)) == found


@pytest.mark.parametrize("vendor", [0x096E, 0x163C])
def test_the_driver_disk_of_a_key_is_the_keys(vendor: int) -> None:
    assert parts(of("08:06:50", "0b:00:00", vendor=vendor)) == {"ukey": (0, 1)}
    assert parts(of("08:06:50", vendor=vendor)) == {"storage": (0,)}


def test_what_types_on_a_key_is_the_keys() -> None:
    assert parts(of("03:01:01", "0b:00:00", vendor=0x1050)) == {"ukey": (0, 1)}
    otp, fido = Interface(0, 3, 1, 1, (0x0001_0006,)), Interface(1, 3, 0, 0, (0xF1D0_0001,))
    assert parts(UsbDevice(port="1-1", vendor=1, product=2, interfaces=(otp, fido))) == {"ukey": (0, 1)}


def test_a_keyboard_without_boot_protocol_is_still_a_keyboard() -> None:
    assert usb.types(Interface(0, 3, 0, 0, (0x0001_0006,)))
    assert usb.types(Interface(0, 8, 6, 0x50, (), ("08:06:50", "03:01:01")))  # one switch away from it
    assert not usb.types(Interface(0, 3, 0, 0, (0x000C_0001,)))


@pytest.mark.parametrize(
    ("usages", "buttons"),
    [
        ((0x000C_0001, 0x000B_0005, 0xFFA0_0003), True),
        ((0x000C_0001,), True),
        ((0x000C_0001, 0x0001_0006), False),
        ((), False),
    ],
)
def test_the_buttons_of_a_headset_are_its_own_unless_they_type(usages: tuple[int, ...], buttons: bool) -> None:
    headset = UsbDevice(
        port="1-1", vendor=1, product=2, interfaces=(Interface(0, 1, 1, 0), Interface(1, 3, 0, 0, usages))
    )
    assert parts(headset) == {"audio": (0, 1) if buttons else (0,)}


def test_printer_grant() -> None:
    def grant(device: UsbDevice) -> Grant:
        return device_plugins.grant(Device(id="printer-x", cls=DeviceClass.PRINTER, usb=device))

    assert grant(of("07:01:02", simulated=True)) == Grant(services=("ipp",))
    bus = DeviceNode("/dev/bus/usb/001/002", "usb", 189, 1)
    ipp_usb = UsbDevice(port="1-1", vendor=1, product=2, nodes=(bus,), interfaces=(Interface(0, 7, 1, 4),))
    assert grant(ipp_usb) == Grant(nodes=(bus,))


def test_raw_usb_grants_every_node() -> None:
    nodes = (DeviceNode("/dev/bus/usb/001/002", "usb", 189, 1), DeviceNode("/dev/ttyUSB0", "tty", 188, 0, 0))
    device = UsbDevice(port="1-1", vendor=1, product=2, nodes=nodes, interfaces=(Interface(0, 255, 0, 0),))
    assert device_plugins.grant(Device(id="usb-x", cls=DeviceClass.USB, usb=device)) == Grant(nodes=nodes)


@pytest.mark.parametrize(
    ("device_id", "formats"),
    [
        (
            "MFG:Hewlett-Packard;CMD:PJL,PML,PCLXL,POSTSCRIPT,PCL;MDL:x;",
            ("application/vnd.hp-pclxl", "application/postscript", "application/vnd.hp-pcl"),
        ),
        ("MFG:HP;CMD:PCL3GUI,PJL,JPEG,PCLM,AppleRaster,PWGRaster;", ("image/jpeg", "image/urf", "image/pwg-raster")),
        ("MANUFACTURER:x;COMMAND SET:PCL5e, PostScript Level 3 ,PDF;", None),
        (
            "command set:PS,PWG_RASTER,PDF,URF",
            ("application/postscript", "image/pwg-raster", "application/pdf", "image/urf"),
        ),
        ("CMD:PCL6,PCL 5c;", ("application/vnd.hp-pclxl", "application/vnd.hp-pcl")),
        ("CMD:POSTSCRI", ("application/octet-stream",)),
        ("CMD:MLC,BDC,ESCPL2;", ("application/octet-stream",)),
        ("MFG:x;MDL:y;", ("application/octet-stream",)),
        ("", ("application/octet-stream",)),
        ("CMD:PDF,PDF,PDF;CMD:PCL;", ("application/pdf",)),
    ],
)
def test_formats(device_id: str, formats: tuple[str, ...] | None) -> None:
    expected = formats or ("application/vnd.hp-pcl", "application/postscript", "application/pdf")
    assert printer.formats(device_id) == expected


@given(st.text(max_size=4000))
def test_formats_of_anything(untrusted: str) -> None:
    assert set(printer.formats(untrusted)) <= set(get_args(PageLanguage))


def test_an_endless_id_is_cut() -> None:
    assert printer.formats("X:" + "a" * 1_000_000 + ";CMD:PDF;") == ("application/octet-stream",)
    assert printer.formats("CMD:" + "x," * 100 + "PDF;") == ("application/octet-stream",)


def test_the_configuration_names_the_same_languages() -> None:
    assert {mime for mime, _, _ in printer.LANGUAGES} | {printer.OCTET_STREAM} == set(get_args(PageLanguage))
