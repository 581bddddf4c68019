"""The main job against a whole daemon: a device of the node in the hands of the right desktop, and nobody else's."""

import asyncio
import os
import signal
from pathlib import Path

import pytest

from nodeagent.demo.pods import ContainerNotStarted, ContainerSpec
from nodeagent.model import SeatState
from tests.daemon.house import PRINTER, House, eventually, lp, pod

pytestmark = pytest.mark.root
TEXT = b"%!PS-Adobe-3.0\n/Helvetica findfont 12 scalefont setfont 72 700 moveto (hello) show showpage\n"


@pytest.fixture
async def house(short_tmp: Path):
    made = House(short_tmp)
    async with made.kubelet, made.cri:
        yield made


async def test_a_desktop_prints_and_everything_is_gone_after_it(house: House) -> None:
    async with house.life() as active:
        await house.kubelet.until(lambda: len(house.kubelet.allocatable(PRINTER)) == 1)
        desk = pod("desk")
        await house.run(desk)
        seat = house.seat(active, desk)
        assert seat.state is SeatState.LIVE
        assert house.env["desk", "desktop"]["CUPS_SERVER"] == "/run/opencdi/printer/ipp.sock"
        code, said = await lp(house.slot(desk), TEXT)
        assert code == 0, said
        await eventually(lambda: house.output().exists() and house.output().read_bytes() == TEXT)
        rows = house.view.document("seats").seats
        assert [(r.pod.name, r.state, r.devices[0].simulated) for r in rows] == [("desk", SeatState.LIVE, True)]
        house.end(desk)
        await eventually(lambda: not active.roster.seats and not active.leases.leases)
        assert not active.binding._slots.names()
        await eventually(lambda: house.value("seats", state="live") == 0)


async def test_a_daemon_that_comes_back_serves_the_running_desktop(house: House) -> None:
    async with house.life():
        await house.kubelet.until(lambda: len(house.kubelet.allocatable(PRINTER)) == 1)
        desk = pod("desk")
        await house.run(desk)
        before = house.slot(desk).stat().st_ino
    async with house.life() as active:
        assert house.slot(desk).stat().st_ino == before
        await eventually(lambda: house.seat(active, desk) is not None)
        code, said = await lp(house.slot(desk), TEXT)
        assert code == 0, said
        await eventually(lambda: house.output().exists() and house.output().read_bytes() == TEXT)
        assert len(active.leases.leases) == 1


async def test_start_up_never_drops_a_lease_whose_sandbox_lives(house: House) -> None:
    async with house.life():
        await house.kubelet.until(lambda: len(house.kubelet.allocatable(PRINTER)) == 1)
        desk = pod("desk")
        await house.run(desk)
    await house.kubelet.restart(api_away=True)  # PodResources lists nothing now
    async with house.life() as active:
        await active.comparison.compare()
        await active.comparison.compare()
        assert [x.pod.name for x in active.leases.leases if x.pod] == ["desk"]
        await eventually(lambda: house.seat(active, desk).state is SeatState.LIVE)


async def test_a_container_started_without_us_is_bound_by_comparison(house: House) -> None:
    async with house.life():
        await house.kubelet.until(lambda: len(house.kubelet.allocatable(PRINTER)) == 1)
        desk = pod("desk")
        house.sandbox(desk)
        await house.kubelet.admit(desk)
    await house.kubelet.restart()
    await house.kubelet.start_container(desk, "desktop")  # no plugin is registered: PreStartContainer is skipped
    assert ("desk", "desktop") in house.started
    async with house.life() as active:
        await eventually(lambda: house.seat(active, desk) is not None and house.seat(active, desk).live.is_set())
        code, said = await lp(house.slot(desk), TEXT)
        assert code == 0, said


async def test_labels_that_do_not_fit_get_no_seat(house: House) -> None:
    house.save(rules=[{"name": "nurses", "match": {"class": "printer"}, "to": {"labels": {"role": "nurse"}}}])
    async with house.life() as active:
        await house.kubelet.until(lambda: len(house.kubelet.allocatable(PRINTER)) == 1)
        wrong, right = pod("wrong", labels={"role": "visitor"}), pod("right", labels={"role": "nurse"})
        with pytest.raises(ContainerNotStarted, match="role=nurse"):
            await house.run(wrong)
        assert ("wrong", "desktop") not in house.started and not active.roster.seats
        assert house.value("denied_total", reason="labels_do_not_match") == 1
        row = house.view.document("seats").seats[0]
        assert (row.pod.name, row.state) == ("wrong", SeatState.REQUESTED)
        house.end(wrong)
        await house.run(right)  # Allocate of the same id, right after
        assert house.seat(active, right).state is SeatState.LIVE


async def test_an_id_handed_to_the_next_pod_closes_the_old_seat_first(house: House) -> None:
    async with house.life() as active:
        await house.kubelet.until(lambda: len(house.kubelet.allocatable(PRINTER)) == 1)
        first, second = pod("first"), pod("second")
        await house.run(first)
        old = house.slot(first)
        kept = os.open(old, os.O_PATH)  # as the old container's mount keeps it
        try:
            house.kubelet.delete(first)  # its sandbox is still there: 0.1 s after deletion
            await house.run(second)
            assert house.seat(active, first) is None
            assert house.seat(active, second).state is SeatState.LIVE
            assert not os.listdir(f"/proc/self/fd/{kept}")
        finally:
            os.close(kept)
        code, said = await lp(house.slot(second), TEXT)
        assert code == 0, said


async def test_a_crashed_worker_is_replaced_and_the_desktop_prints_again(house: House) -> None:
    async with house.life() as active:
        await house.kubelet.until(lambda: len(house.kubelet.allocatable(PRINTER)) == 1)
        desk = pod("desk")
        await house.run(desk)
        seat = house.seat(active, desk)
        first = seat.worker_pid
        os.kill(first, signal.SIGKILL)
        code, said = await lp(house.slot(desk), TEXT)
        assert code == 0, said
        assert seat.worker_pid not in (0, first)
        assert house.value("seat_worker_restarts_total", reason="exit") == 1


async def test_init_container_app_container_and_restart_share_the_seat(house: House) -> None:
    async with house.life() as active:
        await house.kubelet.until(lambda: len(house.kubelet.allocatable(PRINTER)) == 1)
        containers = (
            ContainerSpec(name="setup", limits={PRINTER: 1}, init=True),
            ContainerSpec(name="desktop", limits={PRINTER: 1}),
        )
        desk = pod("desk", containers=containers)
        await house.run(desk)
        assert house.started == [("desk", "setup"), ("desk", "desktop")]
        seat = house.seat(active, desk)
        inode = house.slot(desk).stat().st_ino
        await house.kubelet.start_container(desk, "desktop")  # it crashed and is started again
        assert house.seat(active, desk) is seat and house.slot(desk).stat().st_ino == inode
        assert (await lp(house.slot(desk), TEXT))[0] == 0


async def test_a_device_for_an_init_container_alone_is_refused_with_the_reason(house: House) -> None:
    async with house.life():
        await house.kubelet.until(lambda: len(house.kubelet.allocatable(PRINTER)) == 1)
        containers = (
            ContainerSpec(name="setup", limits={PRINTER: 1}, init=True),
            ContainerSpec(name="desktop"),
        )
        with pytest.raises(ContainerNotStarted, match="init container alone"):
            await house.run(pod("desk", containers=containers))


async def test_two_resources_in_one_container_are_one_seat(house: House) -> None:
    house.save(
        rules=[
            {"name": "a", "match": {"serial": "P1"}, "resource": "printer-a"},
            {"name": "b", "match": {"serial": "P2"}, "resource": "printer-b"},
        ],
        simulated=[{"model": "printer", "serial": "P1"}, {"model": "printer", "serial": "P2"}],
    )
    a, b = "opencdi.io/printer-a", "opencdi.io/printer-b"
    async with house.life() as active:
        await house.kubelet.until(lambda: all(len(house.kubelet.allocatable(r)) == 1 for r in (a, b)))
        desk = pod("desk", containers=(ContainerSpec(name="desktop", limits={a: 1, b: 1}),))
        await house.run(desk)
        assert len(active.roster.seats) == 1
        seat = house.seat(active, desk)
        assert len(seat.slots) == 2 and len(seat.device_ids) == 2
        for device in seat.device_ids:
            # each socket serves both printers, since of two CUPS_SERVERs the kubelet keeps one
            code, said = await lp(house.slot(desk, resource=a), TEXT, printer=device)
            assert code == 0, said
        await eventually(lambda: all(house.output(s).exists() for s in ("P1", "P2")))


async def test_a_bad_reload_keeps_the_old_configuration(house: House) -> None:
    async with house.life() as active:
        await house.kubelet.until(lambda: len(house.kubelet.allocatable(PRINTER)) == 1)
        house.config_path.write_text("devices: {rules: [{name: x, match: {clas: printer}}]}")
        house.source.ask()
        await eventually(lambda: house.value("config_reloads_total", result="rejected") == 1)
        assert "devices.rules[0].match.clas: unknown key" in house.view.document("status").config.last_error
        assert PRINTER in active.binding.resources
        house.save(simulated=[{"model": "printer", "serial": "P1"}, {"model": "printer", "serial": "P2"}])
        house.source.ask()
        await house.kubelet.until(lambda: len(house.kubelet.allocatable(PRINTER)) == 2)
        assert house.view.document("status").config.last_error == ""


async def test_two_hundred_prestarts_at_once(house: House) -> None:
    pods = 40
    house.save(simulated=[{"model": "printer", "serial": f"P{n}"} for n in range(pods)])
    async with house.life() as active:
        await house.kubelet.until(lambda: len(house.kubelet.allocatable(PRINTER)) == pods)
        desks = [pod(f"desk-{n}") for n in range(pods)]
        for desk in desks:
            house.sandbox(desk)
            await house.kubelet.admit(desk)
        lists = house.kubelet.lists
        await asyncio.gather(*(house.kubelet.pre_start(desk, "desktop") for desk in desks for _ in range(5)))
        assert house.kubelet.lists - lists < 40, "200 calls share their Lists; the kubelet allows 100 a second"
        assert {s.pod.name for s in active.roster.seats.values()} == {d.name for d in desks}
        assert all(s.state is SeatState.LIVE for s in active.roster.seats.values())
        pids = {s.worker_pid for s in active.roster.seats.values()}
        uids = {s.uid for s in active.roster.seats.values()}
        assert len(pids) == len(uids) == pods
