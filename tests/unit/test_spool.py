"""The spool before a print server in memory: what is accepted, what is told, what is left."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pytest

from nodeagent.errors import AgentError, Reason
from nodeagent.services.printing.cups_client import CupsJob
from nodeagent.services.printing.spool_store import MOVES, State
from nodeagent.wire import seat as wire
from tests.fakes.print_server import ABORTED, CANCELLED, COMPLETED, PROCESSING, FakeCups
from tests.fakes.programs import count_open
from tests.fakes.spooling import Spooling, fake_house, files, refused, running

DOWN = AgentError(Reason.UPSTREAM_UNAVAILABLE, "cupsd does not answer")


def test_states_are_those_of_ipp() -> None:
    assert {state.name: int(state) for state in State} == {
        "PENDING": 3, "INCOMING": 4, "PROCESSING": 5, "CANCELLED": 7, "ABORTED": 8, "COMPLETED": 9,
    }  # fmt: skip
    assert set(MOVES) == set(State)
    assert all(state.finished is (not MOVES[state]) for state in State)


async def test_a_job_from_its_first_byte_to_its_end(tmp_path: Path) -> None:
    cups = FakeCups()
    async with running(fake_house(tmp_path, cups)) as house:
        job = await house.incoming(title="Brief", copies=3)
        assert house.job(job) == wire.Job(
            id=1, printer="p1", title="Brief", state=4, reason="job-incoming", created_s=1000
        )
        await house.write("s1", job, b"%!PS page")
        assert cups.printed == []
        await house.close("s1", job, 9)
        done = await house.ended(job)
        assert (done.state, done.reason, done.size_bytes) == (9, "job-completed-successfully", 9)
        assert (done.created_s, done.processing_s, done.completed_s) == (1000, 1000, 1000)
        assert [(queue, data, copies) for queue, _, data, copies in cups.printed] == [("q-p1", b"%!PS page", 3)]
        assert house.seen["s1", 1] == [4, 3, 5, 9]
        await house.until(lambda: files(tmp_path) == {"seat.json", "1.json"})
    assert house.count("completed") == 1
    assert count_open(tmp_path) == 0


async def test_several_documents_print_in_their_order(tmp_path: Path) -> None:
    cups = FakeCups()
    async with running(fake_house(tmp_path, cups)) as house:
        job = await house.incoming()
        for page in (b"one", b"two"):
            await house.write("s1", job, page)
            await house.close("s1", job, 3, last=False)
        assert cups.printed == []
        await house.close("s1", job, 0, mime="application/octet-stream")
        assert (await house.ended(job)).size_bytes == 6
        assert [data for _, _, data, _ in cups.printed] == [b"one", b"two"]


async def test_a_document_in_another_format_is_converted(tmp_path: Path) -> None:
    cups = FakeCups()
    async with running(fake_house(tmp_path, cups)) as house:
        job = await house.send(b"hello", mime="text/plain")
        assert (await house.ended(job)).state == COMPLETED
        assert [data for _, _, data, _ in cups.printed] == [b"HELLO"]
        await house.until(lambda: files(tmp_path) == {"seat.json", "1.json"})


async def test_a_failed_conversion_ends_its_own_job_only(tmp_path: Path) -> None:
    async with running(fake_house(tmp_path)) as house:
        house.convert.fault = AgentError(Reason.MALFORMED, "the document could not be converted: gs failed")
        job = await house.send(b"hello", mime="text/plain")
        done = await house.ended(job)
        assert (done.state, done.reason) == (ABORTED, "document-format-error")
        assert "gs failed" in done.message
        house.convert.fault = RuntimeError("a bug")
        broken = await house.send(b"hello", mime="text/plain")
        good = await house.send(b"%!PS")
        assert (await house.ended(broken)).message == "internal error (RuntimeError)"
        assert (await house.ended(good)).state == COMPLETED
        assert house.count("aborted") == 2


async def test_a_seat_that_is_not_there_yet_is_waited_for(tmp_path: Path) -> None:
    async with running(fake_house(tmp_path)) as house:
        house.convert.fault = AgentError(Reason.NOT_RUNNING, "the seat has no process yet")
        job = await house.send(b"hello", mime="text/plain")
        await house.until(lambda: house.job(job).reason == "job-queued")
        house.convert.fault = None
        assert (await house.ended(job)).state == COMPLETED


# ---- what a worker may not do


async def test_who_has_no_printer_creates_no_job(tmp_path: Path) -> None:
    house = fake_house(tmp_path)
    assert (await refused(house.incoming(printer="p2"))).reason is Reason.DEVICE_UNKNOWN
    assert (await refused(house.incoming("s2"))).reason is Reason.DEVICE_UNKNOWN


async def test_jobs_belong_to_their_seat(tmp_path: Path) -> None:
    house = fake_house(tmp_path)
    house.give("s2", "p2")
    job = await house.incoming()
    for call in (house.spool.open_document("s2", job), house.close("s2", job, 0), house.spool.cancel("s2", job)):
        assert (await refused(call)).reason is Reason.NOT_YOURS
    await house.spool.drop("s2", job, Reason.MALFORMED)
    assert house.job(job).state == 4
    assert house.spool.jobs("s2") == ()


@pytest.mark.parametrize(("written", "said"), [(b"abc", 4), (b"abc", 2), (b"", 7)])
async def test_a_size_that_is_not_true_aborts_the_job(tmp_path: Path, written: bytes, said: int) -> None:
    async with running(fake_house(tmp_path)) as house:
        job = await house.incoming()
        await house.write("s1", job, written)
        assert (await refused(house.close("s1", job, said))).reason is Reason.MALFORMED
        assert house.job(job).state == ABORTED
        await house.until(lambda: files(tmp_path) == {"seat.json"})


async def test_a_document_that_is_still_written_to_is_not_taken(tmp_path: Path) -> None:
    house = fake_house(tmp_path)
    job = await house.incoming()
    fd = await house.spool.open_document("s1", job)
    os.write(fd, b"%!PS")
    error = await refused(house.close("s1", job, 4))
    assert error.reason is Reason.STATE_INVALID
    assert house.job(job).state == ABORTED
    assert files(tmp_path) == {"seat.json"}
    os.write(fd, b"x" * 65536)  # its writer goes on, and may fill the disk no further than until the next look
    await house.spool.tend()
    assert os.fstat(fd).st_blocks == 0
    os.close(fd)
    await house.spool.tend()
    assert count_open(tmp_path) == 0


async def test_an_empty_job_is_not_printed(tmp_path: Path) -> None:
    house = fake_house(tmp_path)
    job = await house.incoming()
    assert (await refused(house.close("s1", job, 0))).reason is Reason.MALFORMED
    job = await house.incoming()
    await house.write("s1", job, b"")
    assert (await refused(house.close("s1", job, 0))).reason is Reason.MALFORMED
    assert house.job(job).state == ABORTED


async def test_nothing_is_added_to_an_accepted_job(tmp_path: Path) -> None:
    cups = FakeCups()
    cups.hold = True
    async with running(fake_house(tmp_path, cups)) as house:
        job = await house.send(b"%!PS")
        assert (await refused(house.spool.open_document("s1", job))).reason is Reason.STATE_INVALID
        assert (await refused(house.close("s1", job, 0))).reason is Reason.STATE_INVALID
        await house.spool.drop("s1", job, Reason.MALFORMED)
        house.spool.forget_incoming("s1")
        cups.hold = False
        assert (await house.ended(job)).state == COMPLETED


async def test_one_document_of_a_job_at_a_time(tmp_path: Path) -> None:
    house = fake_house(tmp_path)
    job = await house.incoming()
    fd = await house.spool.open_document("s1", job)
    assert (await refused(house.spool.open_document("s1", job))).reason is Reason.STATE_INVALID
    os.close(fd)
    await house.close("s1", job, 0, last=False)
    assert (await refused(house.close("s1", job, 5, last=False))).reason is Reason.MALFORMED


async def test_a_format_without_a_way_is_refused(tmp_path: Path) -> None:
    house = fake_house(tmp_path)
    job = await house.incoming()
    await house.write("s1", job, b"PK")
    assert (await refused(house.close("s1", job, 2, mime="application/zip"))).reason is Reason.NOT_SUPPORTED
    assert house.job(job).reason == "unsupported-document-format"


# ---- order


async def test_a_printer_prints_in_order_and_waits_for_no_other(tmp_path: Path) -> None:
    cups = FakeCups()
    cups.hold = True
    async with running(fake_house(tmp_path, cups)) as house:
        house.give("s1", "p1", "p2")
        house.give("s2", "p3")
        first, second = await house.send(b"1"), await house.send(b"2")
        other, foreign = await house.send(b"3", printer="p2"), await house.send(b"4", "s2", "p3")
        await house.until(lambda: len(cups.printed) == 3)
        assert {data for _, _, data, _ in cups.printed} == {b"1", b"3", b"4"}
        assert house.job(second).state == 3
        cups.hold = False
        for job, seat in ((first, "s1"), (second, "s1"), (other, "s1"), (foreign, "s2")):
            assert (await house.ended(job, seat)).state == COMPLETED
        assert cups.printed[3][2] == b"2"


async def test_the_next_job_is_converted_while_one_prints_but_not_all(tmp_path: Path) -> None:
    cups = FakeCups()
    cups.hold = True
    async with running(fake_house(tmp_path, cups)) as house:
        for number in range(4):
            await house.send(b"text %d" % number, mime="text/plain")
        await house.until(lambda: {"1-1.out", "2-1.out"} <= files(tmp_path) and house.job(2).state == 3)
        assert not {"3-1.out", "4-1.out"} & files(tmp_path)
        cups.hold = False
        for number in range(1, 5):
            await house.ended(number)
        assert [data for _, _, data, _ in cups.printed] == [b"TEXT %d" % number for number in range(4)]


async def test_two_conversions_at_a_time(tmp_path: Path) -> None:
    async with running(fake_house(tmp_path)) as house:
        house.convert.gate.clear()
        for number in range(5):
            house.give(f"seat{number}", "p1")
            await house.send(b"text", f"seat{number}", mime="text/plain")
        await house.until(lambda: house.convert.at_once == 2)
        house.convert.gate.set()
        for number in range(5):
            assert (await house.ended(1, f"seat{number}")).state == COMPLETED
        assert house.convert.most_at_once == 2


async def test_jobs_wait_for_a_printer_that_is_unplugged(tmp_path: Path) -> None:
    cups = FakeCups()
    async with running(fake_house(tmp_path, cups)) as house:
        house.give("s1", "p1", online=False)
        job = await house.send(b"%!PS")
        await house.until(lambda: "unplugged" in house.job(job).message)
        assert (house.job(job).state, house.job(job).reason) == (3, "printer-stopped")
        house.spool.set_printers("s1", ())
        house.give("s1", "p1", online=False)
        assert cups.printed == []
        house.give("s1", "p1")
        assert (await house.ended(job)).state == COMPLETED
        assert len(cups.printed) == 1


# ---- cancel and release


async def test_cancel_wherever_the_job_is(tmp_path: Path) -> None:
    cups = FakeCups()
    cups.hold = True
    async with running(fake_house(tmp_path, cups)) as house:
        printing, pending, incoming = await house.send(b"1"), await house.send(b"2"), await house.incoming()
        house.give("s2", "p2")
        house.convert.gate.clear()
        converting = await house.send(b"3", "s2", "p2", mime="text/plain")
        await house.until(lambda: len(cups.printed) == 1 and house.convert.at_once == 1)
        for job in (pending, incoming, printing):
            await house.spool.cancel("s1", job)
            assert (house.job(job).state, house.job(job).reason) == (CANCELLED, "job-canceled-by-user")
        await house.spool.cancel("s2", converting)
        assert house.convert.at_once == 0
        assert cups.cancelled == [1]
        assert len(cups.printed) == 1
        assert (await refused(house.spool.cancel("s1", printing))).reason is Reason.STATE_INVALID
        after = await house.send(b"4")
        cups.hold = False
        assert (await house.ended(after)).state == COMPLETED
        assert files(tmp_path, "s2") == {"seat.json", "1.json"}
    assert house.count("cancelled") == 4


async def test_cupsd_is_told_later_when_it_does_not_answer_now(tmp_path: Path) -> None:
    cups = FakeCups()
    cups.hold = True
    async with running(fake_house(tmp_path, cups)) as house:
        job = await house.send(b"1")
        await house.until(lambda: len(cups.printed) == 1)
        cups.all["a job of somebody else"] = CupsJob(77, PROCESSING)
        cups.answers.clear()
        await house.spool.cancel("s1", job)
        assert house.job(job).state == CANCELLED
        assert cups.cancelled == []
        cups.answers.set()
        await house.until(lambda: cups.cancelled == [1])
        assert cups.all["a job of somebody else"].state == PROCESSING


async def test_release_leaves_nothing_and_happens_once(tmp_path: Path) -> None:
    cups = FakeCups()
    cups.hold = True
    async with running(fake_house(tmp_path, cups)) as house:
        house.give("s2", "p2")
        await house.send(b"1")
        await house.send(b"2")
        await house.incoming()
        other = await house.send(b"3", "s2", "p2")
        await house.until(lambda: len(cups.printed) == 2)
        await house.spool.release("s1")
        await house.spool.release("s1")
        assert house.spool.jobs("s1") == ()
        assert not (tmp_path / "s1").exists()
        assert await house.spool.seats() == {"s2"}
        assert len(cups.cancelled) == 1
        assert house.count("cancelled") == 3
        assert (await refused(house.incoming())).reason is Reason.DEVICE_UNKNOWN
        cups.hold = False
        assert (await house.ended(other, "s2")).state == COMPLETED


async def test_a_dead_worker_leaves_no_incoming_job(tmp_path: Path) -> None:
    async with running(fake_house(tmp_path)) as house:
        job = await house.incoming()
        await house.write("s1", job, b"half a do")
        house.spool.forget_incoming("s1")
        await house.ended(job)
        await house.until(lambda: files(tmp_path) == {"seat.json"})


# ---- the print server


async def test_what_cupsd_has_lost_is_printed_again(tmp_path: Path) -> None:
    cups = FakeCups()
    cups.hold = True
    async with running(fake_house(tmp_path, cups)) as house:
        job = await house.send(b"1")
        await house.until(lambda: len(cups.printed) == 1)
        cups.lose(cups.printed[0][1])
        await house.until(lambda: len(cups.printed) == 2)
        cups.hold = False
        assert (await house.ended(job)).state == COMPLETED
        assert len(cups.printed) == 2


async def test_a_job_that_cupsd_always_gives_up_is_aborted(tmp_path: Path) -> None:
    cups = FakeCups()
    cups.outcome = ABORTED
    async with running(fake_house(tmp_path, cups)) as house:
        done = await house.ended(await house.send(b"1"))
        assert (done.state, done.reason) == (ABORTED, "aborted-by-system")
        assert len(cups.printed) == 3
        cups.outcome = COMPLETED
        assert (await house.ended(await house.send(b"2"))).state == COMPLETED


async def test_an_answer_that_got_lost_prints_nothing_twice(tmp_path: Path) -> None:
    cups = FakeCups()
    cups.fail_after = [DOWN]
    async with running(fake_house(tmp_path, cups)) as house:
        assert (await house.ended(await house.send(b"1"))).state == COMPLETED
        assert len(cups.printed) == 1
        cups.fail_before = [DOWN, DOWN]
        assert (await house.ended(await house.send(b"2"))).state == COMPLETED
        assert [data for _, _, data, _ in cups.printed] == [b"1", b"2"]


async def test_what_the_back_end_says_is_told(tmp_path: Path) -> None:
    cups = FakeCups()
    cups.hold, cups.message = True, "The printer is not connected; the job waits."
    async with running(fake_house(tmp_path, cups)) as house:
        job = await house.send(b"1")
        await house.until(lambda: "not connected" in house.job(job).message)
        cups.hold, cups.message = False, ""
        done = await house.ended(job)
        assert (done.state, done.message) == (COMPLETED, "")


async def test_nothing_is_asked_while_nothing_is_under_way(tmp_path: Path) -> None:
    cups = FakeCups()
    async with running(fake_house(tmp_path, cups)) as house:
        await house.ended(await house.send(b"1"))
        asked = cups.asked
        for _ in range(50):
            await asyncio.sleep(0.005)
        assert cups.asked == asked


def test_a_name_that_leads_elsewhere_is_no_seat(tmp_path: Path) -> None:
    house = Spooling(tmp_path, FakeCups())
    for name in ("../x", ".", "", "a/b", ".aside", "x" * 129):
        with pytest.raises(ValueError, match="cannot name a seat"):
            house.give(name, "p1")
