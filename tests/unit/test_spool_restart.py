"""What a spool finds of its earlier life, on its disk and in cupsd."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from nodeagent.services.printing import cups_watch
from nodeagent.services.printing.cups_client import CupsJob
from tests.fakes.print_server import CANCELLED, COMPLETED, PROCESSING, FakeCups
from tests.fakes.spooling import Spooling, fake_house, files, running


async def test_accepted_jobs_go_on_after_a_restart_and_others_are_gone(tmp_path: Path) -> None:
    first_life = fake_house(tmp_path)  # never runs: the daemon was killed at once
    accepted = await first_life.send(b"1")
    half = await first_life.incoming()
    await first_life.write("s1", half, b"half")
    cups = FakeCups()
    second_life = fake_house(tmp_path, cups)
    async with running(second_life) as house:
        assert (await house.ended(accepted)).state == COMPLETED
        assert [data for _, _, data, _ in cups.printed] == [b"1"]
        assert [job.id for job in house.spool.jobs("s1")] == [accepted]
        assert await house.incoming() > half
        await house.until(lambda: not any(name.endswith(".doc") for name in files(tmp_path)))


async def test_a_job_accepted_before_the_spool_runs_holds_nobody_up(tmp_path: Path) -> None:
    """A daemon that starts serves its seats a moment before it carries jobs."""
    cups = FakeCups()
    house = fake_house(tmp_path, cups)
    early = await house.send(b"1")
    async with running(house):
        assert (await house.ended(early)).state == COMPLETED
        assert (await house.ended(await house.send(b"2"))).state == COMPLETED
        assert [data for _, _, data, _ in cups.printed] == [b"1", b"2"]


@pytest.mark.parametrize(("state", "printed_again"), [(COMPLETED, 0), (PROCESSING, 0), (CANCELLED, 1), (None, 1)])
async def test_a_restart_asks_cupsd_what_it_has(tmp_path: Path, state: int | None, printed_again: int) -> None:
    cups = FakeCups()
    cups.hold = True
    first_life = fake_house(tmp_path, cups)
    async with running(first_life):
        job = await first_life.send(b"hello", mime="text/plain")
        await first_life.until(lambda: len(cups.printed) == 1)
        (_, key, _, _), cups.printed = cups.printed[0], []
    if state is None:
        cups.lose(key)
    else:
        cups.all[key] = CupsJob(1, state)
    cups.hold = False
    async with running(fake_house(tmp_path, cups)) as house:
        assert (await house.ended(job)).state == COMPLETED
        assert [data for _, _, data, _ in cups.printed] == [b"HELLO"] * printed_again


async def test_a_job_that_cupsd_was_killed_over_does_not_stop_the_queue(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """cupsd comes back with the job, without its file, held for ever."""
    monkeypatch.setattr(cups_watch, "HELD_S", 0.05)
    cups = FakeCups()
    cups.hold = True
    first_life = fake_house(tmp_path, cups)
    async with running(first_life):
        job = await first_life.send(b"hello")
        await first_life.until(lambda: len(cups.printed) == 1)
        (_, key, _, _), cups.printed = cups.printed[0], []
    cups.all[key] = CupsJob(1, cups_watch.HELD)
    cups.hold = False
    async with running(fake_house(tmp_path, cups)) as house:
        assert (await house.ended(job)).state == COMPLETED
        assert [data for _, _, data, _ in cups.printed] == [b"hello"]


async def test_what_the_back_end_has_marked_as_printed_is_not_printed_again(tmp_path: Path) -> None:
    first_life = fake_house(tmp_path)
    job = await first_life.send(b"1")
    (tmp_path / f"s1/{job}-1.printed").touch()  # killed before cupsd had noted it, and cupsd has lost the job
    (tmp_path / "s1/99-1.printed").touch()
    cups = FakeCups()
    async with running(fake_house(tmp_path, cups)) as house:
        assert (await house.ended(job)).state == COMPLETED
        assert not cups.printed
        await house.until(lambda: not any(name.endswith(".printed") for name in files(tmp_path)))


async def test_a_job_of_a_seat_that_ended_meanwhile_is_cancelled(tmp_path: Path) -> None:
    cups = FakeCups()
    cups.hold = True
    async with running(fake_house(tmp_path, cups)) as house:
        await house.send(b"1")
        await house.until(lambda: len(cups.printed) == 1)
    again = Spooling(tmp_path, cups)
    assert await again.spool.seats() == {"s1"}
    cups.answers.clear()
    await again.spool.release("s1")
    async with running(again):
        cups.answers.set()
        await again.until(lambda: cups.cancelled == [1])
    assert not (tmp_path / "s1").exists()


async def test_jobs_of_a_seat_that_is_not_bound_again_yet_wait(tmp_path: Path) -> None:
    await fake_house(tmp_path).send(b"1")
    cups = FakeCups()
    async with running(Spooling(tmp_path, cups)) as house:
        await house.until(lambda: bool(house.spool.jobs("s1")) and house.job(1).reason == "printer-stopped")
        assert cups.printed == []
        house.give("s1", "p1")
        assert (await house.ended(1)).state == COMPLETED


async def test_numbers_never_come_twice(tmp_path: Path) -> None:
    seen: list[int] = []
    for _ in range(3):
        house = fake_house(tmp_path)
        seen += [await house.incoming() for _ in range(3)]
    assert seen == sorted(set(seen))


async def test_finished_jobs_are_still_told_after_a_restart(tmp_path: Path) -> None:
    async with running(fake_house(tmp_path)) as house:
        job = await house.send(b"1")
        before = await house.ended(job)
        await house.until(lambda: '"state":9' in (tmp_path / "s1/1.json").read_text())
    again = fake_house(tmp_path)
    await again.spool.seats()
    assert again.spool.jobs("s1") == (before,)


async def test_what_cannot_be_understood_is_put_aside(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    house = fake_house(tmp_path)
    good = await house.send(b"good")
    short, nodoc, liar = await house.send(b"short"), await house.send(b"nodoc"), await house.send(b"liar")
    seat = tmp_path / "s1"
    os.truncate(seat / f"{short}-1.doc", 2)
    (seat / f"{nodoc}-1.doc").unlink()
    (seat / f"{liar}.json").rename(seat / "77.json")
    (seat / "8.json").write_bytes(b'{"id": 8')
    (seat / "9.json").write_bytes(b"[" * 100_000)
    (seat / "10.json").write_bytes(b"\0" * 10)
    (seat / "core").write_bytes(b"?")
    (seat / "directory").mkdir()
    (seat / "11.json").symlink_to("/etc/passwd")
    (seat / "12-1.doc").write_bytes(b"no record")
    (seat / "12-1.out").write_bytes(b"half converted")
    (seat / ".13.json.99.tmp").write_bytes(b"{")
    (tmp_path / "stray").write_bytes(b"?")
    cups = FakeCups()
    with caplog.at_level("ERROR"):
        async with running(fake_house(tmp_path, cups)) as again:
            assert (await again.ended(good)).state == COMPLETED
            assert [data for _, _, data, _ in cups.printed] == [b"good"]
            assert await again.incoming() > 12
            await again.until(lambda: files(tmp_path) == {"seat.json", f"{good}.json"})
    for word in ("2 bytes instead of 5", "lacks its document", "calls itself", "8.json", "9.json", "core", "directory"):
        assert word in caplog.text
    aside = {path.name for path in (tmp_path / ".aside").iterdir()}
    assert {"s1.8.json", "s1.9.json", "s1.10.json", "s1.11.json", "s1.core", "s1.directory"} <= aside


async def test_a_broken_counter_of_numbers_does_no_harm(tmp_path: Path) -> None:
    house = fake_house(tmp_path)
    await house.send(b"1")
    (tmp_path / "s1/seat.json").write_bytes(b'{"next_job": -5}')
    again = fake_house(tmp_path)
    assert await again.incoming() == 2
