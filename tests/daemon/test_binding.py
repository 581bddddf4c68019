"""Corners of binding: directories that are not the slot, pods that come back, what the kubelet forgets."""

import shutil
from pathlib import Path

import pytest

from nodeagent.demo.pods import ContainerNotStarted, PodSpec
from nodeagent.errors import AgentError, Reason
from nodeagent.model import SeatState
from tests.daemon.house import PRINTER, House, eventually, pod

pytestmark = pytest.mark.root


@pytest.fixture
async def house(short_tmp: Path):
    made = House(short_tmp)
    async with made.kubelet, made.cri:
        yield made


def has_mounted(house: House, desk: PodSpec, root: str, pid: int = 77) -> None:
    """The container's process shows `root` mounted where the slot belongs."""
    house.cri.sandboxes[-1].runtime_handler = "runc"
    container = house.cri.containers[-1]
    house.cri.info[container.id] = f'{{"pid": {pid}}}'
    process = house.host / "proc" / str(pid)
    process.mkdir(parents=True, exist_ok=True)
    (process / "mountinfo").write_text(f"9 8 0:24 {root} /run/opencdi/printer ro - tmpfs tmpfs rw\n")


async def started_without_the_daemon(house: House, desk: PodSpec) -> None:
    """A container that was allocated a device and then restarted while no plugin was there to be asked."""
    async with house.life():
        await house.kubelet.until(lambda: len(house.kubelet.allocatable(PRINTER)) == 1)
        house.sandbox(desk)
        await house.kubelet.admit(desk)
    await house.kubelet.restart()
    await house.kubelet.start_container(desk, "desktop")


@pytest.mark.parametrize("restart", [False, True])
async def test_a_container_on_a_dead_directory_is_reported_and_restarted_if_allowed(
    house: House, restart: bool
) -> None:
    house.save(stale_slot="restart" if restart else "report")
    desk = pod("desk")
    await started_without_the_daemon(house, desk)
    has_mounted(house, desk, f"/nodeagent/slots/{house.slot(desk).name}//deleted")
    events: list[tuple[str, str]] = []
    async with house.life() as active:
        active.comparison._report = type("R", (), {"pod_event": lambda _, p, r, m, **k: events.append((p.name, m))})()
        active.comparison._judged.clear()
        await eventually(lambda: events)
        await active.comparison.compare()
        assert [e[0] for e in events] == ["desk"], "one Event, however often it is seen"
        assert "started without its devices" in events[0][1]
        assert house.value("denied_total", reason="stale_slot") >= 1
        assert [s[0] for s in house.cri.stopped] == ([house.cri.containers[-1].id] if restart else [])
        assert house.seat(active, desk) is None


async def test_after_a_reboot_the_directory_that_the_runtime_made_becomes_the_slot(house: House) -> None:
    desk = pod("desk")
    await started_without_the_daemon(house, desk)
    slot = house.slot(desk)
    shutil.rmtree(house.directory / "run")  # a tmpfs; the lease is on disk
    slot.mkdir(parents=True)  # containerd, for the missing host path
    has_mounted(house, desk, f"/nodeagent/slots/{slot.name}")
    inode = slot.stat().st_ino
    async with house.life() as active:
        await eventually(lambda: house.seat(active, desk) is not None and house.seat(active, desk).live.is_set())
        assert slot.stat().st_ino == inode
        assert {p.name for p in slot.iterdir()} == {"ipp.sock", "slot.json"}


async def test_a_directory_that_two_pods_mounted_serves_neither_without_a_fresh_start(house: House) -> None:
    first, second = pod("first"), pod("second")
    await started_without_the_daemon(house, first)
    shutil.rmtree(house.directory / "run")
    house.slot(first).mkdir(parents=True)
    has_mounted(house, first, f"/nodeagent/slots/{house.slot(first).name}", pid=77)
    house.sandbox(second)
    house.cri.add_container("c-second", "sandbox-second", house.mounts["first", "desktop"], pid=78)
    has_mounted(house, second, f"/nodeagent/slots/{house.slot(first).name}", pid=78)
    async with house.life() as active:
        await eventually(lambda: house.value("denied_total", reason="stale_slot") == 2)
        assert not active.roster.seats


async def test_a_lost_state_database_is_learned_anew(house: House) -> None:
    desk = pod("desk")
    async with house.life():
        await house.kubelet.until(lambda: len(house.kubelet.allocatable(PRINTER)) == 1)
        await house.run(desk)
    for path in (house.directory / "state").glob("state.db*"):
        path.unlink()
    async with house.life() as active:
        await eventually(lambda: house.seat(active, desk) is not None)
        assert [x.pod.name for x in active.leases.leases if x.pod] == ["desk"]


async def test_directories_of_nobody_are_cleared(house: House) -> None:
    async with house.life():
        pass
    stray = house.directory / "run/slots/abcdef"
    stray.mkdir()
    async with house.life():
        await eventually(lambda: not stray.exists())


async def test_a_refused_pod_is_counted_once_and_let_in_when_the_rule_changes(house: House) -> None:
    to = {"namespaces": ["elsewhere"]}
    house.save(rules=[{"name": "printers", "match": {"class": "printer"}, "to": to}])
    desk = pod("desk")
    async with house.life() as active:
        await house.kubelet.until(lambda: len(house.kubelet.allocatable(PRINTER)) == 1)
        for _ in range(3):
            with pytest.raises(ContainerNotStarted, match="namespace default"):
                await house.kubelet.start_container(
                    desk, "desktop"
                ) if desk.uid in house.kubelet.pods else await house.run(desk)
        assert house.value("denied_total", reason="namespace_not_allowed") == 1
        assert house.value("refused_holding_seconds", resource=PRINTER) > 0
        assert house.view.document("status").problems[0].reason == "namespace_not_allowed"
        house.save(rules=[{"name": "printers", "match": {"class": "printer"}}])
        await house.source.reload()
        await house.kubelet.start_container(desk, "desktop")
        assert house.seat(active, desk).state is SeatState.LIVE
        assert house.value("refused_holding_seconds", resource=PRINTER) == 0


async def test_a_refused_pod_is_not_served_after_a_restart_of_the_daemon(house: House) -> None:
    house.save(rules=[{"name": "printers", "match": {"class": "printer"}, "to": {"labels": {"role": "nurse"}}}])
    desk = pod("desk")
    async with house.life():
        await house.kubelet.until(lambda: len(house.kubelet.allocatable(PRINTER)) == 1)
        with pytest.raises(ContainerNotStarted):
            await house.run(desk)
    async with house.life() as active:
        await active.comparison.compare()
        assert not active.roster.seats
        house.end(desk)
        await eventually(lambda: not active.leases.leases)


async def test_the_runtime_being_away_changes_nothing(house: House) -> None:
    desk = pod("desk")
    async with house.life() as active:
        await house.kubelet.until(lambda: len(house.kubelet.allocatable(PRINTER)) == 1)
        await house.run(desk)
        assert house.cri._server is not None
        await house.cri._server.stop(None)
        await eventually(lambda: active.comparison.cri_error)
        assert house.seat(active, desk).state is SeatState.LIVE
        assert house.view.document("status").cri.state == "unreachable"
        other = pod("other")
        with pytest.raises(Exception, match="Insufficient"):
            await house.kubelet.admit(other)


async def test_an_unplugged_printer_that_is_held_stays_listed_and_comes_back(house: House) -> None:
    desk = pod("desk")
    async with house.life() as active:
        await house.kubelet.until(lambda: len(house.kubelet.allocatable(PRINTER)) == 1)
        await house.run(desk)
        (device,) = house.seat(active, desk).device_ids
        house.save(simulated=[])
        await house.source.reload()
        await house.kubelet.until(lambda: not house.kubelet.allocatable(PRINTER))
        offer = active.binding.resources[PRINTER].offers[device]
        assert offer.health == "Unhealthy"
        house.save(simulated=[{"model": "printer", "serial": "P1"}])
        await house.source.reload()
        await house.kubelet.until(lambda: house.kubelet.allocatable(PRINTER) == {device})
        house.save(simulated=[])
        await house.source.reload()
        house.end(desk)
        await eventually(lambda: not active.binding.resources[PRINTER].offers)


async def test_a_pod_that_came_while_the_runtime_was_being_asked_is_not_taken_for_dead(house: House) -> None:
    desk = pod("desk")
    async with house.life() as active:
        await house.kubelet.until(lambda: len(house.kubelet.allocatable(PRINTER)) == 1)
        before = await active.comparison._cri.fresh()
        asked_at = active.comparison._clock()
        await house.run(desk)
        await active.comparison._release_dead(before, {s.pod.uid for s in before.sandboxes}, asked_at)
        assert [x.pod.name for x in active.leases.leases if x.pod] == ["desk"]
        assert house.seat(active, desk).state is SeatState.LIVE


async def test_one_desktop_that_cannot_have_a_seat_takes_nobody_with_it(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    house.save(simulated=[{"model": "printer", "serial": s} for s in ("P1", "P2", "P3")])
    unlucky, other, third = pod("unlucky"), pod("other"), pod("third")
    async with house.life() as active:
        await house.kubelet.until(lambda: len(house.kubelet.allocatable(PRINTER)) == 3)
        await house.run(other)
        seat_uid = active.leases.seat_uid

        async def none_left(seat: str, now_s: float) -> int:
            if seat == unlucky.uid:
                raise AgentError(Reason.TOO_MANY, "no uid is free")
            return await seat_uid(seat, now_s)

        monkeypatch.setattr(active.leases, "seat_uid", none_left)
        for desk in (unlucky, third):
            house.sandbox(desk)
            await house.kubelet.admit(desk)
        house.kubelet.endpoints[PRINTER].options = None  # a kubelet that was restarted starts containers without asking
        for desk in (unlucky, third):
            await house.kubelet.start_container(desk, "desktop")
        await eventually(lambda: house.seat(active, third) is not None)
        await active.comparison.compare()
        assert house.value("denied_total", reason="too_many") == 1, "said once, tried again every time"
        assert house.seat(active, other).state is SeatState.LIVE
        monkeypatch.undo()
        await eventually(lambda: house.seat(active, unlucky) is not None)


async def test_a_seat_that_cannot_be_cleared_away_takes_nobody_with_it(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    house.save(simulated=[{"model": "printer", "serial": s} for s in ("P1", "P2")])
    desk, other = pod("desk"), pod("other")
    async with house.life() as active:
        await house.kubelet.until(lambda: len(house.kubelet.allocatable(PRINTER)) == 2)
        await house.run(desk)
        await house.run(other)
        cgroup = house.seat(active, desk).cgroup
        destroy = cgroup.destroy

        async def undead() -> None:
            await destroy()
            raise AgentError(Reason.INTERNAL, "a process in it does not die")

        monkeypatch.setattr(cgroup, "destroy", undead)
        house.end(desk)
        await eventually(lambda: house.seat(active, desk) is None and not active.roster._endings)
        await active.comparison.compare()
        assert house.seat(active, other).state is SeatState.LIVE
        assert desk.uid in active.leases.uids, "the uid of a process that may live is given to nobody"


async def test_a_refused_pod_that_is_still_ending_does_not_take_the_lease_of_the_next_one(house: House) -> None:
    house.save(rules=[{"name": "printers", "match": {"class": "printer"}, "to": {"labels": {"role": "nurse"}}}])
    refused, nurse = pod("refused"), pod("nurse", labels={"role": "nurse"})
    async with house.life() as active:
        await house.kubelet.until(lambda: len(house.kubelet.allocatable(PRINTER)) == 1)
        house.sandbox(refused)
        await house.kubelet.admit(refused)
        asked, house.kubelet.endpoints[PRINTER].options = house.kubelet.endpoints[PRINTER].options, None
        await house.kubelet.start_container(refused, "desktop")
        await eventually(lambda: house.value("denied_total", reason="labels_do_not_match") == 1)
        house.kubelet.endpoints[PRINTER].options = asked
        house.kubelet.delete(refused)  # the kubelet hands its device on, while its container takes its time to end
        await house.run(nurse)
        await active.comparison.compare()
        house.end(refused)
        await active.comparison.compare()
        assert [x.pod.name for x in active.leases.leases if x.pod] == ["nurse"]
        assert house.seat(active, nurse).state is SeatState.LIVE
        assert house.value("refused_holding_seconds", resource=PRINTER) == 0


async def test_a_seat_is_of_its_sandbox_after_a_restart_too(house: House) -> None:
    desk = pod("desk")
    async with house.life() as active:
        await house.kubelet.until(lambda: len(house.kubelet.allocatable(PRINTER)) == 1)
        await house.run(desk)
        assert house.seat(active, desk).kind == "gvisor"
    async with house.life() as active:
        await eventually(lambda: house.seat(active, desk).kind == "gvisor")


async def test_a_bound_seat_survives_a_stricter_rule_and_a_restart(house: House) -> None:
    desk = pod("desk")
    async with house.life() as active:
        await house.kubelet.until(lambda: len(house.kubelet.allocatable(PRINTER)) == 1)
        await house.run(desk)
        house.save(rules=[{"name": "p", "match": {"class": "printer"}, "to": {"namespaces": ["elsewhere"]}}])
        await house.source.reload()
        with pytest.raises(ContainerNotStarted, match="namespace default"):
            await house.kubelet.start_container(desk, "desktop")
        assert [x.container for x in active.leases.leases] == ["desktop"]
    async with house.life() as active:
        await active.comparison.compare()
        assert house.seat(active, desk) is not None
