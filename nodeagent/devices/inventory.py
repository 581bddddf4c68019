"""The devices of this node, now. First step of flow A.

Kernel events say *when* and *where* to look, sysfs says *what* is there, and the difference to the last look is the change that
subscribers hear of. A few events are a look at the ports they name; a storm is one look at everything, and without events
there is one every `resync` seconds.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType, TracebackType
from typing import Self

import msgspec

from nodeagent.config import DevicesConfig, SimulatedDevice
from nodeagent.devices import simulated as models
from nodeagent.devices import sysfs, udev
from nodeagent.devices.identity import TwinMemory, device_id, identify, twin_mark, twins
from nodeagent.devices.matching import kinds
from nodeagent.host import HostRoot
from nodeagent.model import Device, InventoryChange, UsbDevice

log = logging.getLogger(__name__)

SLOW_LOOK_S = 2.0
TURNS_A_LOOK = 4
"""Turns of events (udev.EVENTS_A_TURN) that are decoded for one look; beyond them everything is looked at."""

Subscriber = Callable[[InventoryChange], None]


class Schedule:
    """When to look next. Times are monotonic seconds; nothing here waits."""

    def __init__(self, debounce_s: float, resync_s: float, now: float) -> None:
        self.debounce_s = debounce_s
        self.resync_s = resync_s
        self._first_event: float | None = None
        self._last_look = now

    @property
    def due(self) -> float:
        """`debounce_s` after the first event since the last look, however many follow; else `resync_s` after that look."""
        if self._first_event is not None:
            return self._first_event + self.debounce_s
        return self._last_look + self.resync_s

    @property
    def heard(self) -> bool:
        """Whether the look that is due follows from an event."""
        return self._first_event is not None

    def event(self, now: float) -> None:
        if self._first_event is None:
            self._first_event = now

    def look(self, now: float) -> float | None:
        """A look begins: events from now on belong to the next. Returns the time of the first event that led to it."""
        first, self._first_event = self._first_event, None
        self._last_look = now
        return first


class Inventory:
    """Watches the devices of `host` while its context is entered; `run()` keeps it up to date.

    Who owns the node's state says by `own(held)` whether somebody holds a device: if so it stays listed as not present after it
    was unplugged, until it is back or `settle()` finds it no longer held. Subscribers are called in the event loop, in the
    order they came, and must neither block nor change the inventory; one that raises ends `run()`.
    """

    def __init__(
        self,
        host: HostRoot,
        config: DevicesConfig,
        key: bytes,
        memory: TwinMemory | None = None,
        *,
        open_hotplug: Callable[[HostRoot], udev.Hotplug | None] = udev.open_hotplug,
    ) -> None:
        self._host = host
        self._key = key
        self._memory = memory
        self._held: Callable[[str], bool] | None = None
        self._remembered = True
        self._rules = config.rules
        self._open_hotplug = open_hotplug
        self._hotplug: udev.Hotplug | None = None
        self._listening = False
        self._touched: set[str] | None = None
        """Ports that events named since the last look; None: too many, or unknown ones."""
        self._schedule = Schedule(config.debounce, config.resync, time.monotonic())
        self._changed_schedule = asyncio.Event()
        self._one_look = asyncio.Lock()
        self._subscribers: list[Subscriber] = []
        self._found: tuple[UsbDevice, ...] = ()
        self._simulated = tuple(models.usb_device(s) for s in config.simulated)
        self._devices: dict[str, Device] = {}
        self._twins: frozenset[tuple[str, ...]] = frozenset()

    @property
    def twins(self) -> frozenset[tuple[str, ...]]:
        """The ports of devices that are there now and have one serial number, a tuple for each kind."""
        return self._twins

    @property
    def devices(self) -> Mapping[str, Device]:
        """Every listed device by id, in the order of ids."""
        return MappingProxyType(self._devices)

    def subscribe(self, callback: Subscriber) -> None:
        """Hear of every change from now on; one who subscribes before the context is entered hears of the first devices too."""
        self._subscribers.append(callback)

    async def __aenter__(self) -> Self:
        self._hotplug = await asyncio.to_thread(self._open_hotplug, self._host)
        try:
            if self._memory is not None:
                await asyncio.to_thread(self._memory.load)
            await self.rescan()  # after the socket is open, so that nothing falls between the two
        except BaseException:
            self._close()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()

    def _close(self) -> None:
        self._listen(False)
        if self._hotplug is not None:
            self._hotplug.close()
            self._hotplug = None

    async def own(self, held: Callable[[str], bool]) -> None:
        """This daemon has the node's state from now on: what is held stays listed, and twins are remembered."""
        if self._memory is not None:
            await asyncio.to_thread(self._memory.load)
        self._held = held
        self._update(None)
        await self._remember()

    async def run(self) -> None:
        """Look whenever it is due, until cancelled."""
        while True:
            self._changed_schedule.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._schedule.due - time.monotonic()):
                    await self._changed_schedule.wait()
            if time.monotonic() >= self._schedule.due:
                await self._look(everything=not self._schedule.heard)

    async def rescan(self) -> None:
        """Look at the whole bus now and tell subscribers what changed. Looks never overlap."""
        await self._look(everything=True)

    async def _look(self, *, everything: bool) -> None:
        async with self._one_look:
            touched = None if everything else self._drained()
            if self._hotplug is not None:
                if touched is None:
                    self._hotplug.discard()
                self._listen(True)
            self._touched = set()
            began = time.monotonic()
            event_s = self._schedule.look(began)
            known = {usb.port: usb for usb in self._found}
            try:
                self._found = await asyncio.to_thread(self._read, known, touched)
            except BaseException:
                self._touched = None  # what this look was to see is still to be seen
                raise
            if (took := time.monotonic() - began) > SLOW_LOOK_S:
                log.warning(
                    "reading the USB devices took %.1f s: one of them holds its lock (a reset that fails?)", took
                )
            self._update(event_s)
            await self._remember()

    async def _remember(self) -> None:
        """Put what was learned of twins on disk; a disk that refuses is asked again at the next look."""
        if self._memory is None or self._held is None or self._remembered:
            return
        try:
            await asyncio.to_thread(self._memory.save)
        except OSError as error:
            log.error("the memory of devices with one serial number was not saved: %s", error)
        else:
            self._remembered = True

    def _drained(self) -> frozenset[str] | None:
        """The ports that events named since the last look; None when there were too many to tell."""
        for _ in range(TURNS_A_LOOK):
            if self._touched is None:
                return None
            if self._hotplug is None:
                break
            heard = self._hotplug.take()
            self._touched = None if heard.lost else self._touched | heard.ports
            if not heard.more:
                break
        else:
            return None
        return None if self._touched is None else frozenset(self._touched)

    def _read(self, known: Mapping[str, UsbDevice], touched: frozenset[str] | None) -> tuple[UsbDevice, ...]:
        """Read the devices at the touched ports (None: at all), and those that were not known; the others are as they were."""
        paths = udev.usb_paths(self._host)
        if touched is None:
            return sysfs.read_devices(self._host, paths, known)
        ports = {path.rpartition("/")[2]: path for path in paths}
        fresh = [path for port, path in ports.items() if port in touched or port not in known]
        kept = (usb for port, usb in known.items() if port in ports and port not in touched)
        return tuple(sorted((*kept, *sysfs.read_devices(self._host, fresh, known)), key=lambda usb: usb.port))

    def reconfigure(self, config: DevicesConfig) -> None:
        """A new configuration: its times count from now on, its simulated devices replace the old ones."""
        self._schedule.debounce_s, self._schedule.resync_s = config.debounce, config.resync
        self._rules = config.rules
        self._changed_schedule.set()
        self.set_simulated(config.simulated)

    def set_simulated(self, simulated: Sequence[SimulatedDevice]) -> None:
        """Plug in and unplug simulated devices until exactly these are there."""
        event_s = time.monotonic()
        self._simulated = tuple(models.usb_device(s) for s in simulated)
        self._update(event_s)

    def settle(self) -> None:
        """Somebody let go of a device: drop what is neither present nor held. Reads nothing."""
        self._update(None)

    # ---- events

    def _listen(self, on: bool) -> None:
        if self._hotplug is None or on == self._listening:
            return
        loop = asyncio.get_running_loop()
        if on:
            loop.add_reader(self._hotplug.fileno(), self._on_readable)
        else:
            loop.remove_reader(self._hotplug.fileno())
        self._listening = on

    def _on_readable(self) -> None:
        if self._hotplug is not None and (heard := self._hotplug.take()).usb:
            # The look is due; what follows stays in the socket until it begins, where a storm is thrown away.
            self._listen(False)
            self._touched = None if heard.lost or self._touched is None else self._touched | heard.ports
            self._schedule.event(time.monotonic())
            self._changed_schedule.set()

    # ---- differences

    def _update(self, event_s: float | None) -> None:
        """Compare what was found with what is listed, and tell."""
        every = (*self._found, *self._simulated)
        self._note_twins(every)
        memory = self._memory
        now = identify(
            self._key,
            ((kind, usb) for usb in every for kind in kinds(usb, self._rules)),
            memory.marks if memory else (),
            memory.anchors if memory else {},
        )
        old = self._devices
        vanished = {i: msgspec.structs.replace(d, present=False) for i, d in old.items() if d.present and i not in now}
        absent = {i: d for i, d in old.items() if not d.present and i not in now} | vanished
        kept = {i: d for i, d in absent.items() if self._is_held(i)}
        change = InventoryChange(
            appeared=tuple(d for i, d in now.items() if i not in old or not old[i].present),
            changed=tuple(d for i, d in now.items() if i in old and old[i].present and old[i] != d),
            vanished=tuple(vanished.values()),
            devices=dict(sorted((now | kept).items())),
            dropped=tuple(d for i, d in absent.items() if i not in kept and i not in vanished),
            event_s=event_s,
        )
        if not (change.appeared or change.changed or change.vanished or change.dropped):
            return
        self._devices = change.devices
        _log(change)
        for subscriber in self._subscribers:
            subscriber(change)

    def _is_held(self, device_id: str) -> bool:
        return self._held is not None and self._held(device_id)

    def _note_twins(self, found: Sequence[UsbDevice]) -> None:
        """Say who has a twin, and remember it; one that is held under its serial number is anchored to its port."""
        ambiguous = twins(found)
        for ports in ambiguous - self._twins:
            log.warning(
                "the devices at ports %s have the same serial number and are known by their ports", ", ".join(ports)
            )
        self._twins = ambiguous
        memory = self._memory
        if memory is None or self._held is None:
            return
        new = {usb.port: twin_mark(self._key, usb) for usb in found if any(usb.port in ports for ports in ambiguous)}
        anchors = {i: port for i, port in memory.anchors.items() if self._held(i)}
        for device in self._devices.values():
            usb = device.usb
            by_serial = bool(usb.serial) and device.id == device_id(self._key, device.cls, usb)
            if by_serial and self._held(device.id) and twin_mark(self._key, usb) in new.values():
                anchors.setdefault(device.id, usb.port)
        marks = memory.marks | frozenset(new.values())
        if (marks, anchors) != (memory.marks, memory.anchors):
            memory.marks, memory.anchors, self._remembered = marks, anchors, False


def _log(change: InventoryChange) -> None:
    for word, devices in (("appeared", change.appeared), ("changed", change.changed), ("vanished", change.vanished)):
        for device in devices:
            mark = " (simulated)" if device.usb.simulated else ""
            log.info("device %s: %s at port %s%s", word, device.id, device.usb.port, mark)
