"""The whole daemon over a sysfs tree: one device under several names, parts of a device, nodes, CDI, KubeVirt, a replug."""

from __future__ import annotations

import json
import shutil
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from nodeagent.demo.endpoints import PluginFailed
from nodeagent.demo.pods import ContainerSpec, PodSpec
from nodeagent.model import SeatState
from tests import machines
from tests.daemon.house import House, eventually, pod

pytestmark = pytest.mark.root

KEY, MINE, DISK, RAW, PRINTER = (f"opencdi.io/{leaf}" for leaf in ("ukey", "mine", "usb-storage", "usb", "printer"))
KEY_PORT, STICK_PORT = "1-3", "2-1"


@pytest.fixture
async def house(short_tmp: Path) -> AsyncIterator[House]:
    made = House(short_tmp, simulated=[])
    made.raw["devices"]["cdi_dir"] = str(short_tmp / "cdi")
    async with made.kubelet, made.cri:
        yield made


def _under_runc(spec: PodSpec) -> PodSpec:
    return msgspec.structs.replace(spec, handler="runc")


def plug(house: House, machine: str, **moved: str) -> None:
    tree = machines.tree(machine)
    for old, new in moved.items():
        tree = {d.replace(old.replace("_", "-"), new): f for d, f in tree.items()}
    machines.materialise(house.host, tree)


def unplug(house: House, port: str) -> None:
    for link in (house.host / "sys/bus/usb/devices").glob(f"{port}*"):
        if link.is_symlink():
            target = link.resolve()
            link.unlink()
            if target.name == port:
                shutil.rmtree(target)


async def rescan(house: House) -> None:
    inventory = house.view.inventory
    assert inventory is not None
    await inventory.rescan()


def the(house: House, resource: str) -> str:
    """The one id of a resource."""
    (device,) = house.kubelet.endpoints[resource].devices
    return device


def healthy(house: House, resource: str) -> int:
    return len(house.kubelet.allocatable(resource))


async def offered(house: House, *resources: str) -> None:
    await house.kubelet.until(lambda: all(healthy(house, r) for r in resources))


async def test_a_device_under_two_names_is_held_under_one(house: House) -> None:
    house.save(rules=[{"name": "keys", "match": {"class": "ukey"}, "resource": ["ukey", "mine"], "give": "node"}])
    plug(house, "yubikey")
    async with house.life() as active:
        await offered(house, KEY, MINE)
        first, second = pod("first", resource=KEY), pod("second", resource=MINE)
        first, second = (_under_runc(p) for p in (first, second))
        seen: list[dict[str, bool]] = []
        allocate = active.binding.allocate

        async def noting(*args: Any) -> Any:
            answer = await allocate(*args)
            await house.kubelet.until(lambda: not healthy(house, MINE), 0.2)  # sent before Allocate returns
            seen.append(dict(house.kubelet.endpoints[MINE].devices))
            return answer

        active.binding.allocate = noting  # type: ignore[method-assign]
        await house.run(first)
        assert seen == [{the(house, MINE): False}]
        (row,) = house.view.document("devices").devices  # type: ignore[attr-defined]
        assert (row.resource, row.healthy, row.held_by.pod.name) == (f"{KEY},{MINE}", True, "first")
        with pytest.raises(PluginFailed, match=r"is held as opencdi.io/ukey by pod default/first"):
            await house.kubelet.endpoints[MINE].allocate((the(house, MINE),))
        active.binding.allocate = allocate  # type: ignore[method-assign]
        house.end(first)
        await house.kubelet.until(lambda: bool(healthy(house, MINE)))
        await house.run(second)
        await house.kubelet.until(lambda: not healthy(house, KEY))


async def test_the_first_list_after_a_restart_knows_what_is_held(house: House) -> None:
    house.save(rules=[{"name": "keys", "match": {"class": "ukey"}, "resource": ["ukey", "mine"], "give": "node"}])
    plug(house, "yubikey")
    async with house.life():
        await offered(house, KEY, MINE)
        await house.run(_under_runc(pod("desk", resource=KEY)))
    lists: list[bool] = []
    async with house.life():
        await house.kubelet.until(lambda: bool(house.kubelet.endpoints[MINE].devices))
        lists.append(house.kubelet.endpoints[MINE].devices[the(house, MINE)])
    assert lists == [False]


async def test_parts_of_one_device_go_to_two_desktops_unless_one_takes_it_raw(house: House) -> None:
    combo = machines.tree("multifunction")
    port = next(d for d, f in combo.items() if "idVendor" in f and f["idVendor"] != "1d6b")
    slot = f"{port}/{port.rpartition('/')[2]}:1.7"
    node = "MAJOR=8\nMINOR=32\nDEVNAME=sdc\nDEVTYPE=disk"
    interface = {
        "bInterfaceNumber": "07", "bAlternateSetting": " 0", "bInterfaceClass": "08", "bInterfaceSubClass": "06",
        "bInterfaceProtocol": "50", "uevent": "DEVTYPE=usb_interface", "subsystem": "->/bus/usb",
    }  # fmt: skip
    block = {"dev": "8:32", "uevent": node, "subsystem": "->/class/block"}
    machines.materialise(house.host, combo, {slot: interface, f"{slot}/host3/target/3:0:0:0/block/sdc": block})
    rules = [
        {"name": "printers", "match": {"class": "printer"}, "give": "node"},
        {"name": "slots", "match": {"class": "storage"}, "give": "node"},
    ]
    house.save(rules=rules)
    async with house.life():
        await offered(house, PRINTER, DISK)
        await house.run(_under_runc(pod("printing", resource=PRINTER)))
        await house.run(_under_runc(pod("reading", resource=DISK)))
        names = {d.rpartition("-")[2] for r in (PRINTER, DISK) for d in house.kubelet.endpoints[r].devices}
        assert len(names) == 1, "parts of one device differ by their class alone"


async def test_a_container_gets_nodes_and_what_virt_launcher_reads(house: House) -> None:
    house.save(rules=[{"name": "keys", "match": {"class": "ukey"}, "give": "node", "sandbox": "kubevirt"}])
    plug(house, "yubikey")
    async with house.life() as active:
        await offered(house, KEY)
        launcher = _under_runc(pod("vm", resource=KEY, labels={"kubevirt.io": "virt-launcher"}))
        await house.run(launcher)
        env = house.env["vm", "desktop"]
        assert env["USB_RESOURCE_OPENCDI_IO_UKEY"] == "1:9"
        assert [n.host_path for n in house.kubelet.run_options(launcher, "desktop").nodes] == ["/dev/bus/usb/001/009"]
        assert house.seat(active, launcher).kind == "kubevirt"
        house.end(launcher)
        await eventually(lambda: not active.leases.leases)
        with pytest.raises(Exception, match="is for kubevirt desktops"):
            await house.run(_under_runc(pod("plain", resource=KEY)))


async def test_cdi_follows_a_replug(house: House) -> None:
    house.save(rules=[{"name": "keys", "match": {"class": "ukey"}, "give": "node", "cdi": True}])
    plug(house, "yubikey")
    directory = house.directory / "cdi"
    async with house.life():
        await offered(house, KEY)
        desk = _under_runc(pod("desk", resource=KEY))
        await house.run(desk)
        options = house.kubelet.run_options(desk, "desktop")
        assert options.cdi == (f"{KEY}={the(house, KEY)}",)
        assert options.nodes == ()

        def nodes() -> list[str]:
            (path,) = directory.iterdir()
            (device,) = json.loads(path.read_text())["devices"]
            return [n["path"] for n in device["containerEdits"]["deviceNodes"]]

        assert "/dev/bus/usb/001/009" in nodes()
        unplug(house, KEY_PORT)
        await rescan(house)
        assert list(directory.iterdir()) == []
        tree = json.loads(json.dumps(machines.tree("yubikey")).replace("bus/usb/001/009", "bus/usb/001/010"))
        machines.materialise(house.host, tree)
        await rescan(house)
        assert "/dev/bus/usb/001/010" in nodes()


async def test_health_follows_and_the_seat_lives_through_it(house: House) -> None:
    house.save(rules=[{"name": "keys", "match": {"class": "ukey"}, "give": "node"}])
    plug(house, "yubikey")
    async with house.life() as active:
        await offered(house, KEY)
        desk = _under_runc(pod("desk", resource=KEY))
        await house.run(desk)
        device = the(house, KEY)
        carried: list[tuple[list[str], list[str]]] = []
        active.comparison._carriage._carry = lambda c, gone, come: carried.append(
            ([n.path for n in gone], [n.path for n in come])
        )
        unplug(house, KEY_PORT)
        await rescan(house)
        await house.kubelet.until(lambda: not healthy(house, KEY))
        assert the(house, KEY) == device, "listed, and unhealthy"
        slot = json.loads((house.slot(desk, resource=KEY) / "slot.json").read_text())
        assert [(d["health"], d["reason"]) for d in slot["devices"]] == [("Unhealthy", "device_unplugged")]
        (row,) = house.view.document("devices").devices  # type: ignore[attr-defined]
        assert (row.healthy, row.reason) == (False, "device_unplugged")
        await eventually(lambda: carried)
        assert house.seat(active, desk).state is not SeatState.CLOSED
        tree = json.loads(json.dumps(machines.tree("yubikey")).replace("bus/usb/001/009", "bus/usb/001/010"))
        machines.materialise(house.host, tree)
        await rescan(house)
        await house.kubelet.until(lambda: bool(healthy(house, KEY)))
        await eventually(lambda: len(carried) > 1)
        assert "/dev/bus/usb/001/009" in carried[0][0]
        assert "/dev/bus/usb/001/010" in carried[1][1]
        assert house.value("node_changes_total", result="ok") == 2
        assert house.seat(active, desk) is not None


async def test_what_was_left_behind_is_cleaned_up_once(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    house.save(rules=[{"name": "keys", "match": {"class": "ukey"}, "give": "node"}])
    plug(house, "yubikey")
    async with house.life() as active:
        await offered(house, KEY)
        ran: list[str] = []
        hook = active.binding._clean_ups._hook

        async def noting(due: Any) -> str:
            ran.append(due.pod_uid)
            return await hook(due)  # its node is not there: nothing to reset

        active.binding._clean_ups._hook = noting
        for name in ("first", "second", "third"):
            desk = _under_runc(pod(name, resource=KEY))
            await house.run(desk)
            house.end(desk)
        await eventually(lambda: len(ran) == 3)
        await active.comparison.compare()
        assert ran == ["uid-first", "uid-second", "uid-third"]
        assert house.value("clean_ups_total", result="ok") == 3


async def test_a_refused_pod_is_counted_and_told_once(house: House) -> None:
    house.save(rules=[{"name": "keys", "match": {"class": "ukey"}, "give": "node", "to": {"namespaces": ["desktops"]}}])
    plug(house, "yubikey")
    async with house.life() as active:
        await offered(house, KEY)
        desk = _under_runc(pod("desk", resource=KEY))
        house.sandbox(desk)
        await house.kubelet.admit(desk)
        for _ in range(3):
            with pytest.raises(Exception, match="rule 'keys' does not let namespace default"):
                await house.kubelet.start_container(desk, "desktop")
        (row,) = active.binding.refusals.rows
        assert (row.count, row.rules, row.pod.name) == (3, ("keys",), "desk")
        assert house.value("refused_holding_seconds", resource=KEY) > 0


async def test_several_containers_and_resources_of_one_pod(house: House) -> None:
    house.save(
        rules=[
            {"name": "keys", "match": {"class": "ukey"}, "give": "node"},
            {"name": "sticks", "match": {"class": "storage"}, "give": "node"},
        ]
    )
    plug(house, "yubikey")
    plug(house, "stick")
    async with house.life() as active:
        await offered(house, KEY, DISK)
        containers = (
            ContainerSpec(name="prepare", limits={KEY: 1}, init=True),
            ContainerSpec(name="desktop", limits={KEY: 1, DISK: 1}),
            ContainerSpec(name="sidecar", limits={}),
        )
        desk = _under_runc(pod("desk", containers=containers))
        await house.run(desk)
        assert set(house.seat(active, desk).device_ids) == {the(house, KEY), the(house, DISK)}
        assert len(active.leases.leases) == 2
