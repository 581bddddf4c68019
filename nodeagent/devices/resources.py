"""Which device is offered under which resource name: the rules, applied. Second step of flow A. Pure.

The first rule that matches a device takes it; a device that no rule matches is not offered. Every device ends up either in
one resource or among the unoffered, with the reason.
"""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase

import msgspec

import device_plugins
from nodeagent.config import DEFAULT_RESOURCE, DevicesConfig, Match, Rule, resource_leaf
from nodeagent.errors import Reason
from nodeagent.model import Audience, Device, DeviceClass, Grant, Offer, Resource

ID8 = "{id8}"


class Unoffered(msgspec.Struct, frozen=True):
    """A device that nobody can ask for, and why."""

    device_id: str
    reason: Reason
    message: str


class Resources(msgspec.Struct, frozen=True):
    """The resources by name, in the order of the rules, and the devices in none of them."""

    resources: dict[str, Resource]
    unoffered: tuple[Unoffered, ...] = ()


class Verdict(msgspec.Struct, frozen=True):
    """One rule against one device. `differs` names the attributes that do not fit; `takes` is true for the rule that wins."""

    rule: str
    matched: bool
    takes: bool
    differs: tuple[str, ...] = ()


def build(devices: Mapping[str, Device], config: DevicesConfig, services: frozenset[str]) -> Resources:
    """Apply the rules. `services` are the seat services this daemon runs.

    A resource whose name a rule fixes is there even without devices, so that the kubelet keeps its registration over an
    unplug: registering again while the old stream ends can leave a node at zero (kubernetes#121994).
    """
    audiences: dict[str, Audience] = {}
    offers: dict[str, dict[str, Offer]] = {}
    for rule in config.rules:
        leaf = rule.resource or DEFAULT_RESOURCE.get(rule.match.class_ or "")
        if leaf and not leaf.endswith(ID8):
            audiences.setdefault(f"{config.domain}/{leaf}", rule.to)
    unoffered = []
    for device in devices.values():
        taking = next((r for r in config.rules if not _differs(device, r.match)), None)
        if taking is None:
            unoffered.append(Unoffered(device.id, Reason.NO_RULE, f"{device.id}: no rule of devices.rules matches it"))
            continue
        name = f"{config.domain}/{_leaf(taking, device)}"
        grant = device_plugins.grant(device)
        refusal = _refusal(device, taking, grant, services)
        if refusal is None and audiences.setdefault(name, taking.to) != taking.to:
            refusal = Reason.CONFIG_INVALID, f"rule {taking.name} has another `to:` than the first rule of {name}"
        if refusal is not None:
            reason, message = refusal
            unoffered.append(Unoffered(device.id, reason, f"{device.id}: {message}"))
            continue
        offers.setdefault(name, {})[device.id] = Offer(
            device=device, rule=taking.name, grant=grant, give=taking.give, sandbox=taking.sandbox
        )
    return Resources(
        {name: Resource(name=name, to=to, offers=offers.get(name, {})) for name, to in audiences.items()},
        tuple(unoffered),
    )


def explain(device: Device, config: DevicesConfig) -> tuple[Verdict, ...]:
    """Every rule in order: does it match, does it take the device, and if it does not match, which attributes differ."""
    verdicts = []
    taken = False
    for rule in config.rules:
        differs = _differs(device, rule.match)
        verdicts.append(Verdict(rule.name, not differs, not differs and not taken, differs))
        taken = taken or not differs
    return tuple(verdicts)


def _leaf(rule: Rule, device: Device) -> str:
    leaf = resource_leaf(rule, device.cls)
    return leaf.removesuffix(ID8) + device.id.rpartition("-")[2][:8] if leaf.endswith(ID8) else leaf


def _differs(device: Device, match: Match) -> tuple[str, ...]:
    """The attributes that `match` names and the device does not fit."""
    usb = device.usb
    return tuple(
        name
        for name, wanted, fits in (
            ("class", match.class_, match.class_ == device.cls),
            ("vendor", match.vendor, match.vendor == f"{usb.vendor:04x}"),
            ("product", match.product, match.product == f"{usb.product:04x}"),
            ("serial", match.serial, fnmatchcase(usb.serial, match.serial or "")),
            ("port", match.port, fnmatchcase(usb.port, match.port or "")),
            ("simulated", match.simulated, match.simulated == usb.simulated),
        )
        if wanted is not None and not fits
    )


def _refusal(device: Device, rule: Rule, grant: Grant, services: frozenset[str]) -> tuple[Reason, str] | None:
    """Why the rule cannot give this device the way it says; None when it can."""
    if rule.give == "service":
        if not grant.services:
            printer = device.cls is DeviceClass.PRINTER
            why = "the printer has no usblp node" if printer else f"this version has none for {device.cls}"
            return Reason.SERVICE_UNAVAILABLE, f"rule {rule.name} gives a service, but {why}"
        if missing := sorted(set(grant.services) - services):
            return Reason.SERVICE_UNAVAILABLE, f"rule {rule.name} gives {', '.join(missing)}, which does not run here"
        return None
    if rule.give == "node":
        if grant.nodes:
            return None
        what = "simulated and has none" if device.usb.simulated else "without one that may be given"
        return Reason.NOT_SUPPORTED, f"rule {rule.name} gives device nodes, but the device is {what}"
    return Reason.NOT_SUPPORTED, f"rule {rule.name}: give: {rule.give} is not supported by this version"
