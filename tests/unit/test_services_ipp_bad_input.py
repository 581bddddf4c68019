"""Bytes that are no print job: each gets a precise answer, costs only its own connection and is counted."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nodeagent.errors import Reason
from nodeagent.services.ipp.formats import sniff
from nodeagent.wire import ipp
from nodeagent.wire.ipp import Status
from tests.fakes.ipp_seat import HEAD, OP, G, chunk, chunked, message_of, post, request, seat
from tests.unit.ipp_captures import ALL_TYPES, CREATE_JOB, SEND_DOCUMENT

LOOK = ipp.put_request(request(OP.GET_PRINTER_ATTRIBUTES))

# ---- HTTP


@pytest.mark.parametrize(
    ("data", "status", "reason"),
    [
        (b"GET /printers/P1.ppd HTTP/1.1\r\nHost: x\r\n\r\n", 404, None),
        (b"GET / HTTP/1.0\r\n\r\n", 404, None),
        (b"PUT /admin/conf/cupsd.conf HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\n\r\nabc", 405, Reason.NOT_SUPPORTED),
        (b"OPTIONS * HTTP/1.1\r\nHost: x\r\n\r\n", 405, Reason.NOT_SUPPORTED),
        (b"CONNECT x:1 HTTP/1.1\r\nHost: x\r\n\r\n", 405, Reason.NOT_SUPPORTED),
        (b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\n\r\nx", 415, Reason.NOT_SUPPORTED),
        (b"POST / HTTP/1.1\r\nHost: x\r\nContent-Type: text/html\r\n\r\n", 415, Reason.NOT_SUPPORTED),
        (HEAD + b"\r\n", 411, Reason.MALFORMED),
        (HEAD + b"Content-Encoding: gzip\r\nContent-Length: 1\r\n\r\nx", 415, Reason.NOT_SUPPORTED),
        (HEAD + b"Transfer-Encoding: gzip\r\n\r\n", 501, Reason.MALFORMED),
        (HEAD + b"Transfer-Encoding: chunked\r\nContent-Length: 1\r\n\r\n", 400, Reason.MALFORMED),
        (HEAD + b"Content-Length: -1\r\n\r\n", 400, Reason.MALFORMED),
        (HEAD + b"Content-Length: 1\r\nContent-Length: 2\r\n\r\n", 400, Reason.MALFORMED),
        (HEAD + b"Content-Length: 9999999999999\r\n\r\n", 413, Reason.TOO_LARGE),
        (b"POST / HTTP/1.1\r\nContent-Type: application/ipp\r\nContent-Length: 0\r\n\r\n", 400, Reason.MALFORMED),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", 400, Reason.MALFORMED),
        (b"hello\r\n\r\n", 400, Reason.MALFORMED),
        (LOOK + b"\r\n\r\n", 400, Reason.MALFORMED),
        (HEAD + b"X: " + b"y" * 20_000, 431, Reason.TOO_LARGE),
        (b"POST /" + b"x" * 20_000, 431, Reason.TOO_LARGE),
        (HEAD + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n", 400, Reason.MALFORMED),
        (HEAD + b"Transfer-Encoding: chunked\r\n\r\n1;" + b"x" * 2000, 400, Reason.MALFORMED),
        (post(b"\x02\x00"), 400, Reason.MALFORMED),
        (post(b""), 400, Reason.MALFORMED),
    ],
)
async def test_http(tmp_path: Path, data: bytes, status: int, reason: Reason | None) -> None:
    async with seat(tmp_path) as desk:
        client, other = desk.connect(), desk.connect()
        await client.send(data)
        answer = await client.read()
        assert (answer.status, answer.headers["content-type"]) == (status, "text/plain")
        assert answer.body.endswith(b"\n")
        assert desk.denied == ({} if reason is None else {reason: 1})
        assert (await other.ask(request(OP.GET_PRINTER_ATTRIBUTES))).code == Status.OK


async def test_a_connection_survives_what_is_only_not_there(tmp_path: Path) -> None:
    """libcups looks for a PPD file and goes on with the same connection."""
    async with seat(tmp_path) as desk:
        client = desk.connect()
        await client.send(b"GET /printers/P1.ppd HTTP/1.1\r\nHost: x\r\n\r\n")
        assert (await client.read()).status == 404
        await client.send(b"HEAD /printers/P1.png HTTP/1.1\r\nHost: x\r\n\r\n")
        assert (await client.read(head=True)).status == 404
        await client.send(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Type: text/html\r\nContent-Length: 3\r\n\r\nabc")
        assert (await client.read()).status == 415
        assert (await client.ask(request(OP.GET_PRINTER_ATTRIBUTES))).code == Status.OK


@pytest.mark.parametrize("extra", [b"Connection: close\r\n", b"Connection: TE, Close\r\n"])
async def test_a_client_that_wants_to_end(tmp_path: Path, extra: bytes) -> None:
    async with seat(tmp_path) as desk:
        client = desk.connect()
        await client.send(post(LOOK, extra))
        answer = await client.read()
        assert answer.ipp.code == Status.OK and answer.headers["connection"] == "close"
        assert await client.ended()


async def test_http_1_0_is_answered_and_ended(tmp_path: Path) -> None:
    async with seat(tmp_path) as desk:
        client = desk.connect()
        await client.send(post(LOOK).replace(b"HTTP/1.1", b"HTTP/1.0", 1))
        assert (await client.read()).ipp.code == Status.OK
        assert await client.ended()


@pytest.mark.parametrize("data", [b"P", HEAD, post(LOOK)[:-3], HEAD + b"Transfer-Encoding: chunked\r\n\r\n4"])
async def test_a_slow_head(tmp_path: Path, data: bytes) -> None:
    async with seat(tmp_path, idle_s=0.1) as desk:
        client = desk.connect()
        await client.send(data)
        assert (await client.read()).status == 408
        assert await client.ended()
        assert desk.denied == {Reason.TOO_SLOW: 1}


async def test_dripping_does_not_stretch_the_time_of_a_head(tmp_path: Path) -> None:
    async with seat(tmp_path, idle_s=0.2) as desk:
        client = desk.connect()

        async def drip() -> None:
            await client.send(HEAD)
            while True:
                await client.send(b"X: y\r\n")
                await asyncio.sleep(0.02)

        dripping = asyncio.ensure_future(drip())
        assert (await client.read()).status == 408
        with pytest.raises(ConnectionError):
            await dripping


async def test_a_silent_connection_is_closed_without_a_word(tmp_path: Path) -> None:
    async with seat(tmp_path, idle_s=0.1) as desk:
        silent, spoke = desk.connect(), desk.connect()
        await spoke.ask(request(OP.GET_PRINTER_ATTRIBUTES))
        assert await silent.ended() and await spoke.ended()
        assert desk.denied == {}


async def test_a_client_that_never_reads_holds_only_its_own_connection(tmp_path: Path) -> None:
    async with seat(tmp_path, idle_s=0.3) as desk:
        deaf, client = desk.connect(), desk.connect()
        all_of_it = ipp.put_request(
            request(OP.GET_PRINTER_ATTRIBUTES, ipp.keyword("requested-attributes", "all", "media-col-database"))
        )

        async def shout() -> None:
            while True:
                await deaf.send(post(all_of_it))

        shouting = asyncio.ensure_future(shout())
        for _ in range(20):
            assert (await client.ask(request(OP.GET_PRINTER_ATTRIBUTES))).code == Status.OK
        with pytest.raises(ConnectionError):
            await shouting


@pytest.mark.parametrize("data", [b"POST", HEAD + b"Content-Length: 300\r\n\r\n" + LOOK, chunked(LOOK)[:-9]])
async def test_a_client_that_leaves(tmp_path: Path, data: bytes) -> None:
    async with seat(tmp_path) as desk:
        client = desk.connect()
        await client.send(data)
        client.close()
    assert desk.denied == {} and desk.daemon.told == []


async def test_an_endless_body_after_a_question(tmp_path: Path) -> None:
    async with seat(tmp_path, max_bytes=1000) as desk:
        client = desk.connect()
        await client.send(HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + chunk(LOOK))

        async def endless() -> None:
            while True:
                await client.send(chunk(b"x" * 50_000))

        flood = asyncio.ensure_future(endless())
        assert (await client.read()).status == 413
        with pytest.raises(ConnectionError):
            await flood


# ---- IPP


def raw(attributes: str, header: str = "0200000b00000007") -> bytes:
    return bytes.fromhex(header + attributes.replace(" ", ""))


CHARSET = "47 0012 617474726962757465732d63686172736574 0005 7574662d38"
LANGUAGE = "48 001b 617474726962757465732d6e61747572616c2d6c616e6775616765 0002 656e"
LATIN = "47 0012 617474726962757465732d63686172736574 000a 69736f2d383835392d31"


@pytest.mark.parametrize(
    ("data", "status", "message"),
    [
        (raw("03"), Status.BAD_REQUEST, "the first group must be operation attributes"),
        (raw("02 03"), Status.BAD_REQUEST, "the first group must be operation attributes"),
        (raw("01 03"), Status.BAD_REQUEST, "attributes-charset and attributes-natural-language must come first"),
        (raw(f"01{LANGUAGE}{CHARSET}03"), Status.BAD_REQUEST, "must come first"),
        (raw(f"01{LATIN}{LANGUAGE}03"), Status.CHARSET_NOT_SUPPORTED, "only utf-8 is spoken here"),
        (raw(f"01{CHARSET}{LANGUAGE}03"), Status.BAD_REQUEST, "printer-uri is missing"),
        (raw(f"01{CHARSET}{LANGUAGE}45 000b 7072696e7465722d757269 0001 78 03"), Status.BAD_REQUEST, "no IPP URI"),
        (raw(f"01{CHARSET}{LANGUAGE}21 000b 7072696e7465722d757269 0004 00000001 03"), Status.BAD_REQUEST,
         "printer-uri must be text, not integer"),
        (raw(f"01{CHARSET}{LANGUAGE}03", "0900000b00000007"), Status.VERSION_NOT_SUPPORTED, "IPP 9.0 is not spoken here"),
        (raw(f"01{CHARSET}{LANGUAGE}03", "0200000b00000000"), Status.BAD_REQUEST, "request-id 0 is not positive"),
        (raw(f"01{CHARSET}{LANGUAGE}03", "0200000bffffffff"), Status.BAD_REQUEST, "request-id -1 is not positive"),
        (raw(f"01{CHARSET}{CHARSET}03"), Status.BAD_REQUEST, "'attributes-charset' appears twice"),
        (raw(f"01{CHARSET}{LANGUAGE}00 03"), Status.BAD_REQUEST, "offset 71: group tag 0x00 is reserved"),
        (raw(f"01{CHARSET}"), Status.BAD_REQUEST, "the request ends before its attributes do"),
        (raw("01") + b"\x42\x00\x01a\x7f\xff" + bytes(32767) + b"\x42\x00\x01b\x7f\xff" + bytes(32767),
         Status.BAD_REQUEST, "attributes are over 65536 bytes"),
        (LOOK + b"a document", Status.BAD_REQUEST, "a document after an operation that takes none"),
    ],
)  # fmt: skip
async def test_ipp(tmp_path: Path, data: bytes, status: Status, message: str) -> None:
    async with seat(tmp_path) as desk:
        client = desk.connect()
        for body in (post(data), chunked(data)):
            await client.send(body)
            response = (await client.read()).ipp
            assert response.code == status and message in message_of(response)
            assert response.request_id == int.from_bytes(data[4:8], "big", signed=True)
            assert response.groups[0].tag == G.OPERATION
        assert sum(desk.denied.values()) == 2
        assert (await client.ask(request(OP.GET_PRINTER_ATTRIBUTES))).code == Status.OK


@pytest.mark.parametrize(
    ("asked", "told"),
    [((1, 0), (1, 1)), ((1, 1), (1, 1)), ((2, 0), (2, 0)), ((2, 2), (2, 0)), ((3, 0), (2, 0))],
)
async def test_versions(tmp_path: Path, asked: tuple[int, int], told: tuple[int, int]) -> None:
    async with seat(tmp_path) as desk:
        response = await desk.connect().ask(request(OP.GET_PRINTER_ATTRIBUTES, version=asked))
        assert response.version == told
        assert response.code == (Status.OK if asked[0] < 3 else Status.VERSION_NOT_SUPPORTED)


@pytest.mark.parametrize(
    ("bad", "status"),
    [
        (request(OP.PRINT_JOB), Status.BAD_REQUEST),
        (request(OP.SEND_DOCUMENT, ipp.integer("job-id", 1)), Status.BAD_REQUEST),
        (request(OP.SEND_DOCUMENT, ipp.integer("job-id", 1), ipp.boolean("last-document", False)), Status.BAD_REQUEST),
        (request(OP.SEND_DOCUMENT, ipp.integer("job-id", 1), ipp.integer("last-document", 1)), Status.BAD_REQUEST),
        (request(OP.CANCEL_JOB), Status.BAD_REQUEST),
        (request(OP.CANCEL_JOB, ipp.integer("job-id", 1), printer=None), Status.BAD_REQUEST),
        (request(OP.GET_JOBS, ipp.integer("limit", 0)), Status.BAD_REQUEST),
        (request(OP.GET_JOBS, ipp.keyword("limit", "all")), Status.BAD_REQUEST),
        (request(OP.GET_JOBS, ipp.integer("my-jobs", 1)), Status.BAD_REQUEST),
        (request(OP.GET_JOBS, ipp.keyword("which-jobs", "theirs")), Status.ATTRIBUTES_OR_VALUES_NOT_SUPPORTED),
        (request(OP.GET_PRINTER_ATTRIBUTES, ipp.integer("requested-attributes", 1)), Status.BAD_REQUEST),
    ],
)
async def test_operations(tmp_path: Path, bad: ipp.Request, status: Status) -> None:
    async with seat(tmp_path) as desk:
        client = desk.connect()
        await client.ask(request(OP.CREATE_JOB))
        assert (await client.ask(bad)).code == status
        assert len(desk.daemon.told) == 1


async def test_a_format_name_that_grows_when_it_is_lowered(tmp_path: Path) -> None:
    async with seat(tmp_path) as desk:
        bad = request(OP.PRINT_JOB, ipp.mime("document-format", "İ" * 16_000))
        assert (await desk.connect().ask(bad, b"x")).code == Status.DOCUMENT_FORMAT_NOT_SUPPORTED


# ---- formats


@pytest.mark.parametrize(
    ("start", "found"),
    [
        (b"%PDF-1.4\n", "application/pdf"),
        (b"junk before\n%PDF-1.4\n", "application/pdf"),
        (b"%!PS-Adobe-3.0\n", "application/postscript"),
        (b"\x04%!PS", "application/postscript"),
        (b"RaS2PwgRaster\0", "image/pwg-raster"),
        (b"RaS2MediaClass", "application/vnd.cups-raster"),
        (b"RaS3", "application/vnd.cups-raster"),
        (b"UNIRAST\0\0\0\0\x01", "image/urf"),
        (b"\x89PNG\r\n\x1a\n", "image/png"),
        (b"\xff\xd8\xff\xe0", "image/jpeg"),
        (b"\x1bE\x1b&l1X", "application/vnd.hp-pcl"),
        (b"\x1b%-12345X@PJL\r\n@PJL ENTER LANGUAGE = POSTSCRIPT\r\n%!PS", "application/postscript"),
        (b"\x1b%-12345X@PJL ENTER LANGUAGE=PCL\r\n", "application/vnd.hp-pcl"),
        (b"\x1b%-12345X@PJL ENTER LANGUAGE=PCLXL\r\n", "application/vnd.hp-pclxl"),
        (b"\x1b%-12345X%PDF-1.4", "application/pdf"),
        (b"\x1b%-12345X\x1bE", "application/vnd.hp-pcl"),
        (b"plain\ttext\r\n\x0c", "text/plain"),
        ("Grüße, 你好".encode(), "text/plain"),
        (("x" * 1023 + "é").encode()[:1024], "text/plain"),
        (b"latin-1: \xe9t\xe9", None),
        (b"\x00\x01", None),
        (b"\x1b[31mred", None),
        (b"", None),
    ],
)
def test_sniff(start: bytes, found: str | None) -> None:
    assert sniff(start) == found


# ---- anything at all


@given(st.sampled_from([CREATE_JOB, SEND_DOCUMENT, ALL_TYPES, LOOK]), st.data())
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_damaged_requests_are_answered_or_the_connection_ends(tmp_path: Path, data: bytes, draw: st.DataObject) -> None:
    http = draw.draw(st.booleans())
    damaged = bytearray(post(data) if http else data)
    for _ in range(draw.draw(st.integers(1, 5))):
        damaged[draw.draw(st.integers(0, len(damaged) - 1))] = draw.draw(st.integers(0, 255))

    async def conversation() -> None:
        async with seat(tmp_path) as desk:
            client, other = desk.connect(), desk.connect()
            await client.send(bytes(damaged) if http else post(bytes(damaged)))
            client.sock.shutdown(1)
            try:
                while True:
                    await client.read()
            except (EOFError, ConnectionResetError):
                pass
            assert (await other.ask(request(OP.GET_PRINTER_ATTRIBUTES))).code == Status.OK
            for file in tmp_path.iterdir():
                file.unlink()

    asyncio.run(conversation())
