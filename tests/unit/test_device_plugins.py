"""The leaves: who claims what on the recorded machines, what holding it means, and what a printer says it speaks."""

from pathlib import Path
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

import device_plugins
from device_plugins import printer, usb
from nodeagent.config import PageLanguage
from nodeagent.devices import sysfs
from nodeagent.model import Device, DeviceClass, DeviceNode, Grant, Interface, UsbDevice
from tests import machines

CLASSES_OF = {
    "card-reader": {"1-5": "ukey"},
    "desk-hub": {"1-1.1": None, "1-1.2": None, "1-1.4": "ukey"},
    "headset": {"1-6": "audio"},
    "laserjet": {"1-4": "printer"},
    "multifunction": {"1-2": "printer"},
    "stick": {"2-1": "storage"},
    "yubikey": {"1-3": "ukey"},
}
NODES_OF = {
    ("card-reader", "1-5"): {"/dev/bus/usb/001/006"},
    ("desk-hub", "1-1.4"): {"/dev/hidraw6"},
    ("headset", "1-6"): {"/dev/snd/controlC1", "/dev/snd/pcmC1D0c", "/dev/snd/pcmC1D0p"},
    ("laserjet", "1-4"): {"/dev/usb/lp0"},
    ("multifunction", "1-2"): {"/dev/usb/lp1"},
    ("stick", "2-1"): {"/dev/sdb", "/dev/sdb1"},
    # hidraw2 is its keyboard interface: whoever reads it sees one-time passwords typed by the key.
    ("yubikey", "1-3"): {"/dev/bus/usb/001/009", "/dev/hidraw3"},
}


def on(machine: str, root: Path) -> dict[str, UsbDevice]:
    host = machines.machine(root, machine)
    return {u.port: u for u in sysfs.read_devices(host, sysfs.usb_paths(host), {})}


def of(*triples: str, simulated: bool = False) -> UsbDevice:
    parts = [[int(part, 16) for part in t.split(":")] for t in triples]
    interfaces = tuple(Interface(n, cls, sub, protocol) for n, (cls, sub, protocol) in enumerate(parts))
    return UsbDevice(port="1-1", vendor=1, product=2, interfaces=interfaces, simulated=simulated)


def test_every_machine_is_in_the_table() -> None:
    assert sorted(CLASSES_OF) == sorted(machines.NAMES)


@pytest.mark.parametrize("machine", machines.NAMES)
def test_classes(machine: str, tmp_path: Path) -> None:
    assert {p: device_plugins.classify(u) for p, u in on(machine, tmp_path).items()} == CLASSES_OF[machine]


@pytest.mark.parametrize("machine", machines.NAMES)
def test_no_two_classes_claim_one_recorded_device(machine: str, tmp_path: Path) -> None:
    for port, device in on(machine, tmp_path).items():
        claiming = [leaf.CLASS for leaf in device_plugins.CLASSES[:-1] if leaf.claims(device)]
        assert len(claiming) <= 1, f"{port} of {machine} is claimed by {claiming}"


@pytest.mark.parametrize(("machine", "port"), NODES_OF)
def test_nodes(machine: str, port: str, tmp_path: Path) -> None:
    device = on(machine, tmp_path)[port]
    cls = device_plugins.classify(device)
    assert cls is not None
    nodes = device_plugins.grant(Device(id="x", cls=cls, usb=device)).nodes
    assert {n.path for n in nodes} == NODES_OF[machine, port]


def test_usb_is_last_and_every_class_has_a_leaf() -> None:
    assert [leaf.CLASS for leaf in device_plugins.CLASSES] == list(DeviceClass)
    assert device_plugins.CLASSES[-1] is usb


@pytest.mark.parametrize(
    ("triples", "cls"),
    [
        (["07:01:01"], "printer"),
        (["07:01:04"], "printer"),
        (["07:02:01"], "usb"),
        (["0b:00:00"], "ukey"),
        (["03:01:01", "0b:00:00"], "ukey"),  # a keyboard with a card slot
        (["08:06:62"], "storage"),
        (["08:06:50", "ff:00:00"], "storage"),  # an encrypted stick
        (["08:06:50", "03:00:00"], "storage"),
        (["08:06:50", "0a:00:00"], "usb"),
        (["08:04:00"], "usb"),  # a floppy drive
        (["0e:01:00", "0e:02:00", "01:01:00", "01:02:00"], "audio"),  # a camera with a microphone
        (["0b:00:00", "08:06:50"], "ukey"),  # a key with its driver on a disk
        (["ff:00:00"], "usb"),
        (["03:00:00"], "usb"),
        (["03:01:01"], None),
        (["03:01:02", "03:00:00"], None),
        (["03:01:01", "ff:00:00"], "usb"),
        (["09:00:00"], None),
        ([], None),
    ],
)
def test_classify(triples: list[str], cls: str | None) -> None:
    assert device_plugins.classify(of(*triples)) == cls


def test_a_keyboard_without_boot_protocol_is_still_the_console() -> None:
    keyboard = UsbDevice(port="1-1", vendor=1, product=2, interfaces=(Interface(0, 3, 0, 0, (0x0001_0006,)),))
    assert device_plugins.classify(keyboard) is None


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
