"""Leases: generations, one resource per id, uids that rest, and a file that survives everything."""

from __future__ import annotations

import asyncio
import json
import os
import random
import sqlite3
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from nodeagent.config import SeatsConfig
from nodeagent.devices.database import KEPT_ASIDE
from nodeagent.devices.leases import SCHEMA, Leases
from nodeagent.devices.uids import UidRange, check_uid_range, take_subuid
from nodeagent.errors import AgentError, ConfigError, Reason
from nodeagent.model import PodRef

SEATS = SeatsConfig(uid_base=200_000, uid_count=16)
PRINTER, KEY = "opencdi.io/printer", "opencdi.io/ukey"
ALICE = PodRef("default", "alice", "uid-alice")
BOB = PodRef("default", "bob", "uid-bob")


@pytest.fixture
async def leases(tmp_path: Path) -> AsyncIterator[Leases]:
    async with Leases(tmp_path / "state.db", SEATS) as opened:
        yield opened


# ---- leases


async def test_allocate_bind_release(leases: Leases) -> None:
    made = await leases.allocate(PRINTER, ["b", "a"], "slot-ab", 10.0)
    assert [(x.device_id, x.resource, x.slot, x.created_s, x.pod) for x in made] == [
        ("a", PRINTER, "slot-ab", 10.0, None),
        ("b", PRINTER, "slot-ab", 10.0, None),
    ]
    bound = await leases.bind("slot-ab", ALICE, "desktop", "sandbox-1")
    assert {(x.pod, x.container, x.sandbox_id, x.generation) for x in bound} == {
        (ALICE, "desktop", "sandbox-1", made[0].generation)
    }
    assert leases.leases == bound == await leases.all()
    assert await leases.release("slot-ab") == bound
    assert leases.leases == () == await leases.all()


async def test_allocating_again_is_a_new_generation_held_by_nobody(leases: Leases) -> None:
    (first,) = await leases.allocate(PRINTER, ["a"], "slot-a", 1.0)
    await leases.bind("slot-a", ALICE, "desktop", "sandbox-1")
    (second,) = await leases.allocate(PRINTER, ["a"], "slot-a", 2.0)
    assert second.generation > first.generation
    assert (second.pod, second.container, second.sandbox_id) == (None, "", "")
    assert leases.leases == (second,)


async def test_a_generation_never_comes_back(leases: Leases) -> None:
    (first,) = await leases.allocate(PRINTER, ["a"], "slot-a", 1.0)
    await leases.release("slot-a")
    (second,) = await leases.allocate(PRINTER, ["a"], "slot-a", 2.0)
    assert second.generation != first.generation
    assert await leases.release("slot-a", only_if_generation=first.generation) == ()
    assert await leases.release_devices(["a"], only_if_generation=first.generation) == ()
    assert await leases.bind("slot-a", BOB, "x", "y", only_if_generation=first.generation) == ()
    assert leases.leases == (second,)
    assert await leases.release_devices(["a", "never"], only_if_generation=second.generation) == (second,)


async def test_an_id_moves_between_slots_of_one_resource(leases: Leases) -> None:
    await leases.allocate(PRINTER, ["a", "b"], "slot-ab", 1.0)
    await leases.allocate(PRINTER, ["a"], "slot-a", 2.0)
    assert [(x.device_id, x.slot) for x in leases.leases] == [("a", "slot-a"), ("b", "slot-ab")]


async def test_another_resource_refuses_and_changes_nothing(leases: Leases) -> None:
    await leases.allocate(KEY, ["b"], "slot-b", 1.0)
    await leases.bind("slot-b", ALICE, "desktop", "sandbox-1")
    before = await leases.all()
    for attempt in (leases.allocate, leases.adopt):
        with pytest.raises(AgentError, match=r"b is held as opencdi.io/ukey by pod default/alice") as refused:
            await attempt(PRINTER, ["a", "b"], "slot-ab", 2.0)
        assert refused.value.reason is Reason.LEASED_UNDER_OTHER_RESOURCE
        assert await leases.all() == before == leases.leases


async def test_adopt_adds_what_is_missing_and_keeps_what_is_there(leases: Leases) -> None:
    (kept,) = await leases.allocate(PRINTER, ["a"], "slot-ab", 1.0)
    await leases.bind("slot-ab", ALICE, "desktop", "sandbox-1")
    adopted = await leases.adopt(PRINTER, ["a", "b"], "slot-ab", 5.0)
    assert [(x.device_id, x.generation == kept.generation, x.pod) for x in adopted] == [
        ("a", True, ALICE),
        ("b", False, None),
    ]
    assert await leases.adopt(PRINTER, ["a", "b"], "slot-ab", 6.0) == adopted == leases.leases


async def test_leases_and_uids_are_there_after_a_restart(tmp_path: Path) -> None:
    async with Leases(tmp_path / "state.db", SEATS) as first:
        await first.allocate(PRINTER, ["a"], "slot-a", 1.0)
        await first.bind("slot-a", ALICE, "desktop", "sandbox-1")
        uid = await first.seat_uid("alice", 1.0)
        before = first.leases
    async with Leases(tmp_path / "state.db", SEATS) as second:
        assert not second.recovered
        assert second.leases == before == await second.all()
        assert second.uids == {"alice": uid}
        (later,) = await second.allocate(PRINTER, ["a"], "slot-a", 2.0)
        assert later.generation > before[0].generation


async def test_what_is_read_is_always_one_whole_state(leases: Leases) -> None:
    """Readers of the copy see all ids of an Allocate or none, with one generation."""
    stop = asyncio.Event()

    async def read() -> int:
        seen = 0
        while not stop.is_set():
            found = leases.leases
            assert len(found) in (0, 2)
            assert len({x.generation for x in found}) <= 1
            seen += 1
            await asyncio.sleep(0)
        return seen

    reader = asyncio.create_task(read())
    for n in range(20):
        await leases.allocate(PRINTER, ["a", "b"], f"slot-{n}", float(n))
        await leases.release(f"slot-{n}")
    stop.set()
    assert await reader > 0


async def test_the_copy_is_renewed_although_the_caller_left(leases: Leases) -> None:
    asking = asyncio.create_task(leases.allocate(PRINTER, ["a"], "slot-a", 1.0))
    await asyncio.sleep(0)
    asking.cancel()
    await asyncio.wait({asking})
    everything = await leases.all()
    assert leases.leases == everything


# ---- uids


async def test_a_live_seat_keeps_its_uid_and_shares_it_with_nobody(leases: Leases) -> None:
    uids = [await leases.seat_uid(f"seat-{n}", 0.0) for n in range(16)]
    assert sorted(uids) == list(range(200_000, 200_016))
    assert await leases.seat_uid("seat-3", 99_999.0) == uids[3]
    with pytest.raises(AgentError, match="no uid is free") as full:
        await leases.seat_uid("one more", 1.0)
    assert full.value.reason is Reason.TOO_MANY
    assert "one more" not in leases.uids


async def test_a_uid_rests_for_an_hour(leases: Leases) -> None:
    first = await leases.seat_uid("first", 0.0)
    await leases.free_uid("first", 100.0)
    assert leases.uids == {}
    assert await leases.seat_uid("second", 3699.0) != first
    assert await leases.seat_uid("third", 3700.0) == first


async def test_a_smaller_range_moves_seats_that_are_outside(tmp_path: Path) -> None:
    async with Leases(tmp_path / "state.db", SeatsConfig(uid_base=200_000, uid_count=20)) as wide:
        for n in range(18):
            await wide.seat_uid(f"seat-{n}", 0.0)
        await wide.free_uid("seat-0", 0.0)
        await wide.free_uid("seat-1", 0.0)
    async with Leases(tmp_path / "state.db", SEATS) as narrow:
        assert set(narrow.uids) == {f"seat-{n}" for n in range(2, 16)}
        assert await narrow.seat_uid("seat-17", 4000.0) == 200_000


def test_subuid_lines() -> None:
    text = "alice:100000:65536\n\n# comment\nbob:x:1\n1001:165536:65536\nroot:1:2:3\ncarol:999999999999:1\n"
    assert take_subuid(text) == (UidRange("alice", 100_000, 65_536), UidRange("1001", 165_536, 65_536))


@pytest.mark.parametrize(
    ("first", "count", "clash"),
    [
        (100_000, 65_536, False),
        (199_990, 11, True),
        (199_990, 10, False),
        (200_015, 1, True),
        (200_016, 5, False),
        (200_003, 0, False),
    ],
)
def test_a_uid_range_that_is_lent_to_others_is_refused(first: int, count: int, clash: bool) -> None:
    lent = (UidRange("kubelet", first, count),)
    if not clash:
        return check_uid_range(SEATS, lent)
    with pytest.raises(ConfigError, match=r"seats.uid_base: 200000 to 200015 overlaps .* lends to kubelet"):
        check_uid_range(SEATS, lent)
    return None


# ---- damage


async def filled(path: Path) -> None:
    async with Leases(path, SEATS) as leases:
        for n in range(200):
            await leases.allocate(PRINTER, [f"device-{n}"], f"slot-{n}", float(n))


def _truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def _empty(path: Path) -> None:
    path.write_bytes(b"")


def _garbage(path: Path) -> None:
    path.write_bytes(random.Random(1).randbytes(9000))


def _scribble(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[4096:] = random.Random(1).randbytes(len(data) - 4096)
    path.write_bytes(data)


def _foreign(path: Path) -> None:
    path.unlink()
    with sqlite3.connect(path) as other:
        other.execute("CREATE TABLE stamps (id INTEGER)")
    other.close()


def _fewer_tables(path: Path) -> None:
    with sqlite3.connect(path) as ours:
        ours.execute("DROP TABLE seat_uids")
    ours.close()


@pytest.mark.parametrize("damage", [_truncate, _empty, _garbage, _scribble, _foreign, _fewer_tables])
async def test_a_damaged_database_is_kept_aside_and_work_goes_on(tmp_path: Path, damage: object) -> None:
    path = tmp_path / "state.db"
    await filled(path)
    damage(path)  # type: ignore[operator]
    damaged = path.read_bytes()
    async with Leases(path, SEATS) as leases:
        assert leases.recovered
        assert leases.leases == ()
        await leases.allocate(PRINTER, ["a"], "slot-a", 1.0)
        assert leases.aside is not None
        assert leases.aside.name.startswith("state.db.damaged-2")
        assert leases.aside.read_bytes() == damaged
    async with Leases(path, SEATS) as again:
        assert not again.recovered
        assert len(again.leases) == 1


async def test_only_the_last_damaged_files_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "state.db"
    for _ in range(KEPT_ASIDE + 2):
        path.write_bytes(b"no database")
        async with Leases(path, SEATS) as leases:
            assert leases.recovered
    assert len(list(tmp_path.glob("state.db.damaged-*"))) == KEPT_ASIDE


async def test_a_newer_database_is_refused_and_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "state.db"
    await filled(path)
    with sqlite3.connect(path) as newer:
        newer.execute(f"PRAGMA user_version = {SCHEMA.version + 1}")
    newer.close()
    before = path.read_bytes()
    with pytest.raises(
        AgentError, match=r"has format 3, this version of nodeagent knows 2 .*run the newer version"
    ) as refused:
        async with Leases(path, SEATS):
            pass
    assert refused.value.reason is Reason.STATE_INVALID
    assert path.read_bytes() == before


async def test_a_disk_that_refuses_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(AgentError, match="cannot be used") as refused:
        async with Leases(tmp_path / "file" / "state.db", SEATS):
            pass
    assert refused.value.reason is Reason.STATE_INVALID


async def test_a_full_disk_refuses_one_change_and_loses_nothing(tmp_path: Path) -> None:
    async with Leases(tmp_path / "state.db", SEATS) as leases:
        kept = await leases.allocate(PRINTER, ["a"], "slot-a", 1.0)
        (pages,) = await leases._in_thread(lambda: leases._db.execute("PRAGMA page_count").fetchone())
        await leases._in_thread(lambda: leases._db.execute(f"PRAGMA max_page_count = {pages}"))
        with pytest.raises(AgentError, match="database or disk is full"):
            await leases.allocate(PRINTER, [f"device-{n:05}" for n in range(500)], "slot-x", 2.0)
        assert leases.leases == kept == await leases.all()
        await leases.bind("slot-a", ALICE, "desktop", "sandbox-1")


WRITER = """
import asyncio, json, sys
from pathlib import Path
from nodeagent.config import SeatsConfig
from nodeagent.devices.leases import Leases
from nodeagent.model import PodRef

async def main():
    async with Leases(Path(sys.argv[1]), SeatsConfig(uid_base=200_000, uid_count=16)) as leases:
        print(json.dumps({"recovered": leases.recovered}), flush=True)
        for n in range(10**9):
            pair = n % 3
            made = await leases.allocate("opencdi.io/printer", [f"{pair}-a", f"{pair}-b"], f"slot-{pair}", float(n))
            print(json.dumps({"pair": pair, "generation": made[0].generation, "bound": False}), flush=True)
            await leases.bind(f"slot-{pair}", PodRef("default", "pod", f"uid-{n}"), "desktop", "sandbox")
            print(json.dumps({"pair": pair, "generation": made[0].generation, "bound": True}), flush=True)

asyncio.run(main())
"""


async def test_kill_9_at_any_point_loses_nothing_that_was_answered(tmp_path: Path) -> None:
    path = tmp_path / "state.db"
    chance = random.Random(20261121)
    newest: dict[int, tuple[int, bool]] = {}
    for _ in range(20):
        writer = await asyncio.create_subprocess_exec(
            sys.executable, "-c", WRITER, str(path), stdout=subprocess.PIPE, cwd=Path(__file__).parents[2]
        )
        assert writer.stdout is not None
        assert json.loads(await writer.stdout.readline()) == {"recovered": False}
        wanted = chance.randrange(1, 60)
        for _ in range(wanted):
            said = json.loads(await writer.stdout.readline())
            newest[said["pair"]] = (said["generation"], said["bound"])
        writer.kill()
        for line in (await writer.stdout.read()).splitlines(keepends=True):
            if line.endswith(b"\n"):
                said = json.loads(line)
                newest[said["pair"]] = (said["generation"], said["bound"])
        await writer.wait()
        async with Leases(path, SEATS) as leases:
            assert not leases.recovered
            for pair, (generation, bound) in newest.items():
                held = [x for x in leases.leases if x.device_id.startswith(f"{pair}-")]
                assert len(held) == 2
                assert len({(x.generation, x.pod) for x in held}) == 1, "both ids of an Allocate or none"
                assert held[0].generation >= generation
                if held[0].generation == generation and bound:
                    assert held[0].pod is not None
            assert len({x.generation for x in leases.leases}) == len(leases.leases) // 2
    assert len(newest) == 3


# ---- clean-ups


def due(leases: Leases) -> list[tuple[str, int, str, str]]:
    return [(x.device_id, x.generation, x.resource, x.pod_uid) for x in leases.clean_ups]


async def test_the_end_of_a_lease_that_a_container_had_leaves_one_clean_up(leases: Leases) -> None:
    (first,) = await leases.allocate(PRINTER, ["a"], "slot-a", 1.0)
    await leases.bind("slot-a", ALICE, "desktop", "sandbox-1")
    await leases.allocate(PRINTER, ["a"], "slot-a", 2.0)
    assert due(leases) == [("a", first.generation, PRINTER, ALICE.uid)], "the next Allocate ends it as well"
    (third,) = await leases.bind("slot-a", BOB, "desktop", "sandbox-2")
    await leases.release("slot-a")
    assert due(leases)[1:] == [("a", third.generation, PRINTER, BOB.uid)]
    await leases.cleaned(leases.clean_ups[:1])
    assert [x.pod_uid for x in leases.clean_ups] == [BOB.uid]


async def test_what_nobody_had_leaves_none(leases: Leases) -> None:
    await leases.allocate(PRINTER, ["a", "b"], "slot-a", 1.0)
    await leases.release("slot-a")
    await leases.allocate(PRINTER, ["a"], "slot-a", 2.0)
    await leases.bind("slot-a", ALICE, "", "sandbox-1")  # a refused pod
    await leases.release("slot-a")
    assert due(leases) == []


async def test_clean_ups_are_there_after_a_restart(tmp_path: Path) -> None:
    async with Leases(tmp_path / "state.db", SEATS) as leases:
        await leases.allocate(PRINTER, ["a", "b"], "slot-a", 1.0)
        await leases.bind("slot-a", ALICE, "desktop", "sandbox-1")
        await leases.release_devices(["a"])
        before = leases.clean_ups
    async with Leases(tmp_path / "state.db", SEATS) as leases:
        assert leases.clean_ups == before
        assert [x.device_id for x in before] == ["a"]


async def test_a_database_of_the_first_format_becomes_one_of_this(tmp_path: Path) -> None:
    path = tmp_path / "state.db"
    await filled(path)
    with sqlite3.connect(path) as old:
        old.execute("DROP TABLE clean_ups")
        old.execute("PRAGMA user_version = 1")
    old.close()
    async with Leases(path, SEATS) as leases:
        assert leases.leases
        assert not leases.recovered
        await leases.release(leases.leases[0].slot)
    async with Leases(path, SEATS) as leases:
        assert not leases.recovered


async def test_a_format_that_never_was_is_kept_aside(tmp_path: Path) -> None:
    path = tmp_path / "state.db"
    await filled(path)
    with sqlite3.connect(path) as old:
        old.execute("PRAGMA user_version = 0")
    old.close()
    async with Leases(path, SEATS) as leases:
        assert leases.recovered
