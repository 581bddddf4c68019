"""Slots: names that the kubelet can repeat, directories that are never handed on, what a container receives."""

import json
import stat
from pathlib import Path

import pytest

from nodeagent.devices.slots import Slots, answer, document, slot_name, variable
from nodeagent.model import Audience, Device, DeviceClass, DeviceNode, Grant, Offer, Resource, UsbDevice

ID = "printer-aaaabbbbccccddddeeee"


def resource(name: str = "opencdi.io/printer", **changes: object) -> Resource:
    usb = UsbDevice(port="1-1", vendor=1, product=2, serial="SECRET", name="Laser", simulated=True)
    offer = Offer(
        **{
            "device": Device(id=ID, cls=DeviceClass.PRINTER, usb=usb),
            "rule": "r",
            "grant": Grant(services=("ipp",)),
            **changes,
        }
    )
    return Resource(name=name, to=Audience(), offers={ID: offer})


@pytest.fixture
def slots(tmp_path: Path) -> Slots:
    made = Slots(tmp_path / "run")
    made.prepare()
    return made


def test_the_name_depends_on_resource_and_set_of_ids_alone() -> None:
    # printf 'opencdi.io/printer\0a\0b' | sha256sum | cut -c1-40
    assert slot_name("opencdi.io/printer", ["b", "a"]) == "4a6d94b7fac4874fd5db544776d4d21eac3f21f0"
    assert slot_name("opencdi.io/printer", ["b", "a"]) == slot_name("opencdi.io/printer", ("a", "b"))
    assert slot_name("opencdi.io/printer", ["a"]) != slot_name("opencdi.io/ukey", ["a"])
    assert slot_name("r", ["ab"]) != slot_name("r", ["a", "b"])


def test_directory_modes(slots: Slots) -> None:
    path = slots.ensure("x")
    assert stat.S_IMODE(slots.root.stat().st_mode) == 0o700
    assert stat.S_IMODE(path.stat().st_mode) == 0o755


def test_a_directory_set_aside_is_not_the_next_one(slots: Slots) -> None:
    old = slots.ensure("x").stat().st_ino
    (slots.path("x") / "ipp.sock").touch()
    aside = slots.set_aside("x")
    assert aside is not None and aside.stat().st_ino == old and (aside / "ipp.sock").exists()
    fresh = slots.ensure("x")
    assert fresh.stat().st_ino != old and not list(fresh.iterdir())
    slots.discard(aside)
    assert not aside.exists() and fresh.exists()
    assert slots.set_aside("never-made") is None


def test_prepare_clears_what_a_crash_left_aside(slots: Slots) -> None:
    slots.ensure("x")
    aside = slots.set_aside("x")
    slots.ensure("y")
    slots.prepare()
    assert aside is not None and not aside.exists()
    assert slots.names() == {"y"}


def test_the_document_is_for_everybody_and_keeps_the_serial(slots: Slots) -> None:
    slots.ensure("x")
    slots.write(document("x", resource(), [ID], "bound", 7))
    path = slots.path("x") / "slot.json"
    assert stat.S_IMODE(path.stat().st_mode) == 0o444
    read = json.loads(path.read_text())
    assert read["schema"] == "nodeagent.slot/v1"
    assert read["devices"] == [
        {"id": ID, "class": "printer", "name": "Laser", "simulated": True, "health": "Healthy", "reason": ""}
    ]
    assert read["services"] == {"ipp": "/run/opencdi/printer/ipp.sock"}
    assert "SECRET" not in path.read_text()
    again = slots.read("x")
    assert again is not None and again.made_ns == 7 and again.ids == (ID,)


def test_an_unreadable_document_is_none(slots: Slots) -> None:
    assert slots.read("x") is None
    (slots.ensure("x") / "slot.json").write_text("{")
    assert slots.read("x") is None


def test_what_a_container_receives() -> None:
    given = answer(resource(), [ID], Path("/run/nodeagent/slots/abc"))
    assert given.env == {"OPENCDI_PRINTER": "abc", "CUPS_SERVER": "/run/opencdi/printer/ipp.sock"}
    (mount,) = given.mounts
    assert (mount.container_path, mount.host_path, mount.read_only) == (
        "/run/opencdi/printer", "/run/nodeagent/slots/abc", True,
    )  # fmt: skip
    assert given.nodes == ()


def test_nodes_only_where_the_rule_gives_nodes() -> None:
    node = DeviceNode("/dev/usb/lp0", "usbmisc", 180, 0)
    grant = Grant(services=("ipp",), nodes=(node,))
    given = answer(resource(give="node", grant=grant), [ID], Path("/run/nodeagent/slots/abc"))
    assert given.nodes == (node,)
    assert given.env == {"OPENCDI_PRINTER": "abc"}
    assert answer(resource(grant=grant), [ID], Path("/x/abc")).nodes == ()


def test_variable_names() -> None:
    assert variable(resource("opencdi.io/usb-storage")) == "OPENCDI_USB_STORAGE"
    assert variable(resource("opencdi.io/ukey-a1.b")) == "OPENCDI_UKEY_A1_B"
