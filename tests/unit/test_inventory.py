"""The inventory: what subscribers hear, what a storm costs, and what stays listed for whom it is held."""

import asyncio
import itertools
import shutil
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from nodeagent.config import DevicesConfig, SimulatedDevice
from nodeagent.devices import sysfs
from nodeagent.devices.identity import TwinMemory
from nodeagent.devices.inventory import TURNS_A_LOOK, Inventory, Schedule
from nodeagent.devices.udev import Heard
from nodeagent.host import HostRoot
from nodeagent.model import InventoryChange
from tests import machines

KEY = bytes(range(32))
PRINTER = "/sys/devices/pci0000:00/0000:00:14.0/usb1/1-4"
PRINTER_ID = "printer-kjoab3fn3tuxnkypi4q4"  # test_identity.py says how; of SERIAL-1
P1 = SimulatedDevice(model="printer", serial="P1")
P2 = SimulatedDevice(model="printer", serial="P2")


class Doorbell:
    """Stands for the kernel: `ring()` is an event; `b"-"` one that does not concern USB."""

    def __init__(self) -> None:
        self._inner, self._outer = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._inner.setblocking(False)
        self._outer.setblocking(False)
        self.wakes = 0
        self.ports = frozenset[str]()
        """Which ports the events name."""

    def ring(self, times: int = 1, kind: bytes = b"+") -> None:
        for _ in range(times):
            try:
                self._outer.send(kind)
            except BlockingIOError:
                return  # full, like the kernel's: the rest is lost

    async def woken(self, times: int) -> None:
        async with asyncio.timeout(5):
            while self.wakes < times:
                await asyncio.sleep(0.001)

    def fileno(self) -> int:
        return self._inner.fileno()

    def take(self) -> Heard:
        """One event a turn."""
        self.wakes += 1
        try:
            kind = self._inner.recv(1)
        except BlockingIOError:
            return Heard()
        return Heard(kind != b"-", self.ports, lost=kind == b"!", more=True)

    def discard(self) -> None:
        try:
            while True:
                self._inner.recv(1)
        except BlockingIOError:
            pass

    def close(self) -> None:
        self._inner.close()
        self._outer.close()


class Ear:
    """Hears every change and lets a test wait for the next one."""

    def __init__(self) -> None:
        self.heard: asyncio.Queue[InventoryChange] = asyncio.Queue()

    def __call__(self, change: InventoryChange) -> None:
        self.heard.put_nowait(change)

    async def next(self) -> InventoryChange:
        async with asyncio.timeout(5):
            return await self.heard.get()


@asynccontextmanager
async def watching(
    host: HostRoot,
    config: DevicesConfig,
    doorbell: Doorbell | None = None,
    held: Callable[[str], bool] = lambda _: False,
    state_dir: Path | None = None,
) -> AsyncIterator[tuple[Inventory, Ear]]:
    ear = Ear()
    memory = None if state_dir is None else TwinMemory(state_dir)
    inventory = Inventory(host, config, KEY, memory, open_hotplug=lambda _: doorbell)
    inventory.subscribe(ear)
    async with inventory:
        await inventory.own(held)
        running = asyncio.create_task(inventory.run())
        try:
            yield inventory, ear
        finally:
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)


def plug(root: Path) -> None:
    machines.machine(root, "laserjet")


def unplug(root: Path) -> None:
    shutil.rmtree(root / PRINTER.lstrip("/"))
    for link in (root / sysfs.BUS.lstrip("/")).glob("1-4*"):
        link.unlink()


# ---- when to look


def test_schedule() -> None:
    schedule = Schedule(debounce_s=0.1, resync_s=300, now=1000.0)
    assert schedule.due == 1300.0
    for n in range(1000):
        schedule.event(1001.0 + n / 10_000)
    assert schedule.due == pytest.approx(1001.1)  # events that go on do not put it off
    assert schedule.look(1001.1) == 1001.0
    assert schedule.due == pytest.approx(1301.1)
    schedule.event(1001.15)
    assert schedule.due == pytest.approx(1001.25)  # never two looks within debounce_s
    assert schedule.look(1001.25) == 1001.15
    assert schedule.look(1002.0) is None


def test_an_endless_storm_is_one_look_per_period() -> None:
    schedule = Schedule(debounce_s=0.1, resync_s=300, now=0.0)
    looks = []
    for millisecond in range(10_000):
        now = millisecond / 1000
        schedule.event(now)
        if now >= schedule.due:
            schedule.look(now)
            looks.append(now)
    assert 90 <= len(looks) <= 100
    assert min(b - a for a, b in itertools.pairwise(looks)) >= 0.1 - 1e-9


async def test_a_storm_of_events_is_one_look(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    doorbell = Doorbell()
    looks = 0
    read_devices = sysfs.read_devices

    def counting(*args: Any) -> Any:
        nonlocal looks
        looks += 1
        return read_devices(*args)

    async with watching(HostRoot(tmp_path), DevicesConfig(debounce=0.05), doorbell) as (inventory, ear):
        monkeypatch.setattr(sysfs, "read_devices", counting)
        plug(tmp_path)
        started = asyncio.get_running_loop().time()
        for _ in range(10):
            doorbell.ring(100)
            await asyncio.sleep(0)
        change = await ear.next()
        assert [d.id for d in change.appeared] == [PRINTER_ID]
        assert change.event_s is not None
        assert 0 <= change.event_s - started < 0.05
        assert looks == 1
        turns = 1 + TURNS_A_LOOK
        assert doorbell.wakes == turns, "the rest of the storm stays in the socket"
        doorbell.ring(1, b"-")
        await doorbell.woken(turns + 1)
        assert asyncio.get_running_loop().time() + 100 < inventory._schedule.due, "and it was thrown away"
        assert list(inventory.devices) == [PRINTER_ID]


async def test_other_buses_do_not_cause_a_look(tmp_path: Path) -> None:
    doorbell = Doorbell()
    async with watching(HostRoot(tmp_path), DevicesConfig(debounce=0.001), doorbell) as (_, ear):
        plug(tmp_path)
        doorbell.ring(5, b"-")
        await doorbell.woken(5)
        assert ear.heard.empty()
        doorbell.ring()
        assert (await ear.next()).appeared


async def test_events_that_name_a_port_cost_a_look_at_that_port(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    doorbell = Doorbell()
    read: list[list[str]] = []
    read_devices = sysfs.read_devices

    def noting(host: HostRoot, paths: list[str], known: Any) -> Any:
        read.append([path.rpartition("/")[2] for path in paths])
        return read_devices(host, paths, known)

    machines.machine(tmp_path, "yubikey")
    async with watching(HostRoot(tmp_path), DevicesConfig(debounce=0.01), doorbell) as (inventory, ear):
        await ear.next()
        monkeypatch.setattr(sysfs, "read_devices", noting)
        plug(tmp_path)
        doorbell.ports = frozenset({"1-4"})
        doorbell.ring()
        assert [d.id for d in (await ear.next()).appeared] == [PRINTER_ID]
        assert "1-3" not in read[0], "the key was not touched"
        unplug(tmp_path)
        doorbell.ring()
        assert [d.id for d in (await ear.next()).vanished] == [PRINTER_ID]
        assert len(inventory.devices) == 1
        read.clear()
        machines.machine(tmp_path, "laserjet")
        doorbell.ring(1, b"!")
        assert (await ear.next()).appeared
        assert "1-3" in read[0], "events were lost: everything is looked at"


async def test_without_events_the_periodic_look_finds_it(tmp_path: Path) -> None:
    async with watching(HostRoot(tmp_path), DevicesConfig(resync=0.02)) as (_, ear):
        plug(tmp_path)
        change = await ear.next()
        assert (len(change.appeared), change.event_s) == (1, None)


async def test_an_event_during_a_look_leads_to_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The device comes after its bus was read and before the look ends."""
    doorbell = Doorbell()
    read_devices = sysfs.read_devices

    def late(*args: Any) -> Any:
        monkeypatch.setattr(sysfs, "read_devices", read_devices)
        found = read_devices(*args)
        plug(tmp_path)
        doorbell.ring()
        return found

    async with watching(HostRoot(tmp_path), DevicesConfig(debounce=0.01), doorbell) as (_, ear):
        monkeypatch.setattr(sysfs, "read_devices", late)
        doorbell.ring()
        assert [d.id for d in (await ear.next()).appeared] == [PRINTER_ID]


# ---- what is heard


async def test_first_look_and_unplug(tmp_path: Path) -> None:
    plug(tmp_path)
    async with watching(HostRoot(tmp_path), DevicesConfig()) as (inventory, ear):
        assert [d.id for d in (await ear.next()).appeared] == [PRINTER_ID]
        await inventory.rescan()
        assert ear.heard.empty(), "nothing changed, nobody is told"
        unplug(tmp_path)
        await inventory.rescan()
        change = await ear.next()
        assert [(d.id, d.present) for d in change.vanished] == [(PRINTER_ID, False)]
        assert (change.appeared, change.changed, change.dropped, change.devices) == ((), (), (), {})
        assert inventory.devices == {}


async def test_a_held_device_stays_until_nobody_holds_it(tmp_path: Path) -> None:
    plug(tmp_path)
    held = {PRINTER_ID}
    async with watching(HostRoot(tmp_path), DevicesConfig(), held=held.__contains__) as (inventory, ear):
        await ear.next()
        unplug(tmp_path)
        await inventory.rescan()
        change = await ear.next()
        assert [d.id for d in change.vanished] == [PRINTER_ID]
        assert not inventory.devices[PRINTER_ID].present
        await inventory.rescan()
        inventory.settle()
        assert ear.heard.empty()

        plug(tmp_path)
        await inventory.rescan()
        change = await ear.next()
        assert [(d.id, d.present) for d in change.appeared] == [(PRINTER_ID, True)]

        unplug(tmp_path)
        await inventory.rescan()
        await ear.next()
        held.clear()
        inventory.settle()
        change = await ear.next()
        assert [d.id for d in change.dropped] == [PRINTER_ID]
        assert (change.vanished, change.devices, dict(inventory.devices)) == ((), {}, {})


async def test_replug_elsewhere_is_the_same_device(tmp_path: Path) -> None:
    plug(tmp_path)
    async with watching(HostRoot(tmp_path), DevicesConfig()) as (inventory, ear):
        await ear.next()
        unplug(tmp_path)
        moved = {d.replace("1-4", "1-7"): f for d, f in machines.tree("laserjet").items()}
        machines.materialise(tmp_path, moved)
        await inventory.rescan()
        change = await ear.next()
        assert [(d.id, d.usb.port) for d in change.changed] == [(PRINTER_ID, "1-7")]
        assert (change.appeared, change.vanished) == ((), ())


def twin(port: str) -> machines.Tree:
    """The laser printer once more, with the same serial number."""
    return {d.replace("1-4", port): dict(f) for d, f in machines.tree("laserjet").items() if "1-4" in d}


async def test_a_twin_does_not_take_a_held_device_away(tmp_path: Path) -> None:
    """A stranger who plugs in a device with the same serial number must not end a seat, nor get its id."""
    plug(tmp_path)
    state = tmp_path / "state"
    state.mkdir()
    held = {PRINTER_ID}
    async with watching(HostRoot(tmp_path), DevicesConfig(), held=held.__contains__, state_dir=state) as (inventory, _):
        machines.materialise(tmp_path, twin("1-7"))
        await inventory.rescan()
        assert inventory.devices[PRINTER_ID].usb.port == "1-4"
        assert len(inventory.devices) == 2
        unplug(tmp_path)
        await inventory.rescan()
        assert not inventory.devices[PRINTER_ID].present, "the twin at the other port is not taken for it"
        plug(tmp_path)
        await inventory.rescan()
        assert inventory.devices[PRINTER_ID].present
    async with watching(HostRoot(tmp_path), DevicesConfig(), held=held.__contains__, state_dir=state) as (inventory, _):
        assert inventory.devices[PRINTER_ID].usb.port == "1-4", "a restart remembers"
        held.clear()
        await inventory.rescan()
        assert PRINTER_ID not in inventory.devices, "let go of, both are known by their ports"
        shutil.rmtree(tmp_path / PRINTER.replace("1-4", "1-7").lstrip("/"))
        await inventory.rescan()
        assert PRINTER_ID not in inventory.devices, "and stay so when one of them leaves"
        assert "SERIAL-1" not in (state / "twins.json").read_text()


async def test_a_twin_takes_the_serial_from_both(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    plug(tmp_path)
    async with watching(HostRoot(tmp_path), DevicesConfig()) as (inventory, ear):
        await ear.next()
        machines.materialise(tmp_path, twin("1-7"))
        await inventory.rescan()
        change = await ear.next()
        assert [d.id for d in change.vanished] == [PRINTER_ID]
        assert sorted(d.usb.port for d in change.appeared) == ["1-4", "1-7"]
        assert inventory.twins == {("1-4", "1-7")}
        await inventory.rescan()
        warnings = [r.getMessage() for r in caplog.records if "same serial" in r.getMessage()]
        assert len(warnings) == 1
        assert "1-4, 1-7" in warnings[0]
        assert "SERIAL-1" not in caplog.text


async def test_simulated_devices_come_by_the_same_door(tmp_path: Path) -> None:
    async with watching(HostRoot(tmp_path), DevicesConfig(simulated=(P1,))) as (inventory, ear):
        (first,) = (await ear.next()).appeared
        assert (first.usb.simulated, first.cls) == (True, "printer")
        inventory.set_simulated((P1, P2))
        change = await ear.next()
        assert [d.usb.serial for d in change.appeared] == ["P2"]
        assert change.event_s is not None
        inventory.set_simulated(())
        assert sorted(d.usb.serial for d in (await ear.next()).vanished) == ["P1", "P2"]


async def test_reconfigure(tmp_path: Path) -> None:
    async with watching(HostRoot(tmp_path), DevicesConfig()) as (inventory, ear):
        plug(tmp_path)
        inventory.reconfigure(DevicesConfig(resync=0.01, simulated=(P1,)))
        assert [d.usb.serial for d in (await ear.next()).appeared] == ["P1"]
        assert [d.id for d in (await ear.next()).appeared] == [PRINTER_ID]


async def test_a_captured_tree_has_no_events(tmp_path: Path) -> None:
    plug(tmp_path)
    async with Inventory(HostRoot(tmp_path), DevicesConfig(), KEY) as inventory:
        assert list(inventory.devices) == [PRINTER_ID]


async def test_what_fails_at_the_start_leaves_nothing_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    doorbell = Doorbell()

    def broken(*_: Any) -> Any:
        raise RuntimeError("broken")

    monkeypatch.setattr(sysfs, "read_devices", broken)
    inventory = Inventory(HostRoot(tmp_path), DevicesConfig(), KEY, open_hotplug=lambda _: doorbell)
    with pytest.raises(RuntimeError):
        async with inventory:
            pass
    assert doorbell.fileno() == -1


async def test_a_subscriber_that_fails_ends_the_run(tmp_path: Path) -> None:
    def fail(_: InventoryChange) -> None:
        raise ValueError("subscriber")

    async with Inventory(HostRoot(tmp_path), DevicesConfig(resync=0.01), KEY, open_hotplug=lambda _: None) as inventory:
        inventory.subscribe(fail)
        plug(tmp_path)
        with pytest.raises(ValueError, match="subscriber"):
            async with asyncio.timeout(5):
                await inventory.run()
