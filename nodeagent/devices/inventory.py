"""The devices of this node, now. First step of flow A.

Kernel events say *when* to look, sysfs says *what* is there, and the difference to the last look is the change that
subscribers hear of. A storm of events is one look; without events there is one every `resync` seconds.
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

import device_plugins
from nodeagent.config import DevicesConfig, SimulatedDevice
from nodeagent.devices import simulated as models
from nodeagent.devices import sysfs, udev
from nodeagent.devices.identity import identify, twins
from nodeagent.host import HostRoot
from nodeagent.model import Device, InventoryChange, UsbDevice

log = logging.getLogger(__name__)

SLOW_LOOK_S = 2.0

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

    `held(id)` says whether somebody holds a device: if so it stays listed as not present after it was unplugged, until it
    is back or `settle()` finds it no longer held. Subscribers are called in the event loop, in the order they came, and
    must neither block nor change the inventory; one that raises ends `run()`.
    """

    def __init__(
        self,
        host: HostRoot,
        config: DevicesConfig,
        key: bytes,
        *,
        held: Callable[[str], bool] = lambda _: False,
        open_hotplug: Callable[[HostRoot], udev.Hotplug | None] = udev.open_hotplug,
    ) -> None:
        self._host = host
        self._key = key
        self._held = held
        self._open_hotplug = open_hotplug
        self._hotplug: udev.Hotplug | None = None
        self._listening = False
        self._schedule = Schedule(config.debounce, config.resync, time.monotonic())
        self._changed_schedule = asyncio.Event()
        self._one_look = asyncio.Lock()
        self._subscribers: list[Subscriber] = []
        self._found: tuple[UsbDevice, ...] = ()
        self._simulated = tuple(models.usb_device(s) for s in config.simulated)
        self._devices: dict[str, Device] = {}
        self._twins: frozenset[tuple[str, ...]] = frozenset()

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

    async def run(self) -> None:
        """Look whenever it is due, until cancelled."""
        while True:
            self._changed_schedule.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._schedule.due - time.monotonic()):
                    await self._changed_schedule.wait()
            if time.monotonic() >= self._schedule.due:
                await self.rescan()

    async def rescan(self) -> None:
        """Look at the bus now and tell subscribers what changed. Looks never overlap."""
        async with self._one_look:
            if self._hotplug is not None:
                self._hotplug.discard()
                self._listen(True)
            began = time.monotonic()
            event_s = self._schedule.look(began)
            known = {usb.port: usb for usb in self._found}
            self._found = await asyncio.to_thread(self._read, known)
            if (took := time.monotonic() - began) > SLOW_LOOK_S:
                log.warning(
                    "reading the USB devices took %.1f s: one of them holds its lock (a reset that fails?)", took
                )
            self._update(event_s)

    def _read(self, known: Mapping[str, UsbDevice]) -> tuple[UsbDevice, ...]:
        return sysfs.read_devices(self._host, udev.usb_paths(self._host), known)

    def reconfigure(self, config: DevicesConfig) -> None:
        """A new configuration: its times count from now on, its simulated devices replace the old ones."""
        self._schedule.debounce_s, self._schedule.resync_s = config.debounce, config.resync
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
        if self._hotplug is not None and self._hotplug.relevant():
            # The look is due; the rest of the storm stays in the socket and is thrown away when it begins.
            self._listen(False)
            self._schedule.event(time.monotonic())
            self._changed_schedule.set()

    # ---- differences

    def _update(self, event_s: float | None) -> None:
        """Compare what was found with what is listed, and tell."""
        classified = ((device_plugins.classify(usb), usb) for usb in (*self._found, *self._simulated))
        now = identify(self._key, ((cls, usb) for cls, usb in classified if cls is not None))
        ambiguous = twins(device.usb for device in now.values())
        for ports in ambiguous - self._twins:
            log.warning(
                "the devices at ports %s have the same serial number and are known by their ports", ", ".join(ports)
            )
        self._twins = ambiguous
        old = self._devices
        vanished = {i: msgspec.structs.replace(d, present=False) for i, d in old.items() if d.present and i not in now}
        absent = {i: d for i, d in old.items() if not d.present and i not in now} | vanished
        kept = {i: d for i, d in absent.items() if self._held(i)}
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


def _log(change: InventoryChange) -> None:
    for word, devices in (("appeared", change.appeared), ("changed", change.changed), ("vanished", change.vanished)):
        for device in devices:
            mark = " (simulated)" if device.usb.simulated else ""
            log.info("device %s: %s at port %s%s", word, device.id, device.usb.port, mark)
