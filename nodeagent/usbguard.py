"""The attribute language of USBGuard's rules, as far as a `match` has a use for it (usbguard-rules.conf(5)).

A value, or a set of values behind an operator: `0b:*:*`, `{ 03:00:* 0b:*:* }`, `one-of { 07:*:* }`. In YAML a set may also be
a list, or a mapping of one operator to its list. Pure; the configuration decodes with it, devices/matching.py compares with it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from enum import StrEnum
from fnmatch import fnmatchcase

import msgspec

MAX_VALUES = 64

SetText = str | tuple[str, ...] | dict[str, tuple[str, ...]]
"""What stands in the file."""


class Operator(StrEnum):
    """How the values of a rule and those of a device are compared (USBGuard 1.1, Rule.hpp)."""

    ALL_OF = "all-of"
    """Each value of the rule fits one of the device's."""
    ONE_OF = "one-of"
    """One value of the rule fits one of the device's."""
    NONE_OF = "none-of"
    """No value of the rule fits any of the device's."""
    EQUALS = "equals"
    """As many values on both sides, and each of the rule fits one of the device's; the operator where none is named."""
    EQUALS_ORDERED = "equals-ordered"
    """The same values at the same places."""
    MATCH_ALL = "match-all"
    """Each value of the device is fitted by one of the rule's."""


class AttributeSet(msgspec.Struct, frozen=True):
    operator: Operator
    values: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.operator} {{ {' '.join(self.values)} }}"


Syntax = Callable[[str], str]
"""Checks one value and gives it in its normal form; raises ValueError."""


def take_set(text: SetText, syntax: Syntax) -> AttributeSet:
    """Read one attribute of a rule; raises ValueError with a sentence."""
    if isinstance(text, str):
        operator, values = _split(text)
    elif isinstance(text, Mapping):
        if len(text) != 1:
            raise ValueError("a set has one operator")
        (operator, values), *_ = text.items()
    else:
        operator, values = Operator.EQUALS.value, text
    word = operator.replace("_", "-")
    if word not in tuple(Operator):
        raise ValueError(f"{operator!r} is none of {', '.join(Operator)}")
    if not values or len(values) > MAX_VALUES:
        raise ValueError(f"a set has 1 to {MAX_VALUES} values")
    return AttributeSet(Operator(word), tuple(syntax(value) for value in values))


def _split(text: str) -> tuple[str, tuple[str, ...]]:
    found = re.fullmatch(r"\s*(?:([a-z-]+)\s*)?\{([^{}]*)\}\s*", text)
    if found:
        return found[1] or Operator.EQUALS.value, tuple(found[2].split())
    words = text.split()
    if len(words) != 1 or "{" in text or "}" in text:
        raise ValueError(f"{text!r} is neither a value nor `operator {{ value value }}`")
    return Operator.EQUALS.value, tuple(words)


def interface(value: str) -> str:
    """`CC:SS:PP` in hexadecimal; protocol, or subclass and protocol, may be `*`."""
    if not re.fullmatch(r"[0-9a-fA-F]{2}:([0-9a-fA-F]{2}:([0-9a-fA-F]{2}|\*)|\*:\*)", value):
        raise ValueError(f"{value!r} is no interface type such as 0b:00:00, 03:01:* or 08:*:*")
    return value.lower()


def device_id(value: str) -> str:
    """`VVVV:PPPP` in hexadecimal; the product, or both, may be `*`."""
    if not re.fullmatch(r"[0-9a-fA-F]{4}:([0-9a-fA-F]{4}|\*)|\*:\*", value):
        raise ValueError(f"{value!r} is no device id such as 1050:0407 or 1050:*")
    return value.lower()


def word(value: str) -> str:
    """A connect type: hotplug, hardwired, unknown, or `not-used` (the kernel writes a space, USBGuard quotes it)."""
    if value not in ("hotplug", "hardwired", "unknown", "not-used"):
        raise ValueError(f"{value!r} is none of hotplug, hardwired, not-used, unknown")
    return value


def holds(wanted: AttributeSet, found: Sequence[str]) -> bool:
    """Whether a device whose attribute has the values `found` fits; `*` in a value of the rule fits any part."""

    def fits(rule: str, device: str) -> bool:
        return fnmatchcase(device, rule)

    rules = wanted.values
    match wanted.operator:
        case Operator.ALL_OF:
            return all(any(fits(r, f) for f in found) for r in rules)
        case Operator.ONE_OF:
            return any(fits(r, f) for r in rules for f in found)
        case Operator.NONE_OF:
            return not any(fits(r, f) for r in rules for f in found)
        case Operator.EQUALS:
            return len(rules) == len(found) and all(any(fits(r, f) for f in found) for r in rules)
        case Operator.EQUALS_ORDERED:
            return len(rules) == len(found) and all(map(fits, rules, found))
        case Operator.MATCH_ALL:
            return all(any(fits(r, f) for r in rules) for f in found)
