"""Flow A, joined: when devices, rules or leases change, who is told what, in which order.

inventory, rules, leases -> resources -> binding, spool and workers (who holds it) -> cupsd (queues) -> kubelet (lists)
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable
from pathlib import Path

import msgspec

from nodeagent.config import Config
from nodeagent.devices import exclusive
from nodeagent.devices.cdi import CdiFiles
from nodeagent.devices.claims import Claims
from nodeagent.devices.identity import DEVICE_ID
from nodeagent.devices.inventory import Inventory
from nodeagent.devices.kubelet import Registrar
from nodeagent.devices.resources import Resources, build
from nodeagent.errors import AgentError
from nodeagent.metrics import Metrics
from nodeagent.model import (
    CleanUp,
    Device,
    DeviceClass,
    Give,
    Grant,
    InventoryChange,
    Lease,
    Offer,
    Resource,
    UsbDevice,
)
from nodeagent.seats.binding import Binding
from nodeagent.seats.roster import Roster
from nodeagent.seats.seat import Seat
from nodeagent.services import SEAT_SERVICES
from nodeagent.services.printing.cups import Cups, Queue
from nodeagent.services.printing.printers import for_cups, prints

log = logging.getLogger(__name__)

QUEUE_RETRY_S = 2.0


class Offers:
    """What is offered right now; `apply` brings everybody up to date, `run` does the part that has to wait for cupsd."""

    def __init__(
        self, *, config: Config, inventory: Inventory, binding: Binding, registrar: Registrar, roster: Roster,
        cups: Cups, cdi: CdiFiles, claims: Claims, metrics: Metrics, wake: Callable[[], None],
    ) -> None:  # fmt: skip
        self.config = config
        self.resources = Resources({})
        """What the rules make of the devices, without regard to who holds what."""
        self._inventory, self._binding, self._registrar, self._roster = inventory, binding, registrar, roster
        self._cups, self._cdi, self._claims, self._metrics, self._wake = cups, cdi, claims, metrics, wake
        self._queues: tuple[Queue, ...] = ()
        self._queues_changed = asyncio.Event()
        self._known_labels: set[tuple[str, ...]] = set()

    def on_change(self, change: InventoryChange) -> None:
        """The inventory changed (a subscriber of it)."""
        self.apply(change.event_s)

    def on_config(self, config: Config) -> None:
        """The rules changed."""
        self.config = self._binding.config = config
        self.apply()

    def apply(self, event_s: float | None = None) -> None:
        """Devices or rules changed."""
        self.resources = build(self._inventory.devices, self.config.devices, frozenset(SEAT_SERVICES))
        self._join_leases()
        state_dir = Path(self.config.state_dir)
        offered = [o for r in self._binding.resources.values() for o in r.offers.values()]
        queues = tuple({o.device.id: for_cups(o, state_dir) for o in offered if prints(o)}.values())
        if queues != self._queues:
            self._queues = queues
            self._queues_changed.set()
        self._roster.push()
        self._binding.describe()
        self._write_cdi()
        self._claims.set(offered if self.config.devices.claim else (), self._inventory.devices)
        self._registrar.set_resources(self._binding.resources, event_s)
        self._wake()

    def _join_leases(self) -> None:
        """What the rules make of the devices, and what is held of them: together this is what the kubelet is told."""
        binding, leases = self._binding, self._binding.leases
        held = {name: _with_held(r, leases) for name, r in self.resources.resources.items()}
        binding.siblings = exclusive.siblings(held, leases)
        binding.resources = exclusive.blocked(exclusive.counted(held, binding.siblings), binding.siblings, leases)

    def on_leases(self) -> set[str]:
        """Leases came or went: which resources have other lists now. Their siblings are marked, what is held stays listed
        though its device is gone, what is neither held nor there goes; all of it is pushed to the kubelet."""
        before = self._binding.resources
        self._join_leases()
        changed = {name for name, r in self._binding.resources.items() if r != before.get(name)}
        if changed:
            self._registrar.set_resources(self._binding.resources)
        return changed

    async def tell_leases(self) -> None:
        """`on_leases`, and wait until the kubelet has read the new lists (half a second at most)."""
        await self._registrar.told(self.on_leases())

    def _write_cdi(self) -> None:
        try:
            self._cdi.write(self._binding.resources)
        except OSError as error:
            log.error("the CDI specifications were not written: %s", error)

    async def run(self) -> None:
        """Keep cupsd's queues what they should be, until cancelled."""
        while True:
            await self._queues_changed.wait()
            self._queues_changed.clear()
            try:
                await self._cups.set_queues(self._queues)
            except AgentError as error:
                log.warning("the queues of cupsd are not up to date: %s", error)
                await asyncio.sleep(QUEUE_RETRY_S)
                self._queues_changed.set()

    def printing(self, seat: Seat) -> list[Offer]:
        """The printers of a seat right now."""
        slots = seat.slots.values()
        return [o for slot in slots for o in self._binding.offers(slot.resource, slot.ids) if prints(o)]

    def to_clean(self, due: CleanUp) -> tuple[Device, Give] | None:
        """The device of a clean-up and how it was given, as nodes where no rule says it any more; None without need or device."""
        device = self._inventory.devices.get(due.device_id)
        if device is None or not device.present or not self.config.devices.clean_up:
            return None
        offers = self._binding.offers(due.resource, (due.device_id,))
        return device, offers[0].give if offers and offers[0].rule else "node"

    def measure(self) -> None:
        """Set the gauge of devices."""
        offered = {i for r in self.resources.resources.values() for i in r.offers}
        counts: dict[tuple[str, ...], int] = dict.fromkeys(self._known_labels, 0)
        for device in self._inventory.devices.values():
            state = "leased" if self._binding.held(device.id) else "offered" if device.id in offered else "unoffered"
            health = "Healthy" if device.present else "Unhealthy"
            key = (device.cls.value, health, state, str(device.usb.simulated).lower())
            counts[key] = counts.get(key, 0) + 1
        for labels, count in counts.items():
            self._metrics.devices.labels(*labels).set(count)
        self._known_labels = set(counts)


def _with_held(resource: Resource, leases: Iterable[Lease]) -> Resource:
    """Ids that are held but not offered now stay listed as unhealthy: the kubelet takes one that is missing for healthy."""
    held = {x.device_id for x in leases if x.resource == resource.name}
    absent = {
        i: Offer(
            device=Device(
                id=i, cls=DeviceClass(found[1]), usb=UsbDevice(port="", vendor=0, product=0), present=False
            ),
            rule="",
            grant=Grant(),
        )
        for i in sorted(held - resource.offers.keys())
        if (found := DEVICE_ID.fullmatch(i))
    }  # fmt: skip
    return msgspec.structs.replace(resource, offers={**resource.offers, **absent}) if absent else resource
