"""The model: what must be true of every history, checked after every step of the daemon against what the world knows.

It keeps its own book of who held what, and compares: it never asks the code that is tested what is allowed. It is plain data
and lives on from one life of the daemon to the next.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from nodeagent.model import CleanUp, Lease, Offer
from tests.histories.world import BY_PORT, World

Claims = frozenset[tuple[str, int]]
"""Parts of physical devices: unit and interface number."""
Key = tuple[str, int]
"""Device id and generation of a lease."""

COMPARISONS = 2
"""Whatever is found by comparing is found by so many comparisons."""


def claims_of(world: World, offer: Offer) -> Claims:
    """What a container that is given the offer can reach: its interfaces, or with the usbfs node the whole device."""
    usb = offer.device.usb
    whole = offer.give == "node" and any(n.interface < 0 and n.subsystem == "usb" for n in offer.grant.nodes)
    numbers = (
        {i.number for i in usb.interfaces} if whole or not offer.device.interfaces else set(offer.device.interfaces)
    )
    unit = world.unit_at(usb.port)
    if unit in BY_PORT:  # in another port it is another device, and what its holder had is void
        unit = f"{unit} in {usb.port}"
    return frozenset((unit, n) for n in numbers) if unit else frozenset()


@dataclass
class Stay:
    """A lease that a container of one pod had, and that has ended."""

    uid: str
    claims: Claims
    cleaned: bool = False
    """The hook ran to its end, or was called off since the pod goes on."""
    cleaned_in_life: int = 0


@dataclass(frozen=True)
class Place:
    """A slot on the roster."""

    uid: str
    slot: str
    resource: str
    ids: tuple[str, ...]


@dataclass
class Book:
    """What was seen."""

    world: World
    leases: dict[str, Lease] = field(default_factory=dict)
    highest: dict[str, int] = field(default_factory=dict)
    asked: dict[tuple[str, str], Claims] = field(default_factory=dict)
    """Resource and device id -> what the last Allocate of it was for."""
    holders: dict[tuple[str, str], str] = field(default_factory=dict)
    """Resource and device id -> uid of the pod for which the kubelet allocated it last."""
    claims: dict[str, Claims] = field(default_factory=dict)
    """Device id -> what its lease is good for."""
    ended: dict[Key, Stay] = field(default_factory=dict)
    due: frozenset[Key] = frozenset()
    dropped: dict[str, str] = field(default_factory=dict)
    """Device id -> uid of the pod whose clean-up was called off since it goes on holding the device."""
    users: dict[int, set[str]] = field(default_factory=dict)
    """Inode of a slot's directory -> uids of the pods that had it or were served in it."""
    places: frozenset[Place] = frozenset()
    broken: set[str] = field(default_factory=set)
    """Uids of pods whose sandbox failed and that were not let start anew since."""
    gone: dict[str, int] = field(default_factory=dict)
    """Uid of a pod without a sandbox -> comparisons that began since."""
    cleaning: set[str] = field(default_factory=set)
    compared: int = 0
    """Comparisons that this life of the daemon has finished."""
    life: int = 0
    stopping: bool = False
    """This life of the daemon is ending in order: what it interrupts is not finished."""

    def begin_life(self) -> None:
        self.life += 1
        self.stopping = False
        self.cleaning.clear()
        self.places = frozenset()
        self.compared = 0

    # ---- leases and the journal of clean-ups

    def on_state(self, leases: tuple[Lease, ...], clean_ups: tuple[CleanUp, ...]) -> None:
        """The database after a commit, or as it was found."""
        old, now = self.leases, {x.device_id: x for x in leases}
        due = frozenset((x.device_id, x.generation) for x in clean_ups)
        self.leases = now
        newly_ended: list[Lease] = []
        newly_bound: list[Lease] = []
        for device_id in sorted(old.keys() | now.keys()):
            before, after = old.get(device_id), now.get(device_id)
            if before is not None and (after is None or after.generation != before.generation):
                if _bound(before):
                    newly_ended.append(before)
            elif before is not None and after is not None and _bound(before) and before.pod != after.pod:
                self._violated(
                    f"{device_id} changed hands from {before.pod} to {after.pod} within generation {after.generation}"
                )
            if after is not None and (before is None or before.generation != after.generation):
                if after.generation <= self.highest.get(device_id, 0):
                    self._violated(f"generation {after.generation} of {device_id} after {self.highest[device_id]}")
                self.highest[device_id] = after.generation
                self.claims[device_id] = self.asked.get(
                    (after.resource, device_id), self.claims.get(device_id, frozenset())
                )
            if after is not None and _bound(after) and not (
                before is not None and before.generation == after.generation and _bound(before)
            ):  # fmt: skip
                newly_bound.append(after)
        for lease in newly_ended:
            assert lease.pod is not None
            self.ended[lease.device_id, lease.generation] = Stay(lease.pod.uid, self.claims_held(lease.device_id))
            if (lease.device_id, lease.generation) not in due and not self._goes_on(lease.device_id, lease.pod.uid):
                self._violated(f"generation {lease.generation} of {lease.device_id} ended and no clean-up is noted")
        self._on_journal(due)
        for lease in newly_bound:
            self._on_bound(lease)
        self._no_two_holders()

    def claims_held(self, device_id: str) -> Claims:
        return self.claims.get(device_id, frozenset())

    def _goes_on(self, device_id: str, uid: str) -> bool:
        lease = self.leases.get(device_id)
        return lease is not None and _bound(lease) and lease.pod is not None and lease.pod.uid == uid

    def _on_journal(self, due: frozenset[Key]) -> None:
        for key in sorted(due - self.due):
            if key not in self.ended:
                self._violated(f"a clean-up is noted for generation {key[1]} of {key[0]}, which no container had")
        for key in sorted(self.due - due):
            stay = self.ended.get(key)
            if stay is None or stay.cleaned:
                continue
            if self.world.sandbox(stay.uid) is None:
                self._violated(f"the clean-up of generation {key[1]} of {key[0]} was called off, and its pod is gone")
            stay.cleaned = True
            if not self._goes_on(key[0], stay.uid):
                self.dropped[key[0]] = stay.uid
        self.due = due

    def _on_bound(self, lease: Lease) -> None:
        assert lease.pod is not None
        uid, device_id = lease.pod.uid, lease.device_id
        if self.dropped.pop(device_id, uid) != uid:
            self._violated(f"{lease.pod.name} was bound to {device_id} whose last pod called its clean-up off and went")
        if device_id in self.cleaning:
            self._violated(f"{lease.pod.name} was bound to {device_id} while it is being cleaned up")
        mine = self.claims_held(device_id)
        for (other, generation), stay in self.ended.items():
            touches = other == device_id or bool(stay.claims & mine)
            if touches and not stay.cleaned and stay.uid != uid:
                self._violated(
                    f"{lease.pod.name} was bound to {device_id} before generation {generation} of {other} was cleaned up"
                )

    def _no_two_holders(self) -> None:
        bound = [x for x in self.leases.values() if _bound(x)]
        for i, one in enumerate(bound):
            for two in bound[i + 1 :]:
                if one.pod != two.pod and self.claims_held(one.device_id) & self.claims_held(two.device_id):
                    self._violated(
                        f"{one.pod} and {two.pod} are bound to parts of one device, {one.device_id} and {two.device_id}"
                    )

    # ---- clean-ups as they run

    def on_clean_up(self, due: CleanUp) -> None:
        """The hook is called."""
        stay = self.ended.get((due.device_id, due.generation))
        if stay is None:
            self._violated(f"clean-up for generation {due.generation} of {due.device_id}, which no container had")
            return
        if (due.device_id, due.generation) not in self.due or stay.cleaned_in_life == self.life:
            self._violated(f"clean-up for generation {due.generation} of {due.device_id} is repeated")
        if due.device_id in self.cleaning:
            self._violated(f"two clean-ups of {due.device_id} at once")
        self.cleaning.add(due.device_id)
        for place in self.places:
            held = frozenset[tuple[str, int]]().union(*(self.claims_held(i) for i in place.ids))
            if due.device_id in place.ids or held & stay.claims:
                self._violated(f"clean-up of {due.device_id} while {place.uid} has its seat")

    def on_cleaned(self, due: CleanUp) -> None:
        """The hook has returned, failed or was cut off."""
        self.cleaning.discard(due.device_id)
        if self.stopping:
            return
        for (device_id, generation), stay in self.ended.items():
            if device_id == due.device_id and generation <= due.generation:
                stay.cleaned, stay.cleaned_in_life = True, self.life

    # ---- seats

    def on_places(self, places: frozenset[Place], directories: dict[Place, Path]) -> None:
        """The roster after a change."""
        for place in sorted(self.places - places, key=repr):
            if any((p.uid, p.slot) == (place.uid, place.slot) for p in places):
                continue
            if self._is_live(place):
                self._violated(f"the live seat of {place.uid} lost slot {place.slot[:8]} of {place.resource}")
        self.places = places
        every = sorted(places, key=repr)
        for i, one in enumerate(every):
            for two in every[i + 1 :]:
                if one.uid != two.uid and self._meet(one.ids, two.ids):
                    self._violated(
                        f"{one.uid} and {two.uid} have seats with parts of one device: {one.ids} and {two.ids}"
                    )
        for place, directory in directories.items():
            try:
                inode = os.stat(directory).st_ino
            except FileNotFoundError:
                self._violated(f"the seat of {place.uid} has a slot without a directory: {directory.name}")
            else:
                self.used(inode, place.uid, "is served in")

    def _is_live(self, place: Place) -> bool:
        return self.world.sandbox(place.uid) is not None and place.uid not in self.broken and not self.taken(place)

    def taken(self, place: Place) -> bool:
        """The kubelet gave one of its devices to another pod since."""
        return any(self.holders.get((place.resource, i), place.uid) != place.uid for i in place.ids)

    def _meet(self, one: Iterable[str], two: Iterable[str]) -> bool:
        if set(one) & set(two):
            return True
        parts = [frozenset[tuple[str, int]]().union(*(self.claims_held(i) for i in ids)) for ids in (one, two)]
        return bool(parts[0] & parts[1])

    def used(self, inode: int, uid: str, how: str) -> None:
        """A pod has the directory of a slot."""
        users = self.users.setdefault(inode, set())
        users.add(uid)
        if len(users) > 1:
            self._violated(f"{uid} {how} a slot's directory of another pod ({', '.join(sorted(users - {uid}))})")

    # ---- what comparisons find

    def on_sandbox_end(self, uid: str) -> None:
        self.gone[uid] = 0

    def on_compared(self, gone_when_it_began: frozenset[str], known: frozenset[str], busy: bool) -> None:
        """A comparison has ended in which the container runtime answered. `known` are the resources there are now."""
        self.compared += 1
        for uid in gone_when_it_began:
            self.gone[uid] += 1
            if self.gone[uid] >= COMPARISONS:
                kept = [x.device_id for x in self.leases.values() if x.pod is not None and x.pod.uid == uid]
                if kept or any(p.uid == uid for p in self.places):
                    self._violated(f"lost release: {uid} is gone and keeps {kept or 'its seat'}")
        if busy or self.compared < COMPARISONS:
            return
        there = {(p.uid, p.slot) for p in self.places}
        for lease in self.leases.values():
            if (
                not _bound(lease)
                or lease.pod is None
                or lease.resource not in known
                or (lease.pod.uid, lease.slot) in there
            ):
                continue
            place = Place(lease.pod.uid, lease.slot, lease.resource, (lease.device_id,))
            if self._is_live(place):
                self._violated(f"{lease.pod.name} is bound to {lease.device_id} and has no seat")

    def _violated(self, what: str) -> None:
        self.world.violated(what)


def _bound(lease: Lease) -> bool:
    return lease.pod is not None and bool(lease.container)
