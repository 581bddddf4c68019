"""What every recorded device is, and which rule of a sample policy takes each part of it; written down by hand."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path

import msgspec

from nodeagent import config
from nodeagent.devices import matching, sysfs
from nodeagent.model import UsbDevice
from tests import machines

POLICY = """
devices:
  rules:
    - name: tokens  # nothing in their descriptors says that they are keys
      match: {id: "one-of { c1a5:0501 096e:0309 096e:0703 04e6:e003 }"}
      as: ukey
      give: node
    - name: keys
      match: {class: ukey}
      give: node
    - name: printers
      match: {class: printer}
    - name: headsets  # not the microphone of a camera
      match: {class: audio, with_interface: "none-of { 0e:*:* }"}
      give: node
    - name: encrypted-sticks
      match: {class: storage, with_interface: "{ 08:06:50 03:00:00 }"}
      give: node
    - name: sticks  # none that types
      match: {class: storage, with_interface: "none-of { 03:*:* }"}
      give: node
    - name: modems
      match: {class: usb, with_interface: "all-of { 02:0e:00 0a:00:02 }"}
      give: node
    - name: built-in
      match: {class: usb, with_connect_type: hardwired}
      give: node
    - name: kiosk-mouse
      match: {class: usb, port: 1-1.4, input: true}
      give: node
"""

Parts = Mapping[str, tuple[tuple[int, ...], str | None]]
"""Class -> the numbers of its interfaces, and the rule that takes it (None: none does)."""

KEYBOARD: Parts = {"usb": ((0, 1), None)}
MOUSE: Parts = {"usb": ((0,), None)}
STICK: Parts = {"storage": ((0,), "sticks")}
KEY: Parts = {"ukey": ((0,), "keys")}
TOKEN: Parts = {"ukey": ((0,), "tokens")}
PRINTER: Parts = {"printer": ((0,), "printers")}

EXPECTED: Mapping[tuple[str, str], Parts] = {
    ("badusb", "1-1"): {"storage": ((0,), None)},
    ("card-reader", "1-5"): KEY,
    ("console", "1-1"): KEYBOARD,
    ("console", "1-2"): MOUSE,
    ("console", "1-3"): {"ukey": ((2,), "keys")},
    ("desk-hub", "1-1.1"): KEYBOARD,
    ("desk-hub", "1-1.2"): MOUSE,
    ("desk-hub", "1-1.4"): KEY,
    ("dock", "1-1.3"): {"audio": ((0, 1, 2, 3), "headsets")},
    ("dock", "2-1.2"): {"usb": ((0,), None)},
    ("dock", "2-1.4"): STICK,
    ("encrypted-stick", "1-1"): {"storage": ((0, 1), "encrypted-sticks")},
    ("epass", "1-1"): KEY,
    ("epass", "1-2"): {"ukey": ((0, 1), "keys")},
    ("epass", "1-3"): KEY,
    ("epass", "1-4"): {"ukey": ((0, 1), "keys")},
    ("headset", "1-6"): {"audio": ((0, 1, 2, 3), "headsets")},
    ("hid-tokens", "1-1"): TOKEN,
    ("hid-tokens", "1-2"): TOKEN,
    ("hub-tree", "1-1.1"): STICK,
    ("hub-tree", "1-1.2.1"): KEY,
    ("hub-tree", "1-1.2.3.1"): STICK,
    ("hub-tree", "1-1.2.3.4"): PRINTER,
    ("hub-tree", "1-1.4"): {"usb": ((0,), "kiosk-mouse")},
    ("ipp-usb-epson", "1-4"): {"printer": ((1, 3, 4, 5), "printers")},
    ("ipp-usb-hp", "1-2"): {"printer": ((0, 1, 2), "printers")},
    ("laserjet", "1-4"): PRINTER,
    ("multifunction", "1-2"): {"printer": ((1, 2), "printers"), "storage": ((3,), "sticks")},
    ("oddities", "1-1"): {"usb": ((12, 13), "modems")},
    ("oddities", "1-2"): {},  # not authorised
    ("oddities", "1-3"): {},  # not configured
    ("oddities", "1-4"): {"usb": ((0,), "built-in")},
    ("oddities", "1-5"): STICK,
    ("oddities", "1-6"): {"usb": ((0,), None)},
    ("pantum", "1-1"): PRINTER,
    ("pin-pads", "1-1"): KEY,
    ("pin-pads", "1-2"): TOKEN,
    ("scsi-tokens", "1-1"): TOKEN,
    ("scsi-tokens", "1-2"): {"ukey": ((0, 1), "keys")},
    ("stick", "2-1"): STICK,
    ("storage-keys", "1-1"): {"ukey": ((1, 2), "keys"), "storage": ((0,), None)},
    ("storage-keys", "1-2"): {"ukey": ((0,), "keys"), "storage": ((1,), "sticks")},
    ("twins", "1-1"): STICK,
    ("twins", "1-2"): STICK,
    ("twins", "1-3"): KEY,
    ("twins", "1-4"): KEY,
    ("twins", "1-5"): STICK,
    ("twins", "1-6"): STICK,
    ("uac2-dongle", "1-1"): {"audio": ((0, 1, 2), "headsets")},
    ("uas-disk", "2-1"): STICK,
    ("webcam", "1-1"): {"audio": ((2, 3), None)},
    ("yubikey", "1-3"): {"ukey": ((0, 1, 2), "keys")},
}


class Classified(msgspec.Struct, frozen=True):
    """One recorded device: what it should be and what it is."""

    machine: str
    port: str
    expected: Parts
    found: Parts

    @property
    def right(self) -> bool:
        return self.expected == self.found


def devices(machine: str, root: Path) -> dict[str, UsbDevice]:
    """The devices of one recording, given out below `root`, by port."""
    host = machines.machine(root, machine)
    return {usb.port: usb for usb in sysfs.read_devices(host, sysfs.usb_paths(host), {})}


def classify(usb: UsbDevice) -> Parts:
    """What the sample policy makes of a device."""
    rules = config.parse(POLICY).devices.rules
    found = {}
    for kind in matching.kinds(usb, rules):
        rule = matching.taking(usb, kind.natural, rules)
        found[kind.part.cls.value] = (kind.part.interfaces, rule.name if rule else None)
    return found


def classified() -> tuple[Classified, ...]:
    """Every recorded device but hubs, read from its recording; one that is in no row above is expected to be nothing."""
    made = []
    for machine in machines.NAMES:
        with tempfile.TemporaryDirectory() as root:
            found = devices(machine, Path(root))
        ports = {port for name, port in EXPECTED if name == machine} | set(found)
        made += [
            Classified(machine, port, EXPECTED.get((machine, port), {}), classify(found[port]) if port in found else {})
            for port in sorted(ports)
        ]
    return tuple(made)
