"""Which offers cannot be held at the same time. Pure.

The kubelet counts each resource by itself, so nothing but us keeps one device from being handed out twice when it stands
under two names, or when two parts of it overlap: whoever has the usbfs node has every interface.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping

import msgspec

from nodeagent.model import Lease, Offer, Resource

Key = tuple[str, str]
"""Resource name and device id."""


def takes(offer: Offer) -> frozenset[int] | None:
    """The interfaces of its device that nobody else can have besides; None for all, whatever they are: of a device that is held
    and not there, or offered in another way by now, nothing is known but its id."""
    usb = offer.device.usb
    if not usb.interfaces:
        return None
    whole = offer.give == "usb" or usb.bus_node in offer.nodes
    return frozenset(i.number for i in usb.interfaces) if whole else offer.device.parts


def siblings(resources: Mapping[str, Resource], leases: Iterable[Lease] = ()) -> dict[Key, tuple[Key, ...]]:
    """For each offer that has any: the others, of the same physical device, that take an interface of its own.

    Offers of one physical device are in one port, or have one id but for the class; a port alone tells nothing of a device that
    has left it. What is leased counts as well when nobody offers it any more: its holder has it.
    """
    offers = {(r.name, i): o for r in resources.values() for i, o in r.offers.items()}
    groups = defaultdict[tuple[str, str], dict[Key, Offer | None]](dict)
    for key, offer in offers.items():
        groups["id", physical(key[1])][key] = offer
        if offer.device.present:
            groups["port", offer.device.usb.port][key] = offer
    for lease in leases:
        if (key := (lease.resource, lease.device_id)) not in offers:
            groups["id", physical(lease.device_id)][key] = None
    found = defaultdict[Key, dict[Key, None]](dict)
    for group in groups.values():
        for key, mine in group.items() if len(group) > 1 else ():
            found[key].update((k, None) for k, o in group.items() if k != key and (k[1] == key[1] or _meet(mine, o)))
    return {key: tuple(sorted(others)) for key, others in found.items() if others}


def physical(device_id: str) -> str:
    """What the ids of all parts of one device have in common (identity.device_id)."""
    return device_id.rpartition("-")[2]


def _meet(one: Offer | None, two: Offer | None) -> bool:
    mine, yours = (takes(o) if o is not None else None for o in (one, two))
    return mine is None or yours is None or bool(mine & yours)


def counted(resources: Mapping[str, Resource], of: Mapping[Key, tuple[Key, ...]]) -> dict[str, Resource]:
    """The resources with the number of siblings in each offer."""
    changed = defaultdict[str, dict[str, Offer]](dict)
    for (name, device_id), others in of.items():
        if name not in resources or device_id not in resources[name].offers:
            continue  # leased, and offered no more
        changed[name][device_id] = msgspec.structs.replace(resources[name].offers[device_id], siblings=len(others))
    return {name: _replaced(r, changed.get(name, {})) for name, r in resources.items()}


def blocked(
    resources: Mapping[str, Resource], of: Mapping[Key, tuple[Key, ...]], leases: Iterable[Lease]
) -> dict[str, Resource]:
    """The resources with every offer marked whose sibling is leased. One that is leased itself is not: it is its holder's."""
    leased = {(x.resource, x.device_id) for x in leases}
    changed = defaultdict[str, dict[str, Offer]](dict)
    for key in sorted(leased):
        for name, device_id in of.get(key, ()):
            if (name, device_id) not in leased:  # so it is offered
                offer = resources[name].offers[device_id]
                changed[name][device_id] = msgspec.structs.replace(offer, held_as=key[0])
    return {name: _replaced(r, changed.get(name, {})) for name, r in resources.items()}


def _replaced(resource: Resource, offers: Mapping[str, Offer]) -> Resource:
    return msgspec.structs.replace(resource, offers={**resource.offers, **offers}) if offers else resource
