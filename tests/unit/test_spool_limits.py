"""How much a seat may have in the spool."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from nodeagent.config import PrintingConfig
from nodeagent.errors import Reason
from nodeagent.services.printing.spool import OPEN_DOCUMENTS
from nodeagent.wire import seat as wire
from tests.fakes.print_server import ABORTED, COMPLETED
from tests.fakes.programs import count_open
from tests.fakes.spooling import fake_house, files, refused, running


async def test_a_seat_has_so_many_unfinished_jobs(tmp_path: Path) -> None:
    house = fake_house(tmp_path, limits=PrintingConfig(jobs_per_seat=2))
    first = await house.incoming()
    await house.incoming()
    assert (await refused(house.incoming())).reason is Reason.TOO_MANY
    await house.spool.drop("s1", first, Reason.TOO_SLOW)
    await house.incoming()


async def test_a_document_has_so_many_bytes(tmp_path: Path) -> None:
    house = fake_house(tmp_path, limits=PrintingConfig(max_document_mib=1))
    job = await house.incoming()
    await house.write("s1", job, b"x" * ((1 << 20) + 1))
    assert (await refused(house.close("s1", job, (1 << 20) + 1))).reason is Reason.TOO_LARGE
    assert files(tmp_path) == {"seat.json"}


async def test_a_seat_has_so_many_bytes(tmp_path: Path) -> None:
    house = fake_house(tmp_path, limits=PrintingConfig(spool_per_seat_mib=1))
    first, second = await house.incoming(), await house.incoming()
    data = b"x" * (600 << 10)
    await house.write("s1", first, data)
    await house.close("s1", first, len(data), last=False)
    await house.write("s1", second, data)
    assert (await refused(house.close("s1", second, len(data)))).reason is Reason.TOO_LARGE
    third = await house.incoming()
    await house.write("s1", third, data[: 500 << 10])
    await house.spool.tend()
    assert house.job(third).state == ABORTED
    assert house.job(first).state == 4


async def test_who_writes_without_end_is_cut(tmp_path: Path) -> None:
    house = fake_house(tmp_path, limits=PrintingConfig(max_document_mib=1))
    job = await house.incoming()
    fd = await house.spool.open_document("s1", job)
    os.truncate(fd, 2 << 20)
    await house.spool.tend()
    assert house.job(job).state == ABORTED
    assert files(tmp_path) == {"seat.json"}
    os.close(fd)
    await house.spool.tend()


async def test_only_so_many_documents_can_be_written_at_once(tmp_path: Path) -> None:
    house = fake_house(tmp_path)
    fds = []
    for _ in range(OPEN_DOCUMENTS):
        job = await house.incoming()
        fds.append(await house.spool.open_document("s1", job))
        await house.spool.drop("s1", job, Reason.MALFORMED)
    job = await house.incoming()
    assert (await refused(house.spool.open_document("s1", job))).reason is Reason.TOO_MANY
    os.close(fds.pop())
    fds.append(await house.spool.open_document("s1", job))
    for fd in fds:
        os.close(fd)
    await house.spool.release("s1")
    assert count_open(tmp_path) == 0


async def test_an_unfinished_job_is_given_up_after_a_while(tmp_path: Path) -> None:
    house = fake_house(tmp_path)
    slow, silent = await house.incoming(), await house.incoming()
    fd = await house.spool.open_document("s1", slow)
    house.now += 200
    os.write(fd, b"still here")
    await house.spool.tend()
    house.now += 200
    await house.spool.tend()
    assert house.job(slow).state == 4
    assert house.job(silent).state == ABORTED
    assert "300 s" in house.job(silent).message
    house.now += 200
    await house.spool.tend()
    assert house.job(slow).state == ABORTED
    os.close(fd)
    await house.spool.release("s1")


async def test_finished_jobs_are_remembered_up_to_a_number(tmp_path: Path) -> None:
    async with running(fake_house(tmp_path)) as house:
        for _ in range(wire.MAX_JOBS + 3):
            await house.ended(await house.send(b"%!PS"))
        jobs = house.spool.jobs("s1")
        assert [job.id for job in jobs] == list(range(4, wire.MAX_JOBS + 4))
        await house.until(lambda: len(files(tmp_path)) == 1 + wire.MAX_JOBS)
        waiting = await house.incoming()
        assert len(house.spool.jobs("s1")) == wire.MAX_JOBS
        assert house.job(waiting).state == 4


async def test_all_jobs_fit_into_one_message(tmp_path: Path) -> None:
    house = fake_house(tmp_path, limits=PrintingConfig(jobs_per_seat=1000))
    name = "p" * 63
    house.give("s1", name)
    for _ in range(wire.MAX_JOBS):
        await house.incoming(printer=name, title="\U0001f5a8" * 255)
    await refused(house.incoming(printer=name))
    for job in house.spool._seats["s1"].jobs.values():
        job.say("queued-for-marker-and-then-some-longer-keyword", "\N{SNOWMAN}\n" * 100)
        job.record = type(job.record)(**{f: getattr(job.record, f) for f in job.record.__struct_fields__}
                                      | {"created_s": 2**31, "processing_s": 2**31, "completed_s": 2**31})  # fmt: skip
    jobs = house.spool.jobs("s1")
    assert len(jobs) == wire.MAX_JOBS
    assert len(wire.put_message(wire.Jobs(jobs=jobs))) < wire.MAX_MESSAGE
    assert wire.take_to_worker(wire.put_message(wire.Jobs(jobs=jobs))) == wire.Jobs(jobs=jobs)


async def test_a_full_disk_refuses_and_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with running(fake_house(tmp_path)) as house:
        first = await house.send(b"1")
        monkeypatch.setattr("nodeagent.services.printing.spool.MIN_FREE_BYTES", 1 << 60)
        job = await house.incoming()
        assert (await refused(house.spool.open_document("s1", job))).reason is Reason.UPSTREAM_UNAVAILABLE
        assert (await house.ended(first)).state == COMPLETED
