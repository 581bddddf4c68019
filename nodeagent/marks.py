"""The taint and the label by which a node tells the scheduler whether its devices are offered: their spelling.

A taint is written as `kubectl taint` takes it, `key[=value]:Effect`, a label as `key=value`. Sizes and characters are those of
the API server (apimachinery util/validation: IsQualifiedName, IsValidLabelValue, IsDNS1123Subdomain).
"""

from __future__ import annotations

import re

import msgspec

from nodeagent.errors import ConfigError

MAX_PREFIX = 253
MAX_NAME = 63
"""Of the name in a key, and of a value."""
EFFECTS = ("NoSchedule", "PreferNoSchedule")

_WORD = re.compile(r"[A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?")
_DNS_LABEL = r"[a-z0-9]([-a-z0-9]*[a-z0-9])?"
_DNS_SUBDOMAIN = re.compile(rf"{_DNS_LABEL}(\.{_DNS_LABEL})*")


class Taint(msgspec.Struct, frozen=True):
    """One entry of a node's `spec.taints`; key and effect together are unique there."""

    key: str
    effect: str
    value: str = ""


class Label(msgspec.Struct, frozen=True):
    """One label of an object."""

    key: str
    value: str


def take_taint(text: str, where: str) -> Taint | None:
    """Read `key[=value]:Effect`; None for an empty text. Raises ConfigError, whose message starts with `where`.

    NoExecute is refused: a kubelet that restarts would cost every desktop of the node.
    """
    if not text:
        return None
    rest, colon, effect = text.rpartition(":")
    if not colon:
        raise ConfigError(f"{where}: {text!r} has no effect", hint=f"key:{EFFECTS[0]} or key=value:{EFFECTS[0]}")
    if effect not in EFFECTS:
        why = "would end the desktops that run" if effect == "NoExecute" else "is no effect"
        raise ConfigError(f"{where}: {effect!r} {why}", hint=" or ".join(EFFECTS))
    key, _, value = rest.partition("=")
    _check_key(key, where)
    _check_value(value, where)
    return Taint(key=key, effect=effect, value=value)


def take_label(text: str, where: str) -> Label | None:
    """Read `key=value`; None for an empty text. Raises ConfigError, whose message starts with `where`."""
    if not text:
        return None
    key, equals, value = text.partition("=")
    if not equals:
        raise ConfigError(f"{where}: {text!r} has no value", hint="key=value")
    _check_key(key, where)
    _check_value(value, where)
    return Label(key=key, value=value)


def _check_key(key: str, where: str) -> None:
    prefix, slash, name = key.rpartition("/")
    if slash and (len(prefix) > MAX_PREFIX or not _DNS_SUBDOMAIN.fullmatch(prefix)):
        raise ConfigError(f"{where}: {prefix!r} before the slash is not a DNS name")
    if len(name) > MAX_NAME or not _WORD.fullmatch(name):
        raise ConfigError(
            f"{where}: {name!r} is not a name of at most {MAX_NAME} letters, digits, '-', '_' and '.'",
            hint="it begins and ends with a letter or a digit",
        )


def _check_value(value: str, where: str) -> None:
    if value and (len(value) > MAX_NAME or not _WORD.fullmatch(value)):
        raise ConfigError(
            f"{where}: value {value!r} is not of at most {MAX_NAME} letters, digits, '-', '_' and '.'",
            hint="it begins and ends with a letter or a digit",
        )
