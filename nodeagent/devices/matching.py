"""Rules against devices: which rule takes a device, and what it then is. Pure.

The first rule that matches a part of a device takes it. A rule with `as:` takes the whole device, whatever its parts are.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from functools import lru_cache

import msgspec

import device_plugins
from device_plugins.usb import CONSOLE_TRIPLES, types
from nodeagent.config import SETS, Match, Rule
from nodeagent.model import Device, DeviceClass, Part, UsbDevice
from nodeagent.usbguard import AttributeSet, Operator, SetText, holds, take_set


class Difference(msgspec.Struct, frozen=True):
    """An attribute of a rule that a device does not fit. `why` is for people; a serial number is never in it."""

    attribute: str
    why: str


class Kind(msgspec.Struct, frozen=True):
    """What a device, or a part of it, is taken for; `natural` is what its descriptors say."""

    part: Part
    natural: DeviceClass


def kinds(usb: UsbDevice, rules: Sequence[Rule]) -> tuple[Kind, ...]:
    """The parts of a device under these rules; none for a hub."""
    natural = device_plugins.classify(usb)
    for part in natural:
        rule = taking(usb, part.cls, rules)
        if rule is not None and rule.as_ is not None:
            return (Kind(Part(rule.as_, tuple(sorted(i.number for i in usb.interfaces))), part.cls),)
    return tuple(Kind(part, part.cls) for part in natural)


def taking(usb: UsbDevice, natural: DeviceClass, rules: Iterable[Rule]) -> Rule | None:
    """The rule that takes the part of a device which its descriptors say is `natural`."""
    return next((r for r in rules if not differences(usb, natural, r.match)), None)


def rule_of(device: Device, rules: Iterable[Rule]) -> Rule | None:
    """The rule that takes a device."""
    return taking(device.usb, device.natural or device.cls, rules)


def differences(usb: UsbDevice, natural: DeviceClass, match: Match) -> tuple[Difference, ...]:
    """The attributes that `match` names and the device does not fit, in the order of the file's documentation."""
    checks = (
        _plain("class", match.class_, natural.value, match.class_ == natural),
        _plain("vendor", match.vendor, f"{usb.vendor:04x}", match.vendor == f"{usb.vendor:04x}"),
        _plain("product", match.product, f"{usb.product:04x}", match.product == f"{usb.product:04x}"),
        _set("id", match.id, (f"{usb.vendor:04x}:{usb.product:04x}",)),
        _plain(
            "serial", match.serial, "another" if usb.serial else "none", fnmatchcase(usb.serial, match.serial or "")
        ),
        _plain("name", match.name, usb.title or "none", fnmatchcase(usb.title, match.name or "")),
        _plain("port", match.port, usb.port, fnmatchcase(usb.port, match.port or "")),
        _set("with_interface", match.with_interface, usb.types),
        _set("with_connect_type", match.with_connect_type, (usb.connect_type.replace(" ", "-") or "unknown",)),
        _plain("simulated", match.simulated, str(usb.simulated).lower(), match.simulated == usb.simulated),
        _input(usb, natural, match),
    )
    return tuple(found for found in checks if found is not None)


def _plain(attribute: str, wanted: object, found: str, fits: bool) -> Difference | None:
    if wanted is None or fits:
        return None
    return Difference(
        attribute, f"{attribute} is {found}, not {str(wanted).lower() if wanted in (True, False) else wanted}"
    )


def _set(attribute: str, text: SetText | None, found: tuple[str, ...]) -> Difference | None:
    if text is None:
        return None
    wanted = _wanted(attribute, text if isinstance(text, str | tuple) else next(iter(text.items())))
    if holds(wanted, found):
        return None
    return Difference(attribute, f"{attribute} is {{ {' '.join(found)} }}, not {wanted}")


@lru_cache(maxsize=1024)
def _wanted(attribute: str, text: str | tuple[str, ...] | tuple[str, tuple[str, ...]]) -> AttributeSet:
    """Read once: a rule is held against every device at every change."""
    if len(text) == 2 and isinstance(text[1], tuple):
        return take_set({str(text[0]): text[1]}, SETS[attribute])
    return take_set(text, SETS[attribute])  # type: ignore[arg-type]


def _input(usb: UsbDevice, natural: DeviceClass, match: Match) -> Difference | None:
    """Raw devices only: of the other classes no node of a keyboard is ever given."""
    typing = natural is DeviceClass.USB and any(types(i) for i in usb.interfaces)
    if typing and not (match.input or _names_input(match.with_interface)):
        return Difference("input", "it is a keyboard or a mouse, and the rule does not say `input: true`")
    if match.input and not typing:
        return Difference("input", "it is no keyboard and no mouse")
    return None


def _names_input(text: SetText | None) -> bool:
    """`with_interface` that asks for a boot keyboard or mouse by its whole type says so as well."""
    if text is None:
        return False
    wanted = take_set(text, SETS["with_interface"])
    return wanted.operator is not Operator.NONE_OF and bool(set(wanted.values) & set(CONSOLE_TRIPLES))
