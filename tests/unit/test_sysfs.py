"""Reading devices from sysfs trees: whole, hostile, and while they vanish."""

import os
import shutil
from pathlib import Path

import pytest

from nodeagent.devices import sysfs
from nodeagent.devices.sysfs import clean, usb_paths
from nodeagent.host import HostRoot
from nodeagent.model import DeviceNode, Interface, UsbDevice
from tests import machines

YUBIKEY = "sys/devices/pci0000:00/0000:00:14.0/usb1/1-3"
PRINTER = "sys/devices/pci0000:00/0000:00:14.0/usb1/1-4"


def read(host: HostRoot, known: tuple[UsbDevice, ...] = ()) -> tuple[UsbDevice, ...]:
    return sysfs.read_devices(host, usb_paths(host), {u.port: u for u in known})


def write(root: Path, directory: str, **files: str) -> None:
    machines.materialise(root, {directory: files})


def test_a_whole_device(tmp_path: Path) -> None:
    assert read(machines.machine(tmp_path, "yubikey")) == (
        UsbDevice(
            port="1-3",
            vendor=0x1050,
            product=0x0407,
            serial="",
            manufacturer="Yubico",
            name="YubiKey OTP+FIDO+CCID",
            interfaces=(
                Interface(0, 0x03, 0x01, 0x01, (0x0001_0006,)),
                Interface(1, 0x03, 0x00, 0x00, (0xF1D0_0001,)),
                Interface(2, 0x0B, 0x00, 0x00),
            ),
            interface_types=("03:01:01", "03:00:00", "0b:00:00"),
            nodes=(
                DeviceNode("/dev/bus/usb/001/009", "usb", 189, 8, -1),
                DeviceNode("/dev/hidraw0", "hidraw", 243, 0, 0),
                DeviceNode("/dev/input/event3", "input", 13, 67, 0),
                DeviceNode("/dev/hidraw1", "hidraw", 243, 1, 1),
            ),
            connect_type="hotplug",
            sysfs="/" + YUBIKEY,
        ),
    )


def test_hubs_are_not_devices_and_a_device_has_only_its_own_nodes(tmp_path: Path) -> None:
    found = read(machines.machine(tmp_path, "desk-hub"))
    assert [u.port for u in found] == ["1-1.1", "1-1.2", "1-1.4"]
    assert {n.path for n in found[2].nodes} == {"/dev/bus/usb/001/006", "/dev/hidraw3"}


def test_printer_id_and_partition(tmp_path: Path) -> None:
    host = machines.materialise(tmp_path, machines.tree("laserjet"), machines.tree("stick"))
    printer, stick = read(host)
    assert printer.ieee1284_id.startswith("MFG:Hewlett-Packard;CMD:PJL,")
    assert DeviceNode("/dev/sdb1", "block", 8, 17, 0) in stick.nodes


def test_what_is_only_an_alternate_setting(tmp_path: Path) -> None:
    """ipp-usb has switched interface 0 of this printer, which is not the setting that the device began with."""
    (printer,) = read(machines.machine(tmp_path, "ipp-usb-hp"))
    assert printer.types == ("ff:00:ff", "07:01:04", "07:01:02", "07:01:04", "07:01:02")
    assert [(i.triple, i.alternates) for i in printer.interfaces] == [
        ("07:01:04", ("ff:00:ff", "07:01:04")),
        ("07:01:02", ("07:01:02", "07:01:04")),
        ("07:01:02", ()),
    ]
    assert printer.interfaces[2].types == ("07:01:02",)


def test_only_the_active_configuration(tmp_path: Path) -> None:
    found = {u.port: u for u in read(machines.machine(tmp_path, "dock"))}
    assert found["2-1.2"].types == ("ff:ff:00",)
    modem = read(machines.machine(tmp_path, "oddities"))[0]
    assert modem.types == ("02:0e:00", "0a:00:02", "0a:00:02")


@pytest.mark.parametrize("untrusted", [b"", b"\x12\x01", bytes(70_000), b"\xff" * 300])
def test_descriptors_that_cannot_be_read_leave_the_interfaces_in_use(tmp_path: Path, untrusted: bytes) -> None:
    host = machines.machine(tmp_path, "yubikey")
    (tmp_path / YUBIKEY / "descriptors").write_bytes(untrusted)
    (key,) = read(host)
    assert key.interface_types == () and key.types == ("03:01:01", "03:00:00", "0b:00:00")


def test_a_device_that_lies_about_its_length_has_the_interfaces_that_the_kernel_gave_it(tmp_path: Path) -> None:
    liar = next(u for u in read(machines.machine(tmp_path, "oddities")) if u.port == "1-5")
    assert liar.types == ("08:06:50",)


def test_connect_type(tmp_path: Path) -> None:
    """By the device's link to its port, else as the child of its hub that it is; older kernels call it `port4`, or nothing."""
    host = machines.machine(tmp_path, "oddities")
    assert {u.port: u.connect_type for u in read(host)} == {
        "1-1": "hotplug", "1-4": "hardwired", "1-5": "", "1-6": "not used",
    }  # fmt: skip
    hub = tmp_path / "sys/devices/pci0000:00/0000:00:14.0/usb1"
    (hub / "1-4/port").unlink()
    assert {u.port: u.connect_type for u in read(host)}["1-4"] == "hardwired"
    (hub / "1-0:1.0/usb1-port4").rename(hub / "1-0:1.0/port4")
    assert {u.port: u.connect_type for u in read(host)}["1-4"] == "hardwired"
    shutil.rmtree(hub / "1-0:1.0/port4")
    assert {u.port: u.connect_type for u in read(host)}["1-4"] == ""


def test_connect_type_behind_hubs(tmp_path: Path) -> None:
    host = machines.machine(tmp_path, "hub-tree")
    port = tmp_path / "sys/devices/pci0000:00/0000:00:14.0/usb1/1-1/1-1.2/1-1.2.3/1-1.2.3:1.0/1-1.2.3-port4"
    (port / "connect_type").write_text("hardwired\n")
    for link in (True, False):
        assert {u.port: u.connect_type for u in read(host)}["1-1.2.3.4"] == "hardwired"
        if link:
            (port.parents[1] / "1-1.2.3.4/port").unlink()


def test_no_usb_at_all(tmp_path: Path) -> None:
    assert read(HostRoot(tmp_path)) == ()


@pytest.mark.parametrize(
    "files",
    [
        pytest.param({"authorized": "0"}, id="blocked by its administrator"),
        pytest.param({"bDeviceClass": "09"}, id="hub"),
        pytest.param({"idVendor": "3f0"}, id="three digits"),
        pytest.param({"idVendor": "١٢٣٤"}, id="digits of another script"),
        pytest.param({"idProduct": ""}, id="gone while read"),
        pytest.param({"idProduct": "hex:ff00"}, id="bytes"),
    ],
)
def test_not_a_device(tmp_path: Path, files: dict[str, str]) -> None:
    host = machines.machine(tmp_path, "laserjet")
    write(tmp_path, PRINTER, **files)
    assert read(host) == ()


def test_a_device_that_is_not_configured_yet(tmp_path: Path) -> None:
    tree = {d: f for d, f in machines.tree("laserjet").items() if "1-4:1.0" not in d}
    assert read(machines.materialise(tmp_path, tree)) == ()


def test_dangling_and_foreign_links(tmp_path: Path) -> None:
    host = machines.machine(tmp_path / "root", "laserjet")
    devices = tmp_path / "root" / sysfs.BUS.lstrip("/")
    (devices / "1-9").symlink_to("../../../devices/gone/1-9")
    (devices / "1-8").symlink_to("1-8")
    outside = machines.machine(tmp_path / "outside", "card-reader").path(
        "/sys/devices/pci0000:00/0000:00:14.0/usb1/1-5"
    )
    (devices / "1-7").symlink_to(outside)
    assert [u.port for u in read(host)] == ["1-4"]


def test_a_captured_sys_that_is_a_link_out_of_the_tree(tmp_path: Path) -> None:
    machines.machine(tmp_path / "other", "laserjet")
    (tmp_path / "root").mkdir()
    (tmp_path / "root/sys").symlink_to(tmp_path / "other/sys")
    assert read(HostRoot(tmp_path / "root")) == ()


def test_every_file_may_vanish_while_it_is_read(tmp_path: Path) -> None:
    """Delete the files of a machine one by one, in every position a reader may meet."""
    host = machines.machine(tmp_path, "yubikey")
    files = [Path(d) / f for d, _, names in os.walk(tmp_path / "sys/devices") for f in names]
    assert len(files) > 40
    for file in files:
        content = None if file.is_symlink() else file.read_bytes()
        target = os.readlink(file) if file.is_symlink() else ""
        file.unlink()
        for device in read(host):
            assert device.port == "1-3" or file.name == "bDeviceClass"  # then its hub is not known as one
        if content is None:
            file.symlink_to(target)
        else:
            file.write_bytes(content)
    assert len(read(host)) == 1


def test_every_file_may_be_garbage(tmp_path: Path) -> None:
    host = machines.machine(tmp_path, "yubikey")
    for directory, _, names in os.walk(tmp_path / "sys/devices"):
        for name in names:
            path = Path(directory) / name
            if path.is_symlink() or name in ("idVendor", "idProduct", "bDeviceClass", "authorized"):
                continue
            path.write_bytes(b"\xff\x1b[2J\n=\n" + bytes(range(256)) * 40)
    assert read(host) == ()  # without interfaces that can be read there is nothing to say


@pytest.mark.parametrize(
    "uevent",
    [
        "MAJOR=1\nMINOR=1\nDEVNAME=../etc/shadow",
        "MAJOR=1\nMINOR=1\nDEVNAME=/etc/shadow",
        "MAJOR=1\nMINOR=1\nDEVNAME=a//b",
        "MAJOR=1\nMINOR=1\nDEVNAME=a b",
        "MAJOR=1\nMINOR=1\nDEVNAME=",
        "MAJOR=x\nMINOR=1\nDEVNAME=usb/lp0",
        "MAJOR=1\nDEVNAME=usb/lp0",
        "",
    ],
)
def test_a_node_that_cannot_be(tmp_path: Path, uevent: str) -> None:
    host = machines.machine(tmp_path, "laserjet")
    write(tmp_path, f"{PRINTER}/1-4:1.0/usbmisc/lp0", uevent=uevent)
    (printer,) = read(host)
    assert [n.path for n in printer.nodes] == ["/dev/bus/usb/001/005"]


def test_limits(tmp_path: Path) -> None:
    host = machines.machine(tmp_path, "laserjet")
    extra = {
        f"{PRINTER}/1-4:1.0/x/n{n}": {
            "dev": "1:1",
            "uevent": f"MAJOR=1\nMINOR={n}\nDEVNAME=n{n}",
            "subsystem": "->/class/x",
        }
        for n in range(100)
    }
    deep = {f"{PRINTER}/1-4:1.0" + "/d" * 40: {"dev": "1:1"}}
    machines.materialise(tmp_path, extra, deep)
    (printer,) = read(host)
    assert len(printer.nodes) == sysfs.MAX_NODES


def test_what_is_known_of_a_plugged_device_is_not_read_again(tmp_path: Path) -> None:
    """CUPS's usb back end unbinds usblp, a FIDO program usbhid: the device is the same device without their files."""
    host = machines.machine(tmp_path, "yubikey")
    (first,) = read(host)
    (tmp_path / YUBIKEY / "manufacturer").unlink()
    hid = next((tmp_path / YUBIKEY / "1-3:1.1").glob("0003:*"))
    (hid / "report_descriptor").unlink()
    (tmp_path / YUBIKEY / "descriptors").unlink()
    (tmp_path / YUBIKEY / "port").unlink()
    (second,) = read(host, known=(first,))
    assert second == first


def test_a_switched_interface_is_the_same_device_with_the_same_settings(tmp_path: Path) -> None:
    host = machines.machine(tmp_path, "ipp-usb-epson")
    (first,) = read(host)
    directory = next(d for d in machines.tree("ipp-usb-epson") if d.endswith("1-4:1.3"))
    write(tmp_path, directory, bInterfaceClass="07", bInterfaceSubClass="01", bInterfaceProtocol="04")
    (second,) = read(host, known=(first,))
    assert (first.interfaces[3].triple, second.interfaces[3].triple) == ("ff:01:00", "07:01:04")
    assert second.interfaces[3].types == first.interfaces[3].types == ("ff:01:00", "07:01:04")
    assert second.types == first.types


def test_another_device_in_the_same_port_is_read_afresh(tmp_path: Path) -> None:
    host = machines.machine(tmp_path, "laserjet")
    (first,) = read(host)
    write(tmp_path, PRINTER, serial="OTHER", dev="189:5", uevent="MAJOR=189\nMINOR=5\nDEVNAME=bus/usb/001/006")
    (second,) = read(host, known=(first,))
    assert second.serial == "OTHER"


def test_a_node_that_comes_later_changes_the_device(tmp_path: Path) -> None:
    tree = machines.tree("laserjet")
    late = {d: f for d, f in tree.items() if "usbmisc" in d}
    host = machines.materialise(tmp_path, {d: f for d, f in tree.items() if d not in late})
    (first,) = read(host)
    machines.materialise(tmp_path, late)
    (second,) = read(host, known=(first,))
    assert (len(first.nodes), len(second.nodes)) == (1, 2)


@pytest.mark.parametrize(
    ("untrusted", "text"),
    [
        ("HP LaserJet", "HP LaserJet"),
        ("  a \t\r\n b\x00 ", "a b"),
        ("\x1b[31mred\x07", "[31mred"),
        ("abc\u202edef\u200b\ufeff", "abcdef"),
        ("\u2028line", "line"),
        ("\udc80lone", "lone"),
        ("\ue000private", "private"),
        ("\ufffd打印机", "\ufffd打印机"),
        ("x" * 500, "x" * 126),
        ("", ""),
    ],
)
def test_clean(untrusted: str, text: str) -> None:
    assert clean(untrusted) == text
    clean(untrusted).encode()
