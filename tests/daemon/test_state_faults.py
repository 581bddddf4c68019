"""The state database cut off anywhere, gone, or of a later version, under a whole daemon with a desktop that runs on."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from nodeagent.config import SeatsConfig
from nodeagent.demo.endpoints import Endpoint
from nodeagent.devices.leases import SCHEMA, Leases
from nodeagent.errors import AgentError, Reason
from nodeagent.model import SeatState
from nodeagent.wire.pb.deviceplugin.v1beta1 import api_pb2 as pb
from tests.daemon.house import PRINTER, House, eventually, pod

pytestmark = pytest.mark.root
SEATS = SeatsConfig(uid_base=200_000, uid_count=16)

LENGTHS: dict[str, Callable[[int], int]] = {
    "nothing": lambda size: 0,
    "one byte": lambda size: 1,
    "within the magic": lambda size: 15,
    "the magic": lambda size: 16,
    "within the header": lambda size: 64,
    "the header": lambda size: 100,
    "a page less one": lambda size: 4095,
    "one page": lambda size: 4096,
    "two pages": lambda size: 8192,
    "half": lambda size: size // 2,
    "all pages but one": lambda size: size - 4096,
    "within the last page": lambda size: size - 100,
    "all but one byte": lambda size: size - 1,
}


@pytest.fixture
async def house(short_tmp: Path) -> AsyncIterator[House]:
    made = House(short_tmp)
    async with made.kubelet, made.cri:
        yield made


@pytest.mark.parametrize("length", LENGTHS.values(), ids=LENGTHS)
async def test_a_file_cut_off_anywhere_is_kept_aside(tmp_path: Path, length: Callable[[int], int]) -> None:
    path = tmp_path / "state.db"
    async with Leases(path, SEATS) as leases:
        for n in range(300):
            await leases.allocate(PRINTER, [f"printer-{n:040}"], f"slot-{n:040}", float(n))
    os.truncate(path, length(path.stat().st_size))
    cut = path.read_bytes()
    async with Leases(path, SEATS) as leases:
        assert leases.recovered
        assert leases.leases == ()
        assert leases.aside is not None
        assert leases.aside.read_bytes() == cut
        await leases.allocate(PRINTER, ["printer-a"], "slot-a", 1.0)
    async with Leases(path, SEATS) as again:
        assert [x.device_id for x in again.leases] == ["printer-a"]


@pytest.mark.parametrize("length", [lambda s: 0, lambda s: 31, lambda s: 32, lambda s: s // 2, lambda s: s - 1])
async def test_a_log_cut_off_anywhere_loses_the_last_changes_only(tmp_path: Path, length: Callable[[int], int]) -> None:
    """As a power cut leaves it on a disk that lied about fsync: the database is whole, its write-ahead log is not."""
    path, copy = tmp_path / "state.db", tmp_path / "copy"
    copy.mkdir()
    async with Leases(path, SEATS) as leases:
        for n in range(20):
            await leases.allocate(PRINTER, [f"printer-{n}"], f"slot-{n}", float(n))
        for part in ("", "-wal"):  # while it is open, since closing folds the log in
            (copy / f"state.db{part}").write_bytes(Path(f"{path}{part}").read_bytes())
    log = copy / "state.db-wal"
    os.truncate(log, length(log.stat().st_size))
    async with Leases(copy / "state.db", SEATS) as leases:
        assert not leases.recovered
        assert len(leases.leases) < 20
        assert {x.device_id for x in leases.leases} == {f"printer-{n}" for n in range(len(leases.leases))}


async def run_a_desktop(house: House) -> str:
    """One life of the daemon in which a desktop got its printer; returns the device's id."""
    async with house.life():
        await house.kubelet.until(lambda: len(house.kubelet.allocatable(PRINTER)) == 1)
        desk = pod("desk")
        await house.run(desk)
    (device,) = house.kubelet.held(desk, "desktop", PRINTER)
    return device


def state(house: House) -> list[Path]:
    return sorted((house.directory / "state").glob("state.db*"))


DAMAGE: dict[str, Callable[[Path], object]] = {
    "gone": Path.unlink,
    "empty": lambda p: os.truncate(p, 0),
    "header only": lambda p: os.truncate(p, 100),
    "half": lambda p: os.truncate(p, p.stat().st_size // 2),
    "nonsense": lambda p: p.write_bytes(b"\xff" * 20_000),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
async def test_a_desktop_keeps_its_seat_over_a_lost_database(house: House, damage: Callable[[Path], object]) -> None:
    device = await run_a_desktop(house)
    damage(house.directory / "state/state.db")
    async with house.life() as active:
        desk = house.kubelet.pods["uid-desk"]
        await eventually(lambda: house.seat(active, desk) is not None)
        await eventually(lambda: house.seat(active, desk).state is SeatState.LIVE)
        (lease,) = active.leases.leases
        assert (lease.device_id, lease.pod and lease.pod.name) == (device, "desk")
        aside = [p for p in state(house) if ".damaged-" in p.name]
        assert len(aside) == (0 if damage is Path.unlink else 1)
        if aside:
            (problem,) = [p for p in house.view.document("status").problems if "state.db" in p.message]
            assert aside[0].name in problem.message
        house.end(desk)
        await eventually(lambda: not active.leases.leases)


async def test_leases_are_there_before_the_kubelet_is_told_of_any_device(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a sibling of a held device would be offered for a moment, and that moment is when every pod of a node starts."""
    device = await run_a_desktop(house)
    for path in state(house):
        path.unlink()
    opened: list[Leases] = []
    enter = Leases.__aenter__

    async def note(self: Leases) -> Leases:
        opened.append(self)
        return await enter(self)

    monkeypatch.setattr(Leases, "__aenter__", note)
    told: list[list[tuple[str, str]]] = []
    on_devices = house.kubelet._on_devices

    def hear(endpoint: Endpoint, message: pb.ListAndWatchResponse) -> None:
        told.append([(x.device_id, x.resource) for x in opened[-1].leases])
        on_devices(endpoint, message)

    monkeypatch.setattr(house.kubelet, "_on_devices", hear)
    house.cri.gate.clear()  # the container runtime tells of no mounts yet: only the kubelet knows who holds what
    try:
        async with house.life():
            await eventually(lambda: told)
            assert told[0] == [(device, PRINTER)]
    finally:
        house.cri.gate.set()


async def test_a_database_of_a_later_version_is_refused_with_a_remedy_and_left_alone(house: House) -> None:
    await run_a_desktop(house)
    path = house.directory / "state/state.db"
    with sqlite3.connect(path) as newer:
        newer.execute(f"PRAGMA user_version = {SCHEMA.version + 1}")
        newer.execute("CREATE TABLE things_to_come (what TEXT)")
    newer.close()
    before = path.read_bytes()
    with pytest.raises(BaseExceptionGroup) as failed:
        async with house.life():
            pass
    refusals = failed.value.subgroup(AgentError)
    assert refusals is not None
    error: BaseException = refusals
    while isinstance(error, BaseExceptionGroup):
        (error,) = error.exceptions
    assert isinstance(error, AgentError)
    assert error.reason is Reason.STATE_INVALID
    assert f"has format {SCHEMA.version + 1}, this version of nodeagent knows {SCHEMA.version}" in error.message
    assert f"run the newer version, or move {path} away" in error.hint
    assert path.read_bytes() == before
    assert [p.name for p in state(house)] == ["state.db"]
    assert "uid-desk" in house.kubelet.pods, "the desktop runs on, without the daemon"
    path.rename(path.with_name("moved-away"))
    async with house.life() as active:
        await eventually(lambda: house.seat(active, pod("desk")) is not None)
