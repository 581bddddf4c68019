"""What identifies one unit of a device, taken out of what a recording keeps of it. Pure.

Everything here is an allow-list: of an uevent file and of an IEEE 1284 device id only the keys named below stay. A serial
number becomes a stand-in, the same one wherever it stands in one recording, so that two devices with one serial number are
still twins and a device without one still has none.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

SERIAL_KEYS = frozenset({"SN", "SERN", "SERIALNUMBER", "SERIAL NUMBER"})
"""Of an IEEE 1284 device id, as printers write them."""
ID_KEYS = frozenset(
    {"MFG", "MANUFACTURER", "MDL", "MODEL", "CMD", "COMMAND SET", "CLS", "CLASS", "DES", "DESCRIPTION", "CID", "URF"}
)
"""Printers keep counters, networks and names of owners under other keys."""
UNIQUE_KEYS = frozenset({"HID_UNIQ", "UNIQ"})
"""Serial numbers in an uevent file (drivers/hid/hid-core.c, drivers/input/input.c)."""
NUMBER_KEYS = frozenset(
    {
        "MAJOR",
        "MINOR",
        "DEVNAME",
        "DEVTYPE",
        "DRIVER",
        "PRODUCT",
        "TYPE",
        "BUSNUM",
        "DEVNUM",
        "MODALIAS",
        "HID_ID",
        "IFINDEX",
        "PARTN",
    }
)
TEXT_KEYS = frozenset({"HID_NAME", "HID_PHYS", "NAME", "PHYS", "INTERFACE"})
"""Keys of an uevent file that stay; partition labels and UUIDs are not among them."""
TEXTS = ("manufacturer", "product")

MIN_SECRET_CHARS = 5
"""Shorter serial numbers are replaced where they stand as such, not inside of other texts."""
MAX_SECRETS = 4096
HARDWARE_ADDRESS = re.compile(r"([0-9A-Fa-f]{2}[:-]){5}[0-9A-Fa-f]{2}|(?<![0-9A-Fa-f])[0-9A-Fa-f]{12}(?![0-9A-Fa-f])")


class StandIns:
    """The serial numbers met so far and what stands for each; one object a recording."""

    def __init__(self) -> None:
        self._serials: dict[str, str] = {}
        self._addresses: dict[str, str] = {}

    @property
    def count(self) -> int:
        return len(self._serials) + len(self._addresses)

    def serial(self, secret: str) -> str:
        """`SERIAL-1` for the first; nothing for nothing."""
        plain = secret.strip("\0\n\t ")
        return self._known(self._serials, plain, "SERIAL-{}") if plain else ""

    def address(self, secret: str) -> str:
        """`usbnet1` for the first hardware address, which also fits where a network interface is named after one."""
        return self._known(self._addresses, re.sub(r"[^0-9a-f]", "", secret.lower()), "usbnet{}")

    def _known(self, known: dict[str, str], secret: str, form: str) -> str:
        if secret not in known and len(known) >= MAX_SECRETS:
            return form.format("x")
        return known.setdefault(secret, form.format(len(known) + 1))

    def replace(self, text: str) -> str:
        """`text` without any serial number or hardware address, as it is, in other case, or with underscores."""
        known = {s: stand_in for s, stand_in in self._serials.items() if len(s) >= MIN_SECRET_CHARS}
        if known:
            longest_first = sorted(known, key=len, reverse=True)
            pattern = "|".join(f"({re.escape(s)}|{re.escape(s.replace(' ', '_'))})" for s in longest_first)
            text = re.sub(
                pattern, lambda found: known[longest_first[(found.lastindex or 1) - 1]], text, flags=re.IGNORECASE
            )
        return HARDWARE_ADDRESS.sub(lambda found: self.address(found[0]), text)


def learn(name: str, texts: Mapping[str, str], stand_ins: StandIns) -> None:
    """Note the serial numbers in the text files of one directory called `name`."""
    if "serial" in texts and not is_root_hub(name):
        stand_ins.serial(texts["serial"])
    for key, value in _pairs(texts.get("ieee1284_id", "")):
        if key.upper() in SERIAL_KEYS:
            stand_ins.serial(value)
    for key, _, value in (line.partition("=") for line in texts.get("uevent", "").splitlines()):
        if key in UNIQUE_KEYS:
            stand_ins.serial(value.strip('"'))


def remove(name: str, texts: Mapping[str, str], stand_ins: StandIns) -> dict[str, str]:
    """The same files with nothing that identifies the unit; `learn` has seen every directory before."""
    cleaned = dict(texts)
    if "serial" in cleaned and not is_root_hub(name):
        cleaned["serial"] = stand_ins.serial(cleaned["serial"])
    for attribute in TEXTS:
        if attribute in cleaned:
            cleaned[attribute] = stand_ins.replace(cleaned[attribute])
    if "ieee1284_id" in cleaned:
        cleaned["ieee1284_id"] = _device_id(cleaned["ieee1284_id"], stand_ins)
    if "uevent" in cleaned:
        cleaned["uevent"] = "\n".join(_uevent(cleaned["uevent"], stand_ins))
    return cleaned


def path(directory: str, stand_ins: StandIns) -> str:
    """A path in sysfs without the hardware address that a network interface is often named after."""
    return re.sub(r"(?<=/net/)[^/]+", lambda found: _interface(found[0], stand_ins), directory)


def is_root_hub(name: str) -> bool:
    """Its serial number is the address of its controller, which is in its path."""
    return re.fullmatch(r"usb[0-9]+", name) is not None


def _interface(name: str, stand_ins: StandIns) -> str:
    found = re.search(r"[0-9a-fA-F]{12}$", name)
    return stand_ins.address(found[0]) if found else name


def _pairs(device_id: str) -> list[tuple[str, str]]:
    pairs = (pair.partition(":") for pair in device_id.split(";"))
    return [(key.strip(), value.strip()) for key, colon, value in pairs if colon]


def _device_id(text: str, stand_ins: StandIns) -> str:
    kept = []
    for key, value in _pairs(text):
        if key.upper() in SERIAL_KEYS:
            kept.append(f"{key}:{stand_ins.serial(value)};")
        elif key.upper() in ID_KEYS:
            kept.append(f"{key}:{stand_ins.replace(value)};")
    return "".join(kept)


def _uevent(text: str, stand_ins: StandIns) -> list[str]:
    kept = []
    for line in text.splitlines():
        key, _, value = line.partition("=")
        if key in NUMBER_KEYS:
            kept.append(line)
        elif key in UNIQUE_KEYS:
            quote = '"' * value.startswith('"')
            kept.append(f"{key}={quote}{stand_ins.serial(value.strip(chr(34)))}{quote}")
        elif key == "INTERFACE":
            kept.append(f"{key}={_interface(value, stand_ins)}")
        elif key in TEXT_KEYS:
            kept.append(f"{key}={stand_ins.replace(value)}")
    return kept
