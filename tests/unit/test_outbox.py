"""The outbox on a real disk: coalescing, bounds, restarts, and disks that refuse."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest

from nodeagent.metrics import Metrics
from nodeagent.report import outbox as box
from nodeagent.report.outbox import Outbox


class Clock:
    def __init__(self) -> None:
        self.now = 1_700_000_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


async def test_the_same_report_again_raises_its_count(tmp_path: Path, metrics: Metrics, clock: Clock) -> None:
    async with Outbox(tmp_path / box.NAME, metrics, now=clock) as outbox:
        for _ in range(3):
            await outbox.put("a", b"body")
            clock.now += 1
        await outbox.put("b", b"other")
        report = await outbox.due()
        assert report is not None
        assert (report.key, report.body, report.count, report.sent_count) == ("a", b"body", 3, 0)
        assert report.last_s - report.first_s == 2
        assert outbox.state.length == 2
        clock.now += 10
        assert outbox.state.oldest_s == 13


async def test_a_repetition_after_sending_is_an_update_that_waits(
    tmp_path: Path, metrics: Metrics, clock: Clock
) -> None:
    async with Outbox(tmp_path / box.NAME, metrics, now=clock) as outbox:
        await outbox.put("a", b"body")
        report = await outbox.due()
        assert report is not None
        await outbox.sent(report, not_before_s=clock.now + 60)
        assert await outbox.due() is None and outbox.state.length == 0
        await outbox.put("a", b"body")
        assert await outbox.due() is None
        assert await outbox.next_due_s() == clock.now + 60
        clock.now += 60
        again = await outbox.due()
        assert again is not None and (again.id, again.count, again.sent_count) == (report.id, 2, 1)


async def test_a_series_ends(tmp_path: Path, metrics: Metrics, clock: Clock) -> None:
    async with Outbox(tmp_path / box.NAME, metrics, now=clock) as outbox:
        await outbox.put("a", b"body")
        clock.now += box.SERIES_S + 1
        await outbox.put("a", b"body")
        assert outbox.state.length == 2


async def test_what_waits_survives_a_restart(tmp_path: Path, metrics: Metrics, clock: Clock) -> None:
    async with Outbox(tmp_path / box.NAME, metrics, now=clock) as outbox:
        await outbox.put("a", b"body")
    assert (tmp_path / box.NAME).stat().st_mode & 0o777 == 0o600
    async with Outbox(tmp_path / box.NAME, metrics, now=clock) as outbox:
        assert outbox.state.length == 1
        report = await outbox.due()
        assert report is not None and report.key == "a"


async def test_the_oldest_goes_when_it_is_full(tmp_path: Path, metrics: Metrics, clock: Clock) -> None:
    async with Outbox(tmp_path / box.NAME, metrics, max_rows=3, now=clock) as outbox:
        await outbox.put("sent", b"")
        report = await outbox.due()
        assert report is not None
        await outbox.sent(report, not_before_s=0)
        for key in "abc":
            await outbox.put(key, b"")
        assert outbox.state.dropped == 0, "what was sent goes first"
        await outbox.put("d", b"")
        assert (outbox.state.length, outbox.state.dropped) == (3, 1)
        assert metrics.registry.get_sample_value("nodeagent_dropped_total", {"queue": "outbox"}) == 1
        report = await outbox.due()
        assert report is not None and report.key == "b"


async def test_bodies_are_bounded(tmp_path: Path, metrics: Metrics) -> None:
    async with Outbox(tmp_path / box.NAME, metrics) as outbox:
        with pytest.raises(ValueError, match="over 8192"):
            await outbox.put("a", b"x" * (box.MAX_BODY_BYTES + 1))


async def test_a_clock_that_is_set_back_postpones_nothing_for_ever(
    tmp_path: Path, metrics: Metrics, clock: Clock
) -> None:
    async with Outbox(tmp_path / box.NAME, metrics, now=clock) as outbox:
        await outbox.put("a", b"")
        report = await outbox.due()
        assert report is not None
        await outbox.postpone(report, clock.now + 600)
        assert await outbox.due() is None
        clock.now -= 10 * 365 * 86400
        assert await outbox.due() is not None
        assert outbox.state.oldest_s == 0


async def test_a_damaged_file_is_set_aside(tmp_path: Path, metrics: Metrics, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / box.NAME).write_bytes(b"not a database, and longer than a header " * 100)
    (tmp_path / f"{box.NAME}-wal").write_bytes(b"its log")
    async with Outbox(tmp_path / box.NAME, metrics) as outbox:
        await outbox.put("a", b"")
        assert outbox.state.length == 1 and outbox.state.problem == ""
    assert (tmp_path / "outbox.broken").exists()
    assert "damaged" in caplog.text


async def test_a_file_of_another_version_is_set_aside(tmp_path: Path, metrics: Metrics) -> None:
    database = sqlite3.connect(tmp_path / box.NAME)
    database.execute("PRAGMA user_version=99")
    database.close()
    async with Outbox(tmp_path / box.NAME, metrics) as outbox:
        await outbox.put("a", b"")
        assert outbox.state.problem == ""


async def test_without_a_directory_it_goes_on_in_memory(tmp_path: Path, metrics: Metrics) -> None:
    async with Outbox(tmp_path / "nowhere" / box.NAME, metrics) as outbox:
        await outbox.put("a", b"")
        assert outbox.state.length == 1 and "nowhere" in outbox.state.problem


async def test_a_disk_that_fills_up_is_survived(tmp_path: Path, metrics: Metrics) -> None:
    async with Outbox(tmp_path / box.NAME, metrics) as outbox:
        await outbox.put("before", b"")

        def full() -> None:
            assert outbox._db is not None
            outbox._db.execute(f"PRAGMA max_page_count={outbox._db.execute('PRAGMA page_count').fetchone()[0]}")

        await outbox._on_thread(full)
        for number in range(20):
            await outbox.put(f"k{number}", b"x" * 8000)
        assert "full" in outbox.state.problem
        assert outbox.state.length >= 15
    async with Outbox(tmp_path / box.NAME, metrics) as outbox:
        report = await outbox.due()
        assert report is not None and report.key == "before", "what lay on the disk is still there"
