"""Flow A, joined: when devices or rules change, who is told what, in which order.

inventory, rules -> resources -> binding, spool and workers (who holds it) -> cupsd (queues) -> kubelet (lists)
"""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path

import msgspec

from nodeagent.config import Config
from nodeagent.devices.inventory import Inventory
from nodeagent.devices.kubelet import Registrar
from nodeagent.devices.resources import Resources, build
from nodeagent.errors import AgentError
from nodeagent.metrics import Metrics
from nodeagent.model import Device, DeviceClass, Grant, InventoryChange, Offer, Resource, UsbDevice
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
        cups: Cups, metrics: Metrics,
    ) -> None:  # fmt: skip
        self.config = config
        self.resources = Resources({})
        self._inventory, self._binding, self._registrar, self._roster = inventory, binding, registrar, roster
        self._cups, self._metrics = cups, metrics
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
        resources = {name: self._with_held(r) for name, r in self.resources.resources.items()}
        self._binding.resources = resources
        state_dir = Path(self.config.state_dir)
        queues = tuple(for_cups(o, state_dir) for r in resources.values() for o in r.offers.values() if prints(o))
        if queues != self._queues:
            self._queues = queues
            self._queues_changed.set()
        self._roster.push()
        self._registrar.set_resources(resources, event_s)

    def _with_held(self, resource: Resource) -> Resource:
        """Ids that are held but not offered now stay listed as unhealthy: the kubelet takes one that is missing for healthy."""
        lost = {i for i in self._binding.held_of(resource.name) if i not in resource.offers}
        absent = {
            i: Offer(
                device=Device(
                    id=i,
                    cls=DeviceClass(i.rpartition("-")[0]),
                    usb=UsbDevice(port="", vendor=0, product=0),
                    present=False,
                ),
                rule="",
                grant=Grant(),
            )
            for i in sorted(lost)
        }
        return msgspec.structs.replace(resource, offers={**resource.offers, **absent}) if absent else resource

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

    def measure(self) -> None:
        """Set the gauge of devices."""
        offered = {i for r in self.resources.resources.values() for i in r.offers}
        counts: dict[tuple[str, ...], int] = dict.fromkeys(self._known_labels, 0)
        for device in self._inventory.devices.values():
            state = "leased" if self._binding.held(device.id) else "offered" if device.id in offered else "unoffered"
            key = (device.cls.value, device.health.value, state, str(device.usb.simulated).lower())
            counts[key] = counts.get(key, 0) + 1
        for labels, count in counts.items():
            self._metrics.devices.labels(*labels).set(count)
        self._known_labels = set(counts)
