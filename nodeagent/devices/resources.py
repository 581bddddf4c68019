"""Which device is offered under which resource names: the rules, applied. Second step of flow A. Pure.

The first rule that matches a device takes it; a device that no rule matches is not offered. Every device ends up either in
the resources of its rule or among the unoffered, with the reason.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import msgspec

import device_plugins
from nodeagent.config import DEFAULT_RESOURCE, DevicesConfig, Rule, resource_leaves
from nodeagent.devices.matching import differences, rule_of
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
    """One rule against one device: does it match (else `differs` says what does not fit, and how), does it take the device."""

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
        fixed = rule.leaves or (DEFAULT_RESOURCE.get(rule.as_ or rule.match.class_ or "", ""),)
        for leaf in fixed:
            if leaf and not leaf.endswith(ID8):
                audiences.setdefault(f"{config.domain}/{leaf}", rule.to)
    unoffered = []
    for device in devices.values():
        rule_taking = rule_of(device, config.rules)
        if rule_taking is None:
            unoffered.append(Unoffered(device.id, Reason.NO_RULE, f"{device.id}: no rule of devices.rules matches it"))
            continue
        names = [f"{config.domain}/{leaf}" for leaf in _leaves(rule_taking, device)]
        grant = device_plugins.grant(device)
        refusal = _refusal(device, rule_taking, grant, services)
        for name in names:
            if refusal is None and audiences.setdefault(name, rule_taking.to) != rule_taking.to:
                refusal = (
                    Reason.CONFIG_INVALID,
                    f"rule {rule_taking.name} has another `to:` than the first rule of {name}",
                )
        if refusal is not None:
            reason, message = refusal
            unoffered.append(Unoffered(device.id, reason, f"{device.id}: {message}"))
            continue
        for name in names:
            offers.setdefault(name, {})[device.id] = Offer(
                device=device,
                rule=rule_taking.name,
                grant=_kubevirt(device) if rule_taking.sandbox == "kubevirt" else grant,
                give=rule_taking.give,
                sandbox=rule_taking.sandbox,
                cdi=rule_taking.cdi,
            )
    return Resources(
        {name: Resource(name=name, to=to, offers=offers.get(name, {})) for name, to in audiences.items()},
        tuple(unoffered),
    )


def by_device(resources: Iterable[Resource]) -> dict[str, tuple[tuple[str, ...], Offer]]:
    """Device id -> the names it is offered under, and its offer: the one that is not held under another name, if any."""
    found: dict[str, tuple[tuple[str, ...], Offer]] = {}
    for resource in resources:
        for device_id, offer in resource.offers.items():
            names, known = found.get(device_id, ((), offer))
            found[device_id] = ((*names, resource.name), known if offer.held_as else offer)
    return found


def explain(device: Device, config: DevicesConfig) -> tuple[Verdict, ...]:
    """Every rule in order: does it match, does it take the device, and if it does not match, which attributes differ and how."""
    verdicts = []
    taken = False
    for rule in config.rules:
        differs = tuple(d.why for d in differences(device.usb, device.natural or device.cls, rule.match))
        verdicts.append(Verdict(rule.name, not differs, not differs and not taken, differs))
        taken = taken or not differs
    return tuple(verdicts)


def _leaves(rule: Rule, device: Device) -> list[str]:
    eight = device.id.rpartition("-")[2][:8]
    return [
        leaf.removesuffix(ID8) + eight if leaf.endswith(ID8) else leaf for leaf in resource_leaves(rule, device.cls)
    ]


def _kubevirt(device: Device) -> Grant:
    """What QEMU in a virt-launcher pod opens: the whole device."""
    return Grant(nodes=(device.usb.bus_node,) if device.usb.bus_node else ())


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
        if grant.nodes and (rule.sandbox != "kubevirt" or device.usb.bus_node):
            return None
        what = "simulated and has none" if device.usb.simulated else "without one that may be given"
        return Reason.NOT_SUPPORTED, f"rule {rule.name} gives device nodes, but the device is {what}"
    return Reason.NOT_SUPPORTED, f"rule {rule.name}: give: {rule.give} is not supported by this version"
