"""Claims: the rules file, what the host's udevd is told, and what is given back."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from pathlib import Path

import msgspec
import pytest

import device_plugins
from nodeagent.devices import claims as claiming
from nodeagent.devices import sysfs
from nodeagent.devices.claims import Claims, Rule, rules, rules_file
from nodeagent.devices.slow_calls import SlowCalls
from nodeagent.devices.udevd import RULES, Udevd
from nodeagent.documents import Problem
from nodeagent.errors import Reason
from nodeagent.host import Finished, HostRoot
from nodeagent.model import Device, Give, Grant, Offer
from tests import machines
from tests.fakes.udevd import FakeUdevd

OWNER = "0123abcd"
STICK = Rule("2-1", 0x0781, 0x5581)


def devices(host: HostRoot) -> dict[str, Device]:
    """By port, which is all these tests need of an id."""
    found = sysfs.read_devices(host, sysfs.usb_paths(host), {})
    parts = ((u, part) for u in found for part in device_plugins.classify(u)[:1])
    return {
        f"id-{u.port}": Device(id=f"id-{u.port}", cls=part.cls, usb=u, interfaces=part.interfaces) for u, part in parts
    }


def offers(found: Iterable[Device], give: Give = "node") -> list[Offer]:
    return [Offer(device=d, rule="all", grant=Grant(), give=give) for d in found]


class Scene:
    """Recorded machines below a root, a fake udevd, and claims on them; `slept` is the time that waits took."""

    def __init__(self, root: Path, *names: str, told: bool = True, looks_at: int = 1 << 30) -> None:
        self.host = machines.materialise(root, *(machines.tree(n) for n in names))
        self.udevd = FakeUdevd(self.host, told=told, looks_at=looks_at)
        self.slept = 0.0
        self.devices = devices(self.host)
        self.claims = self.fresh()

    def fresh(self, owner: str = OWNER) -> Claims:
        async def sleep(seconds: float) -> None:
            self.slept += seconds

        return Claims(self.host, owner, SlowCalls(), udevd=self.udevd, sleep=sleep)

    async def apply(self, *ids: str, give: Give = "node") -> list[Problem]:
        self.claims.set(offers((self.devices[i] for i in ids), give), self.devices)
        return await self.claims.apply()

    @property
    def file(self) -> str:
        path = self.host.path(RULES) / rules_file(OWNER)
        return path.read_text() if path.exists() else ""


# ---- the file


def test_the_whole_file() -> None:
    text = rules([STICK, Rule("1-1.4", 0x046D, 0x0A44, drivers=True), STICK], OWNER)
    lines = text.splitlines()
    assert lines[1:5] == [
        'ACTION=="remove", GOTO="nodeagent_0123abcd_end"',
        'SUBSYSTEMS=="usb", KERNELS=="1-1.4", ATTRS{idVendor}=="046d", ATTRS{idProduct}=="0a44", '
        'ENV{NODEAGENT_CLAIM}="0123abcd", ENV{NODEAGENT_DRIVERS}="1"',
        'SUBSYSTEMS=="usb", KERNELS=="2-1", ATTRS{idVendor}=="0781", ATTRS{idProduct}=="5581", '
        'ENV{NODEAGENT_CLAIM}="0123abcd"',
        'ENV{NODEAGENT_CLAIM}!="0123abcd", GOTO="nodeagent_0123abcd_end"',
    ]
    assert 'ENV{SYSTEMD_READY}="0"' in lines
    assert 'ENV{ID_SEAT}="seat-nodeagent"' in lines
    assert lines[-1] == 'LABEL="nodeagent_0123abcd_end"'


def test_no_claims_no_file() -> None:
    assert rules([], OWNER) == ""


@pytest.mark.parametrize("port", ["sim-printer", "1-*", '1-1", RUN+="x', "usb1", "", "1-1.1.1.1.1.1.1.1", "1-1\n"])
def test_only_a_bus_path_gets_into_the_file(port: str) -> None:
    assert rules([Rule(port, 1, 1)], OWNER) == ""


def test_the_file_is_bounded() -> None:
    text = rules([Rule(f"1-{n % 128}.{n // 128}", 1, 1) for n in range(5000)], OWNER)
    assert text.count("KERNELS==") == claiming.MAX_CLAIMS
    assert len(text) < 256 << 10


# ---- claiming and letting go


async def test_a_claim_is_written_told_and_seen_to_be_taken_up(tmp_path: Path) -> None:
    scene = Scene(tmp_path, "stick", "laserjet")
    assert await scene.apply("id-2-1") == []
    assert 'KERNELS=="2-1"' in scene.file
    assert scene.file.count("KERNELS") == 1
    assert "SERIAL-1" not in scene.file, "a serial number leaves the node"
    assert scene.udevd.heard == [("2-1", "change")]
    assert scene.udevd.reloads == 1
    below = scene.host.path(scene.devices["id-2-1"].usb.sysfs)
    assert (below / "uevent").read_text() == "change"
    assert (below / "2-1:1.0/host4/target4:0:0/4:0:0:0/block/sdb/sdb1/uevent").read_text() == "change"


async def test_nothing_is_written_or_told_twice(tmp_path: Path) -> None:
    scene = Scene(tmp_path, "stick")
    await scene.apply("id-2-1")
    before = (scene.host.path(RULES) / rules_file(OWNER)).stat().st_mtime_ns
    assert await scene.apply("id-2-1") == []
    assert (scene.host.path(RULES) / rules_file(OWNER)).stat().st_mtime_ns == before
    assert scene.udevd.reloads == 1
    assert len(scene.udevd.heard) == 1


async def test_what_is_no_longer_offered_comes_to_the_host_as_if_just_plugged_in(tmp_path: Path) -> None:
    scene = Scene(tmp_path, "stick", "laserjet")
    await scene.apply("id-2-1", *(i for i in scene.devices if i != "id-2-1"))
    scene.udevd.heard.clear()
    assert await scene.apply("id-2-1") == []
    assert scene.udevd.heard == [("1-4", "add")]
    assert await scene.apply() == []
    assert scene.file == ""
    assert scene.udevd.heard[-1] == ("2-1", "add")


async def test_a_killed_agent_s_claims_are_found_by_the_next(tmp_path: Path) -> None:
    scene = Scene(tmp_path, "stick")
    await scene.apply("id-2-1")
    half_written = scene.host.path(RULES) / f".{rules_file(OWNER)}.4711.tmp"
    half_written.write_text("SUBSYS")
    scene.claims = scene.fresh()
    assert await scene.apply() == []
    assert scene.file == ""
    assert not half_written.exists()
    assert scene.udevd.heard[-1] == ("2-1", "add")


async def test_two_agents_of_one_node_do_not_quarrel(tmp_path: Path) -> None:
    scene = Scene(tmp_path, "stick")
    await scene.apply("id-2-1")
    scene.claims = scene.fresh("ffffffff")
    scene.udevd.heard.clear()
    assert await scene.apply() == []
    assert scene.udevd.heard == []
    assert 'KERNELS=="2-1"' in scene.file


async def test_an_unplugged_device_is_claimed_from_its_first_event_when_it_comes_back(tmp_path: Path) -> None:
    scene = Scene(tmp_path, "stick")
    await scene.apply("id-2-1")
    stick = scene.devices.pop("id-2-1")
    assert await scene.apply() == []
    assert 'KERNELS=="2-1"' in scene.file
    scene.udevd.note(stick.usb)
    scene.devices["id-2-1"] = stick
    assert await scene.apply("id-2-1") == []
    assert len(scene.udevd.heard) == 1, "udevd knew it already"


async def test_another_device_in_the_port_ends_what_was_remembered(tmp_path: Path) -> None:
    scene = Scene(tmp_path, "stick")
    await scene.apply("id-2-1")
    other = msgspec.structs.replace(scene.devices.pop("id-2-1"), id="id-other")
    scene.devices["id-other"] = other
    await scene.apply()
    assert scene.file == ""


async def test_an_agent_that_goes_keeps_what_is_held(tmp_path: Path) -> None:
    scene = Scene(tmp_path, "stick", "laserjet")
    await scene.apply(*scene.devices)
    scene.udevd.heard.clear()
    await scene.claims.close(["id-2-1"])
    assert 'KERNELS=="2-1"' in scene.file
    assert scene.file.count("KERNELS") == 1
    assert scene.udevd.heard == [("1-4", "add")]
    await scene.claims.close()
    assert scene.file == ""


async def test_simulated_and_absent_devices_need_no_claim(tmp_path: Path) -> None:
    scene = Scene(tmp_path, "stick")
    stick = scene.devices["id-2-1"]
    scene.devices["id-2-1"] = msgspec.structs.replace(stick, present=False)
    simulated = msgspec.structs.replace(stick.usb, simulated=True)
    scene.devices["sim"] = msgspec.structs.replace(stick, id="sim", usb=simulated)
    assert await scene.apply("id-2-1", "sim") == []
    assert scene.file == ""


# ---- what is in the way


async def test_a_disk_that_the_host_has_mounted_is_left_alone_and_told(tmp_path: Path) -> None:
    scene = Scene(tmp_path, "stick")
    mountinfo = scene.host.path("/proc/1/mountinfo")
    mountinfo.parent.mkdir(parents=True, exist_ok=True)
    mountinfo.write_text("36 35 8:17 / /mnt/usb rw,noatime shared:1 - vfat /dev/sdb1 rw\n")
    (problem,) = await scene.apply("id-2-1")
    assert problem.message == "id-2-1 (/dev/sdb1) is mounted by the host at /mnt/usb"
    assert problem.hint == "umount /mnt/usb"
    assert scene.file == ""
    mountinfo.write_text("")
    assert await scene.apply("id-2-1") == []
    assert scene.file


async def test_udevd_that_is_not_told_reads_its_rules_three_seconds_later(tmp_path: Path) -> None:
    scene = Scene(tmp_path, "stick", told=False, looks_at=2)
    assert await scene.apply("id-2-1") == []
    assert scene.udevd.heard == [("2-1", "change")] * 2
    assert 3.0 < scene.slept < 3.5


async def test_udevd_that_takes_nothing_up_is_a_problem(tmp_path: Path) -> None:
    scene = Scene(tmp_path, "stick", told=False)
    (problem,) = await scene.apply("id-2-1")
    assert "did not take up the rules for id-2-1" in problem.message
    assert "udevadm control --reload" in problem.hint
    assert scene.slept < 7


async def test_run_goes_on_and_keeps_the_problems(tmp_path: Path) -> None:
    scene = Scene(tmp_path, "stick", told=False)
    async with asyncio.TaskGroup() as tasks:
        running = tasks.create_task(scene.claims.run())
        scene.claims.set(offers(scene.devices.values()), scene.devices)
        async with asyncio.timeout(5):
            while not scene.claims.problems:
                await asyncio.sleep(0)
        running.cancel()
    assert "did not take up" in scene.claims.problems[0].message


async def test_without_udevd_there_is_nobody_to_keep_off(tmp_path: Path) -> None:
    scene = Scene(tmp_path, "stick")
    scene.host.path("/run/udev/control").unlink()
    assert await scene.apply("id-2-1") == []
    assert scene.file == ""


async def test_a_captured_tree_is_not_touched(tmp_path: Path) -> None:
    scene = Scene(tmp_path, "stick")
    scene.host.path("/proc/sys/kernel/random/boot_id").write_text("00000000-0000-0000-0000-000000000000\n")
    assert await scene.apply("id-2-1") == []
    assert scene.udevd.heard == []


async def test_rules_that_cannot_be_written_are_a_problem(tmp_path: Path) -> None:
    scene = Scene(tmp_path, "stick")
    scene.host.path(RULES).write_text("a file where the directory should be")
    (problem,) = await scene.apply("id-2-1")
    assert "were not written" in problem.message


async def test_the_host_s_own_udevadm_is_run_in_the_host_s_mounts(tmp_path: Path) -> None:
    ran: list[list[str]] = []

    async def run(argv: object) -> Finished:
        ran.append(list(argv))  # type: ignore[call-overload]
        return Finished(1, "", "no")

    assert not await Udevd(HostRoot(tmp_path), run=run).reload()
    assert ran == [["nsenter", f"--mount={tmp_path}/proc/1/ns/mnt", "--", "udevadm", "control", "--reload"]]
    assert not await Udevd(HostRoot("/"), run=run).reload()
    assert ran[1] == ["udevadm", "control", "--reload"]


# ---- drivers


def bind(host: HostRoot, interface: str, driver: str) -> Path:
    """Bind as the kernel shows it; returns the file that unbinds."""
    top = host.path(devices(host)[f"id-{interface.partition(':')[0]}"].usb.sysfs)
    place = host.path(f"/sys/bus/usb/drivers/{driver}")
    place.mkdir(parents=True, exist_ok=True)
    (place / "unbind").touch()
    (host.path("/sys/bus/usb") / "drivers_probe").touch()
    (top / interface / "driver").unlink(missing_ok=True)
    (top / interface / "driver").symlink_to(place)
    return place / "unbind"


async def test_raw_usb_takes_every_driver_away_and_gives_them_back(tmp_path: Path) -> None:
    scene = Scene(tmp_path, "stick")
    unbind = bind(scene.host, "2-1:1.0", "usb-storage")
    assert await scene.apply("id-2-1", give="usb") == []
    assert unbind.read_text() == "2-1:1.0"
    assert "NODEAGENT_DRIVERS" in scene.file
    (scene.host.path(scene.devices["id-2-1"].usb.sysfs) / "2-1:1.0/driver").unlink()
    assert await scene.apply() == []
    assert scene.host.path("/sys/bus/usb/drivers_probe").read_text() == "2-1:1.0"


async def test_a_driver_that_nobody_took_away_is_not_looked_for(tmp_path: Path) -> None:
    scene = Scene(tmp_path, "stick")
    bind(scene.host, "2-1:1.0", "usb-storage")
    (scene.host.path(scene.devices["id-2-1"].usb.sysfs) / "2-1:1.0/driver").unlink()
    await scene.apply("id-2-1")
    await scene.apply()
    assert scene.host.path("/sys/bus/usb/drivers_probe").read_text() == ""


async def test_a_driver_that_does_not_let_go_is_a_problem(tmp_path: Path) -> None:
    scene = Scene(tmp_path, "stick")
    unbind = bind(scene.host, "2-1:1.0", "usb-storage")
    unbind.unlink()
    unbind.mkdir()
    (problem,) = await scene.apply("id-2-1", give="usb")
    assert problem.reason is Reason.INTERNAL
    assert "usb-storage keeps 2-1:1.0" in problem.message
    assert problem.hint == "echo 2-1:1.0 > /sys/bus/usb/drivers/usb-storage/unbind"
