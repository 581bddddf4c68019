"""Printing through `IppService`: what reaches the spool, what is dropped, and what the client hears."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from nodeagent.errors import Reason
from nodeagent.services.ipp import incoming
from nodeagent.wire import ipp
from nodeagent.wire import seat as wire
from nodeagent.wire.ipp import Status
from tests.fakes.ipp_seat import HEAD, OP, G, chunk, chunked, message_of, post, request, seat
from tests.unit.ipp_captures import CREATE_JOB

PDF = b"%PDF-1.7\n" + bytes(range(256)) * 40
PRINT = request(OP.PRINT_JOB, ipp.name("job-name", "letter"), ipp.name("requesting-user-name", "alice"))


def sent(last: bool, job: int) -> ipp.Request:
    return request(OP.SEND_DOCUMENT, ipp.integer("job-id", job), ipp.boolean("last-document", last))


async def test_print_job(tmp_path: Path) -> None:
    async with seat(tmp_path) as desk:
        response = await desk.connect().ask(PRINT, PDF)
        assert response.code == Status.OK
        assert response.group(G.JOB).integer("job-id") == 1
        assert response.group(G.JOB).integer("job-state") == 3
        assert desk.daemon.document(1).read_bytes() == PDF
        assert desk.daemon.told == [
            wire.CreateJob(request=1, printer="P1", title="letter", user="alice"),
            wire.OpenDocument(request=2, job=1),
            wire.CloseDocument(request=3, job=1, format="application/pdf", size=len(PDF), last=True),
        ]
        counters = desk.service.counters()
        assert counters.connections == 1 and not counters.denied
        assert counters.bytes_in > len(PDF) and counters.bytes_out > 100


async def test_chunks_of_every_size_and_single_bytes(tmp_path: Path) -> None:
    whole = ipp.put_request(PRINT) + PDF[:1500]
    async with seat(tmp_path) as desk:
        client = desk.connect()
        for size in (1, 7, 1000, len(whole)):
            pieces = [whole[at : at + size] for at in range(0, len(whole), size)]
            await client.send(chunked(*pieces))
            assert (await client.read()).ipp.code == Status.OK
        for byte in chunked(whole):
            await client.send(bytes([byte]))
        assert (await client.read()).ipp.code == Status.OK
        assert {desk.daemon.document(job).read_bytes() for job in range(1, 6)} == {PDF[:1500]}


async def test_expect_100_continue(tmp_path: Path) -> None:
    body = ipp.put_request(PRINT) + PDF
    async with seat(tmp_path) as desk:
        client = desk.connect()
        await client.send(HEAD + b"Expect: 100-continue\r\nContent-Length: %d\r\n\r\n" % len(body))
        assert (await client.read()).status == 100
        await client.send(body)
        assert (await client.read()).ipp.code == Status.OK


async def test_requests_that_wait_in_line_are_answered_in_order(tmp_path: Path) -> None:
    async with seat(tmp_path) as desk:
        client = desk.connect()
        requests = [request(OP.GET_PRINTER_ATTRIBUTES, number=number) for number in range(1, 30)]
        document = post(ipp.put_request(PRINT) + PDF)
        await client.send(document + b"".join(post(ipp.put_request(each)) for each in requests) + document)
        assert (await client.read()).ipp.group(G.JOB).integer("job-id") == 1
        assert [(await client.read()).ipp.request_id for _ in requests] == list(range(1, 30))
        assert (await client.read()).ipp.group(G.JOB).integer("job-id") == 2
        assert desk.daemon.document(2).read_bytes() == PDF


async def test_two_documents_of_one_job(tmp_path: Path) -> None:
    async with seat(tmp_path) as desk:
        client = desk.connect()
        created = await client.ask(request(OP.CREATE_JOB, ipp.name("job-name", "two")))
        assert created.group(G.JOB).integer("job-state") == 4
        assert (await client.ask(sent(False, 1), PDF)).code == Status.OK
        assert (await desk.connect().ask(sent(True, 1), b"plain text\n")).code == Status.OK
        assert (desk.daemon.document(1, 0).read_bytes(), desk.daemon.document(1, 1).read_bytes()) == (
            PDF,
            b"plain text\n",
        )
        closed = [(m.format, m.size, m.last) for m in desk.daemon.told if isinstance(m, wire.CloseDocument)]
        assert closed == [("application/pdf", len(PDF), False), ("text/plain", 11, True)]
        late = await client.ask(sent(True, 1), PDF)
        assert (late.code, message_of(late)) == (Status.NOT_POSSIBLE, "job 1 takes no more documents")


@pytest.mark.parametrize("how", ["empty document", "Close-Job"])
async def test_a_job_ends_without_a_further_document(tmp_path: Path, how: str) -> None:
    async with seat(tmp_path) as desk:
        client = desk.connect()
        await client.ask(request(OP.CREATE_JOB))
        await client.ask(sent(False, 1), PDF)
        end = sent(True, 1) if how == "empty document" else request(OP.CLOSE_JOB, ipp.integer("job-id", 1))
        assert (await client.ask(end)).code == Status.OK
        last = desk.daemon.told[-1]
        assert isinstance(last, wire.CloseDocument) and (last.size, last.last) == (0, True)


async def test_one_document_of_a_job_at_a_time(tmp_path: Path) -> None:
    async with seat(tmp_path) as desk:
        slow, fast = desk.connect(), desk.connect()
        await fast.ask(request(OP.CREATE_JOB))
        body = ipp.put_request(sent(True, 1)) + PDF
        await slow.send(post(body)[:-10])
        await desk.daemon.opened.wait()
        refused = await fast.ask(sent(True, 1), PDF)
        assert (refused.code, message_of(refused)) == (Status.NOT_POSSIBLE, "another document of job 1 is on its way")
        assert (await fast.ask(request(OP.CLOSE_JOB, ipp.integer("job-id", 1)))).code == Status.NOT_POSSIBLE
        await slow.send(body[-10:])
        assert (await slow.read()).ipp.code == Status.OK
        assert desk.daemon.document(1).read_bytes() == PDF


# ---- titles, copies and what a job cannot have


async def test_what_lp_asks_for_and_does_not_get(tmp_path: Path) -> None:
    async with seat(tmp_path) as desk:
        client = desk.connect()
        taken = ipp.take_request(CREATE_JOB.replace(b"/printers/raw", b"/printers/P1?"))
        assert taken is not None
        response = await client.ask(taken[0])
        assert response.code == Status.OK_IGNORED_OR_SUBSTITUTED
        refused = {attribute.name: attribute.tag for attribute in response.group(G.UNSUPPORTED).attributes}
        assert refused == {
            "job-cancel-after": ipp.ValueTag.UNSUPPORTED,
            "page-ranges": ipp.ValueTag.UNSUPPORTED,
            "print-color-mode": ipp.ValueTag.KEYWORD,
            "sides": ipp.ValueTag.KEYWORD,
        }
        assert desk.daemon.told == [wire.CreateJob(request=1, printer="P1", title="Brief ü", user="alice", copies=2)]


@pytest.mark.parametrize(
    ("asked", "copies", "status"),
    [
        (ipp.integer("copies", 999), 999, Status.OK),
        (ipp.integer("copies", 0), 1, Status.OK_IGNORED_OR_SUBSTITUTED),
        (ipp.integer("copies", 1000), 1, Status.OK_IGNORED_OR_SUBSTITUTED),
        (ipp.keyword("copies", "many"), 1, Status.OK_IGNORED_OR_SUBSTITUTED),
        (ipp.keyword("media", "na_letter_8.5x11in"), 1, Status.OK),
        (ipp.keyword("media", "paper"), 1, Status.OK_IGNORED_OR_SUBSTITUTED),
        (ipp.collection("media-col", ipp.Collection((ipp.keyword("media-color", "blue"),))), 1, Status.OK_IGNORED_OR_SUBSTITUTED),
        (ipp.collection("media-col", ipp.Collection((ipp.integer("media-size", 1),))), 1, Status.OK_IGNORED_OR_SUBSTITUTED),
        (ipp.integer("media-col", 1), 1, Status.OK_IGNORED_OR_SUBSTITUTED),
    ],
)  # fmt: skip
async def test_job_attributes(tmp_path: Path, asked: ipp.Attribute, copies: int, status: Status) -> None:
    async with seat(tmp_path) as desk:
        client = desk.connect()
        assert (await client.ask(request(OP.VALIDATE_JOB, job=(asked,)))).code == status
        assert (await client.ask(request(OP.CREATE_JOB, job=(asked,)))).code == status
        created = desk.daemon.told[-1]
        assert isinstance(created, wire.CreateJob) and created.copies == copies
        strict = request(OP.CREATE_JOB, ipp.boolean("ipp-attribute-fidelity", True), job=(asked,))
        refused = await client.ask(strict)
        if status != Status.OK:
            assert refused.code == Status.ATTRIBUTES_OR_VALUES_NOT_SUPPORTED
            assert [a.name for a in refused.group(G.UNSUPPORTED).attributes] == [asked.name]
            assert len(desk.daemon.told) == 1


@pytest.mark.parametrize(
    ("title", "cleaned"),
    [
        ("a\x00b\x1b[31m\r\nc\x85\u2028d", "ab[31mcd"),
        ("  ", "Untitled"),
        ("ü" * 300, "ü" * 127),
        ("x" * 300, "x" * 255),
        ("日本語のタイトル", "日本語のタイトル"),
    ],
)
async def test_titles_are_cleaned(tmp_path: Path, title: str, cleaned: str) -> None:
    async with seat(tmp_path) as desk:
        await desk.connect().ask(request(OP.PRINT_JOB, ipp.name("job-name", title)), PDF)
        assert desk.daemon.told[0] == wire.CreateJob(request=1, printer="P1", title=cleaned)


# ---- formats


@pytest.mark.parametrize(
    ("declared", "document", "taken"),
    [
        (None, PDF, "application/pdf"),
        ("application/octet-stream", b"%!PS-Adobe-3.0\n", "application/postscript"),
        ("application/vnd.cups-raw", b"RaS2PwgRaster\0" + bytes(50), "image/pwg-raster"),
        ("text/plain", b"%!PS as text", "text/plain"),
        ("Text/Plain; charset=utf-8", b"x", "text/plain"),
        ("application/pdf", b"%!PS", "application/postscript"),
        ("application/postscript", b"no magic at all", "application/postscript"),
    ],
)
async def test_formats(tmp_path: Path, declared: str | None, document: bytes, taken: str) -> None:
    attributes = () if declared is None else (ipp.mime("document-format", declared),)
    async with seat(tmp_path) as desk:
        assert (await desk.connect().ask(request(OP.PRINT_JOB, *attributes), document)).code == Status.OK
        closed = desk.daemon.told[-1]
        assert isinstance(closed, wire.CloseDocument) and closed.format == taken


@pytest.mark.parametrize(
    ("declared", "document"),
    [
        ("image/gif", b"GIF89a"),
        ("image/urf", b"UNIRAST\0"),
        (None, b"\x89PNG\r\n\x1a\n" + bytes(100)),
        ("application/octet-stream", b"\x00\x01\x02 who knows" * 50_000),
        ("application/pdf", b"UNIRAST\0"),
    ],
)
async def test_a_format_that_the_printer_does_not_take_costs_no_job(
    tmp_path: Path, declared: str | None, document: bytes
) -> None:
    attributes = () if declared is None else (ipp.mime("document-format", declared),)
    async with seat(tmp_path) as desk:
        client = desk.connect()
        refused = await client.ask(request(OP.PRINT_JOB, *attributes), document)
        assert refused.code == Status.DOCUMENT_FORMAT_NOT_SUPPORTED
        assert "takes only application/pdf" in message_of(refused)
        assert desk.daemon.told == [] and desk.denied == {Reason.NOT_SUPPORTED: 1}
        assert (await client.ask(PRINT, PDF)).code == Status.OK  # the connection is still good


async def test_compression_is_refused(tmp_path: Path) -> None:
    async with seat(tmp_path) as desk:
        client = desk.connect()
        refused = await client.ask(request(OP.PRINT_JOB, ipp.keyword("compression", "gzip")), b"\x1f\x8b" + PDF)
        assert refused.code == Status.COMPRESSION_NOT_SUPPORTED
        assert (await client.ask(request(OP.PRINT_JOB, ipp.keyword("compression", "none")), PDF)).code == Status.OK


# ---- a half-sent job never prints


def closes(desk_told: list[wire.Message]) -> list[wire.Message]:
    return [message for message in desk_told if isinstance(message, wire.CloseDocument)]


@pytest.mark.parametrize("framing", ["length", "chunks"])
async def test_a_client_that_leaves_in_the_middle(tmp_path: Path, framing: str) -> None:
    body = ipp.put_request(PRINT) + PDF
    whole = post(body) if framing == "length" else chunked(body)
    async with seat(tmp_path) as desk:
        client = desk.connect()
        await client.send(whole[:-20])
        await desk.daemon.opened.wait()
        client.close()
        await desk.daemon.dropped.wait()
        assert desk.daemon.told[-1] == wire.DropDocument(job=1, reason=Reason.MALFORMED)
        assert not closes(desk.daemon.told)


async def test_a_client_that_stops_in_the_middle(tmp_path: Path) -> None:
    async with seat(tmp_path, idle_s=0.1) as desk:
        client = desk.connect()
        await client.send(post(ipp.put_request(PRINT) + PDF)[:-20])
        assert (await client.read()).status == 408
        assert await client.ended()
        assert desk.daemon.told[-1] == wire.DropDocument(job=1, reason=Reason.TOO_SLOW)
        assert not closes(desk.daemon.told) and desk.denied == {Reason.TOO_SLOW: 1}


async def test_a_broken_chunk_in_the_middle(tmp_path: Path) -> None:
    async with seat(tmp_path) as desk:
        client = desk.connect()
        head = HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + chunk(ipp.put_request(PRINT) + PDF)
        await client.send(head)
        await desk.daemon.opened.wait()
        await client.send(b"nothing hexadecimal\r\n")
        assert (await client.read()).status == 400
        assert await client.ended()
        assert desk.daemon.told[-1] == wire.DropDocument(job=1, reason=Reason.MALFORMED)
        assert not closes(desk.daemon.told)


async def test_a_document_that_is_too_large(tmp_path: Path) -> None:
    async with seat(tmp_path, max_bytes=100_000) as desk:
        client = desk.connect()
        await client.send(chunked(ipp.put_request(PRINT), PDF * 20))
        refused = (await client.read()).ipp
        assert (refused.code, message_of(refused)) == (
            Status.REQUEST_ENTITY_TOO_LARGE,
            "a document may have 100000 bytes",
        )
        assert desk.daemon.told[-1] == wire.DropDocument(job=1, reason=Reason.TOO_LARGE)
        assert desk.daemon.document(1).stat().st_size <= 100_000
        assert not closes(desk.daemon.told)
        assert (await client.ask(PRINT, PDF)).code == Status.OK


async def test_a_length_that_is_too_large_is_refused_before_the_body(tmp_path: Path) -> None:
    async with seat(tmp_path, max_bytes=100_000) as desk:
        client = desk.connect()
        await client.send(HEAD + b"Expect: 100-continue\r\nContent-Length: 200000\r\n\r\n")
        assert (await client.read()).status == 413
        assert await client.ended()
        assert desk.daemon.told == [] and desk.denied == {Reason.TOO_LARGE: 1}


async def test_an_endless_document_is_cut(tmp_path: Path) -> None:
    async with seat(tmp_path, max_bytes=100_000) as desk:
        client = desk.connect()
        await client.send(HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + chunk(ipp.put_request(PRINT)))

        async def endless() -> None:
            while True:
                await client.send(chunk(PDF * 20))

        flood = asyncio.ensure_future(endless())
        assert (await client.read()).status == 413
        with pytest.raises(ConnectionError):
            await flood
        assert desk.daemon.told[-1] == wire.DropDocument(job=1, reason=Reason.TOO_LARGE)


async def test_a_job_cancelled_while_it_comes_in(tmp_path: Path) -> None:
    body = ipp.put_request(PRINT) + PDF
    async with seat(tmp_path) as desk:
        client, other = desk.connect(), desk.connect()
        await client.send(post(body)[:-20])
        await desk.daemon.opened.wait()
        assert (await other.ask(request(OP.CANCEL_JOB, ipp.integer("job-id", 1)))).code == Status.OK
        await client.send(body[-20:])
        refused = (await client.read()).ipp
        assert (refused.code, message_of(refused)) == (
            Status.JOB_CANCELED,
            "job 1 was cancelled while it came in",
        )
        assert not closes(desk.daemon.told)


async def test_a_worker_that_stops_drops_what_is_half(tmp_path: Path) -> None:
    with pytest.raises(asyncio.CancelledError):
        async with seat(tmp_path) as desk:
            await desk.connect().send(post(ipp.put_request(PRINT) + PDF)[:-20])
            await desk.daemon.opened.wait()
            raise asyncio.CancelledError
    assert desk.daemon.told[-1] == wire.DropDocument(job=1, reason=Reason.NOT_RUNNING)


async def test_a_worker_that_stops_leaves_what_is_whole_to_the_daemon(tmp_path: Path) -> None:
    closing = asyncio.Event()
    with pytest.raises(asyncio.CancelledError):
        async with seat(tmp_path) as desk:
            ask = desk.daemon.ask

            async def never_answered(message: wire.Message) -> tuple[wire.ToWorker, int | None]:
                if isinstance(message, wire.CloseDocument):
                    closing.set()
                    await asyncio.Event().wait()
                return await ask(message)

            desk.daemon.ask = never_answered  # type: ignore[method-assign]
            await desk.connect().send(post(ipp.put_request(PRINT) + PDF))
            await closing.wait()
            raise asyncio.CancelledError
    assert desk.daemon.heard(wire.DropDocument) == []


async def test_the_daemon_forgets_a_job_at_once(tmp_path: Path) -> None:
    async with seat(tmp_path) as desk:
        client = desk.connect()
        await client.send(post(ipp.put_request(PRINT) + PDF)[:-5])
        await desk.daemon.opened.wait()
        desk.service.on_message(wire.Jobs(jobs=()))
        desk.daemon.tell_jobs = lambda: None  # type: ignore[method-assign]
        await client.send(PDF[-5:])
        assert (await client.read()).ipp.group(G.JOB).integer("job-id") == 1


async def test_a_job_whose_documents_never_come_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(incoming, "OPERATION_TIMEOUT_S", 0.05)
    async with seat(tmp_path) as desk:
        client = desk.connect()
        await client.ask(request(OP.CREATE_JOB))
        await desk.daemon.dropped.wait()
        assert desk.daemon.told[-1] == wire.DropDocument(job=1, reason=Reason.TOO_SLOW)
        assert (await client.ask(sent(True, 1), PDF)).code == Status.NOT_POSSIBLE


# ---- the daemon says no


@pytest.mark.parametrize(
    ("reason", "status"),
    [
        (Reason.TOO_MANY, Status.TOO_MANY_JOBS),
        (Reason.TOO_LARGE, Status.REQUEST_ENTITY_TOO_LARGE),
        (Reason.UPSTREAM_UNAVAILABLE, Status.SERVICE_UNAVAILABLE),
        (Reason.INTERNAL, Status.INTERNAL_ERROR),
    ],
)
@pytest.mark.parametrize("at", [wire.CreateJob, wire.OpenDocument, wire.CloseDocument])
async def test_the_daemon_refuses(tmp_path: Path, reason: Reason, status: Status, at: type[wire.Message]) -> None:
    async with seat(tmp_path) as desk:
        desk.daemon.refuse[at] = reason
        client = desk.connect()
        refused = await client.ask(PRINT, PDF)
        assert (refused.code, message_of(refused)) == (status, "the daemon says no")
        assert desk.denied == {reason: 1}
        if at is not wire.CreateJob:
            assert desk.daemon.told[-1] == wire.DropDocument(job=1, reason=reason)


async def test_the_daemon_is_gone(tmp_path: Path) -> None:
    async with seat(tmp_path) as desk:
        desk.daemon.gone = True
        refused = await desk.connect().ask(PRINT, PDF)
        assert (refused.code, message_of(refused)) == (
            Status.SERVICE_UNAVAILABLE,
            "the agent of this node has stopped",
        )


async def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(fd: int, parts: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.writev", full)
    async with seat(tmp_path) as desk:
        refused = await desk.connect().ask(PRINT, PDF)
        assert refused.code == Status.SERVICE_UNAVAILABLE
        assert message_of(refused) == "cannot store the document: No space left on device"
        assert desk.daemon.told[-1] == wire.DropDocument(job=1, reason=Reason.UPSTREAM_UNAVAILABLE)
