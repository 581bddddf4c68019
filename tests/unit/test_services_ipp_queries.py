"""What a desktop can see and name: the printers and jobs of its seat, and nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest

from nodeagent.errors import Reason
from nodeagent.services.ipp import answers
from nodeagent.wire import ipp
from nodeagent.wire import seat as wire
from nodeagent.wire.ipp import Status
from tests.fakes.ipp_seat import NOW, OP, PRINTER, SECOND, Desk, G, message_of, request, seat

JOBS = {
    1: wire.Job(
        id=1, printer="P1", title="old", state=9, created_s=10, processing_s=11, completed_s=12, size_bytes=1025
    ),
    2: wire.Job(id=2, printer="P1", title="failed", state=8, reason="aborted-by-system", message="no", created_s=20),
    3: wire.Job(id=3, printer="P1", title="now", state=5, created_s=30, processing_s=31),
    4: wire.Job(id=4, printer="P2", title="waits", state=3, created_s=40),
}


def give_jobs(desk: Desk) -> None:
    desk.daemon.jobs = dict(JOBS)
    desk.daemon.tell_jobs()


def asked(*names: str) -> ipp.Attribute:
    return ipp.keyword("requested-attributes", *names)


def names(group: ipp.Group) -> set[str]:
    return {attribute.name for attribute in group.attributes}


# ---- printers


async def test_everything_about_a_printer(tmp_path: Path) -> None:
    async with seat(tmp_path) as desk:
        response = await desk.connect().ask(request(OP.GET_PRINTER_ATTRIBUTES))
        (group,) = response.groups_of(G.PRINTER)
        assert group.text("printer-name") == "P1"
        assert group.text("printer-info") == "Office (simulated)"
        assert group.text("device-uri") == "simulated:/P1"
        assert group.text("printer-uri-supported") == "ipp://localhost/printers/P1"
        assert group.integer("printer-state") == 3 and group.text("printer-state-reasons") == "none"
        assert group.integer("printer-up-time") == int(NOW)
        assert group.texts("document-format-supported") == ("application/octet-stream", *PRINTER.formats)
        assert group.texts("compression-supported") == ("none",)
        assert group.texts("sides-supported") == ("one-sided",)
        assert group.get("pwg-raster-document-resolution-supported") and not group.get("urf-supported")
        operations = group.get("operations-supported")
        assert operations and {v.data for v in operations.values} == {
            *(0x02, 0x04, 0x05, 0x06, 0x08, 0x09, 0x0A, 0x0B, 0x38, 0x39, 0x3B),
            *(0x4001, 0x4002, 0x4005),
        }
        assert "media-col-database" not in names(group)
        assert {"media-supported", "media-default", "media-ready", "media-col-ready", "print-color-mode-supported",
                "printer-uuid", "ipp-features-supported", "job-creation-attributes-supported"} <= names(group)  # fmt: skip


async def test_an_unplugged_printer_takes_jobs_and_says_so(tmp_path: Path) -> None:
    async with seat(tmp_path) as desk:
        response = await desk.connect().ask(request(OP.GET_PRINTER_ATTRIBUTES, printer="P2"))
        group = response.group(G.PRINTER)
        assert group.boolean("printer-is-accepting-jobs") is True
        assert group.text("printer-state-reasons") == "offline-report"
        assert "unplugged" in (group.text("printer-state-message") or "")
        assert group.texts("urf-supported")[0] == "V1.4"


@pytest.mark.parametrize(
    ("wanted", "found"),
    [
        (("printer-name",), {"printer-name"}),
        (("printer-name", "no-such-thing", "sides-default"), {"printer-name", "sides-default"}),
        (("no-such-thing",), set()),
        (("media-col-database",), {"media-col-database"}),
    ],
)
async def test_requested_attributes(tmp_path: Path, wanted: tuple[str, ...], found: set[str]) -> None:
    async with seat(tmp_path) as desk:
        response = await desk.connect().ask(request(OP.GET_PRINTER_ATTRIBUTES, asked(*wanted)))
        assert names(response.group(G.PRINTER)) == found


async def test_requested_groups(tmp_path: Path) -> None:
    async with seat(tmp_path) as desk:
        client = desk.connect()

        async def group(*wanted: str) -> set[str]:
            return names((await client.ask(request(OP.GET_PRINTER_ATTRIBUTES, asked(*wanted)))).group(G.PRINTER))

        everything = await group("all")
        assert everything == await group("printer-description", "job-template")
        assert await group("all", "media-col-database") == everything | {"media-col-database"}
        assert all(name.endswith("-default") for name in await group("printer-defaults"))
        template = await group("job-template")
        assert "sides-supported" in template and "printer-name" not in template


async def test_the_media_database_has_every_size(tmp_path: Path) -> None:
    async with seat(tmp_path) as desk:
        response = await desk.connect().ask(
            request(OP.GET_PRINTER_ATTRIBUTES, asked("media-col-database", "media-supported"))
        )
        group = response.group(G.PRINTER)
        database = group.get("media-col-database")
        assert database and len(database.values) == len(group.texts("media-supported")) == 18


async def test_all_printers_and_the_default_one(tmp_path: Path) -> None:
    async with seat(tmp_path) as desk:
        client = desk.connect()

        async def listed(*attributes: ipp.Attribute) -> list[str | None]:
            response = await client.ask(request(OP.CUPS_GET_PRINTERS, asked("printer-name"), *attributes, printer=None))
            assert response.code == Status.OK
            return [group.text("printer-name") for group in response.groups_of(G.PRINTER)]

        assert await listed() == ["P1", "P2"]
        assert await listed(ipp.integer("limit", 1)) == ["P1"]
        assert await listed(ipp.name("first-printer-name", "P2")) == ["P2"]
        assert await listed(ipp.enum("printer-type", 0), ipp.enum("printer-type-mask", 0x1)) == ["P1", "P2"]
        assert await listed(ipp.enum("printer-type", 1), ipp.enum("printer-type-mask", 0x1)) == []
        default = await client.ask(request(OP.CUPS_GET_DEFAULT, printer=None))
        assert default.group(G.PRINTER).text("printer-name") == "P1"
        classes = await client.ask(request(OP.CUPS_GET_CLASSES, printer=None))
        assert (classes.code, len(classes.groups)) == (Status.OK, 1)


async def test_a_seat_without_printers(tmp_path: Path) -> None:
    async with seat(tmp_path, printers=()) as desk:
        client = desk.connect()
        default = await client.ask(request(OP.CUPS_GET_DEFAULT, printer=None))
        assert (default.code, message_of(default)) == (Status.NOT_FOUND, "this desktop has no printer")
        assert desk.denied == {}
        printers = await client.ask(request(OP.CUPS_GET_PRINTERS, printer=None))
        assert (printers.code, printers.groups_of(G.PRINTER)) == (Status.OK, ())
        desk.service.on_message(wire.Printers(printers=(SECOND,)))
        assert (await client.ask(request(OP.CUPS_GET_DEFAULT, printer=None))).code == Status.OK


@pytest.mark.parametrize(
    "uri",
    [
        "ipp://localhost/printers/P1",
        "ipp://localhost:631/printers/P1",
        "ipps://other.example/printers/P1",
        "http://localhost/printers/P1?x=1",
        "ipp://%2Frun%2Fopencdi%2Fipp.sock:631/printers/P1",
        "ipp://localhost/ipp/print/P1",
        "ipp://localhost/ipp/print",
        "ipp://localhost/",
        "ipp://localhost",
    ],
)
async def test_names_of_a_printer(tmp_path: Path, uri: str) -> None:
    async with seat(tmp_path) as desk:
        response = await desk.connect().ask(
            request(OP.GET_PRINTER_ATTRIBUTES, ipp.uri("printer-uri", uri), asked("printer-name"), printer=None)
        )
        assert response.group(G.PRINTER).text("printer-name") == "P1"


@pytest.mark.parametrize("name", ["P9", "p1", "P1x", "../P1", "", "P1/P2", "P1%00", "é"])
async def test_a_printer_of_another_seat_and_one_that_does_not_exist_are_the_same(tmp_path: Path, name: str) -> None:
    async with seat(tmp_path) as desk:
        client, told = desk.connect(), []
        for operation in (OP.PRINT_JOB, OP.CREATE_JOB, OP.VALIDATE_JOB, OP.GET_PRINTER_ATTRIBUTES):
            if name == "":
                continue  # the default printer
            document = b"%PDF-" if operation == OP.PRINT_JOB else b""
            refused = await client.ask(request(operation, printer=name), document)
            told.append((refused.code, message_of(refused)))
        assert set(told) <= {(Status.NOT_FOUND, "no such printer in this desktop")}
        assert desk.denied == ({Reason.NOT_YOURS: 4} if told else {}) and desk.daemon.told == []


# ---- jobs


@pytest.mark.parametrize(
    ("printer", "attributes", "found"),
    [
        ("P1", (), [3]),
        ("P2", (), [4]),
        ("", (), [3, 4]),
        ("P1", (ipp.keyword("which-jobs", "completed"),), [2, 1]),
        ("P1", (ipp.keyword("which-jobs", "all"),), [1, 2, 3]),
        ("P1", (ipp.keyword("which-jobs", "aborted"),), [2]),
        ("P1", (ipp.keyword("which-jobs", "processing"),), [3]),
        ("", (ipp.keyword("which-jobs", "pending"),), [4]),
        ("", (ipp.keyword("which-jobs", "all"), ipp.integer("limit", 2)), [1, 2]),
        ("", (ipp.keyword("which-jobs", "all"), ipp.integer("first-job-id", 3)), [3, 4]),
        ("", (ipp.boolean("my-jobs", True), ipp.name("requesting-user-name", "alice")), [3, 4]),
    ],
)
async def test_get_jobs(tmp_path: Path, printer: str, attributes: tuple[ipp.Attribute, ...], found: list[int]) -> None:
    async with seat(tmp_path) as desk:
        give_jobs(desk)
        response = await desk.connect().ask(request(OP.GET_JOBS, *attributes, printer=printer))
        assert response.code == Status.OK
        jobs = response.groups_of(G.JOB)
        assert [job.integer("job-id") for job in jobs] == found
        assert all(names(job) == {"job-id", "job-uri"} for job in jobs)


async def test_jobs_of_another_user_of_the_same_desktop_are_not_mine(tmp_path: Path) -> None:
    async with seat(tmp_path) as desk:
        client = desk.connect()
        for user in ("alice", "bob"):
            await client.ask(request(OP.PRINT_JOB, ipp.name("requesting-user-name", user)), b"%PDF-")
        me = (ipp.name("requesting-user-name", "bob"), ipp.boolean("my-jobs", True))
        mine = (await client.ask(request(OP.GET_JOBS, *me))).groups_of(G.JOB)
        assert [job.integer("job-id") for job in mine] == [2]
        assert (await client.ask(request(OP.CANCEL_MY_JOBS, me[0]))).code == Status.OK
        assert desk.daemon.heard(wire.CancelJob) == [wire.CancelJob(request=7, job=2)]


async def test_everything_about_a_job(tmp_path: Path) -> None:
    async with seat(tmp_path) as desk:
        give_jobs(desk)
        client = desk.connect()
        uri = ipp.uri("job-uri", "ipp://localhost/jobs/1")
        job = (await client.ask(request(OP.GET_JOB_ATTRIBUTES, uri, printer=None))).group(G.JOB)
        assert job.integer("job-state") == 9 and job.text("job-name") == "old"
        assert job.text("job-originating-user-name") == "team/alice"
        assert job.text("job-printer-uri") == "ipp://localhost/printers/P1"
        assert (job.integer("time-at-creation"), job.integer("time-at-completed")) == (10, 12)
        assert job.integer("job-k-octets") == 2
        failed = (await client.ask(request(OP.GET_JOB_ATTRIBUTES, ipp.integer("job-id", 2)))).group(G.JOB)
        assert failed.text("job-state-reasons") == "aborted-by-system" and failed.text("job-state-message") == "no"
        assert failed.get("time-at-completed") == ipp.no_value("time-at-completed")
        printing = (await client.ask(request(OP.GET_PRINTER_ATTRIBUTES))).group(G.PRINTER)
        assert (printing.integer("printer-state"), printing.integer("queued-job-count")) == (4, 1)


@pytest.mark.parametrize(
    "named",
    [
        (ipp.uri("job-uri", "ipp://localhost/jobs/77"),),
        (ipp.uri("job-uri", "ipp://localhost/jobs/0"),),
        (ipp.uri("job-uri", "ipp://localhost/jobs/-1"),),
        (ipp.uri("job-uri", "ipp://localhost/jobs/99999999999999999999"),),
        (ipp.uri("job-uri", "ipp://localhost/jobs/³"),),
        (ipp.uri("job-uri", "ipp://localhost/jobs/"),),
        (ipp.uri("job-uri", "ipp://localhost/printers/P1"),),
        (ipp.uri("printer-uri", "ipp://localhost/printers/P1"), ipp.integer("job-id", 77)),
        (ipp.uri("printer-uri", "ipp://localhost/printers/P1"), ipp.integer("job-id", 4)),
        (ipp.uri("printer-uri", "ipp://localhost/printers/P9"), ipp.integer("job-id", 3)),
    ],
)
async def test_a_job_of_another_seat_and_one_that_does_not_exist_are_the_same(
    tmp_path: Path, named: tuple[ipp.Attribute, ...]
) -> None:
    async with seat(tmp_path) as desk:
        give_jobs(desk)
        client, last = desk.connect(), ipp.boolean("last-document", True)
        for operation in (OP.GET_JOB_ATTRIBUTES, OP.CANCEL_JOB, OP.CLOSE_JOB, OP.SEND_DOCUMENT):
            refused = await client.ask(request(operation, *named, last, printer=None))
            assert refused.code == Status.NOT_FOUND
            assert message_of(refused) in ("no such job in this desktop", "no such printer in this desktop")
        assert desk.denied == {Reason.NOT_YOURS: 4} and desk.daemon.told == []


async def test_cancel(tmp_path: Path) -> None:
    async with seat(tmp_path) as desk:
        give_jobs(desk)
        client = desk.connect()
        assert (await client.ask(request(OP.CANCEL_JOB, ipp.integer("job-id", 3)))).code == Status.OK
        again = await client.ask(request(OP.CANCEL_JOB, ipp.integer("job-id", 3)))
        assert (again.code, message_of(again)) == (Status.NOT_POSSIBLE, "job 3 is already over")
        assert (await client.ask(request(OP.CANCEL_JOBS, printer=""))).code == Status.OK
        assert [m.job for m in desk.daemon.told if isinstance(m, wire.CancelJob)] == [3, 4]


async def test_cancel_jobs_by_number(tmp_path: Path) -> None:
    async with seat(tmp_path) as desk:
        give_jobs(desk)
        client = desk.connect()
        foreign = await client.ask(request(OP.CANCEL_JOBS, ipp.integer("job-ids", 3, 77), printer=""))
        assert foreign.code == Status.NOT_FOUND and desk.daemon.told == []
        assert (await client.ask(request(OP.CANCEL_JOBS, ipp.integer("job-ids", 4), printer=""))).code == Status.OK
        assert [m.job for m in desk.daemon.told if isinstance(m, wire.CancelJob)] == [4]


async def test_a_cancelled_job_takes_no_document(tmp_path: Path) -> None:
    async with seat(tmp_path) as desk:
        client = desk.connect()
        await client.ask(request(OP.CREATE_JOB))
        await client.ask(request(OP.CANCEL_JOB, ipp.integer("job-id", 1)))
        send = request(OP.SEND_DOCUMENT, ipp.integer("job-id", 1), ipp.boolean("last-document", True))
        assert (await client.ask(send, b"%PDF-")).code == Status.NOT_POSSIBLE


async def test_the_printer_of_a_job_can_leave(tmp_path: Path) -> None:
    async with seat(tmp_path) as desk:
        client = desk.connect()
        await client.ask(request(OP.CREATE_JOB))
        desk.service.on_message(wire.Printers(printers=(SECOND,)))
        send = (ipp.uri("job-uri", "ipp://localhost/jobs/1"), ipp.boolean("last-document", True))
        refused = await client.ask(request(OP.SEND_DOCUMENT, *send, printer=None), b"%PDF-")
        assert refused.code == Status.NOT_FOUND


# ---- what does not exist here


NOT_HERE = {
    *(0x03, 0x07, 0x0C, 0x0D, 0x0E, 0x10, 0x11, 0x12, 0x13, 0x14, 0x15, 0x16, 0x22, 0x23, 0x3C),
    *range(0x4003, 0x4005), *range(0x4006, 0x4030), 0x0000, 0x0001, 0x7FFF, 0xFFFF,
}  # fmt: skip


async def test_nothing_administrative_exists(tmp_path: Path) -> None:
    async with seat(tmp_path) as desk:
        client = desk.connect()
        for operation in sorted(NOT_HERE):
            refused = await client.ask(request(operation), b"%PDF- with a document or not")
            assert refused.code == Status.OPERATION_NOT_SUPPORTED, hex(operation)
        assert desk.denied == {Reason.NOT_SUPPORTED: len(NOT_HERE)} and desk.daemon.told == []


def test_texts_are_cut_between_characters() -> None:
    assert answers.plain_text("aé" * 10, 5) == "aéa"
