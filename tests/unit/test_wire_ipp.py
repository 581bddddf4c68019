"""The IPP codec: bytes of the real programs whole, one by one and with more behind them; then everything else."""

from __future__ import annotations

import time
from datetime import UTC, datetime, timedelta, timezone

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nodeagent.wire import ipp
from nodeagent.wire.ipp import Attribute, Collection, GroupTag, IppError, Operation, Range, Resolution, Value, ValueTag
from tests.unit.ipp_captures import ALL_TYPES, CREATE_JOB, JOBS, SEND_DOCUMENT

HEAD = bytes.fromhex("0200000b00000001")
CHARSET = bytes.fromhex("470012617474726962757465732d6368617273657400057574662d38")


def take(data: bytes) -> ipp.Request:
    taken = ipp.take_request(data)
    assert taken is not None
    return taken[0]


def size(across: int, along: int) -> Collection:
    return Collection((ipp.integer("x-dimension", across), ipp.integer("y-dimension", along)))


# ---- what the real programs send


def test_create_job_of_lp() -> None:
    request = take(CREATE_JOB)
    assert (request.version, request.code, request.request_id) == ((2, 0), Operation.CREATE_JOB, 4)
    assert [group.tag for group in request.groups] == [GroupTag.OPERATION, GroupTag.JOB]
    operation, job = request.groups
    assert operation.text("job-name") == "Brief ü"
    assert operation.text("requesting-user-name") == "alice"
    assert job.integer("copies") == 2
    assert job.texts("job-sheets") == ("none", "none")
    assert job.get("page-ranges") == ipp.range_of_integer("page-ranges", Range(1, 3))
    assert job.get("printer-resolution") == ipp.resolution("printer-resolution", Resolution(600, 600))
    assert job.get("media-col") == ipp.collection(
        "media-col",
        Collection((ipp.collection("media-size", size(21000, 29700)), ipp.keyword("media-source", "tray-1"))),
    )


def test_send_document_of_lp_leaves_its_document() -> None:
    taken = ipp.take_request(SEND_DOCUMENT)
    assert taken is not None
    request, used = taken
    assert SEND_DOCUMENT[used:] == b"hello\n"
    assert request.groups[0].boolean("last-document") is True
    assert request.groups[0].integer("job-id") == 4


def test_every_type() -> None:
    job = take(ALL_TYPES).group(GroupTag.JOB)
    assert job.get("finishings") == ipp.enum("finishings", 3, 4)
    assert job.get("page-ranges") == ipp.range_of_integer("page-ranges", Range(1, 4), Range(7, 9))
    assert job.get("printer-resolution") == ipp.resolution("printer-resolution", Resolution(600, 300))
    assert job.get("job-password") == ipp.octets("job-password", b"abc")
    assert job.get("job-hold-until") == ipp.no_value("job-hold-until")
    assert job.get("x-scheme") == ipp.uri_scheme("x-scheme", "ipp")
    zone = timezone(timedelta(hours=8))
    assert job.get("x-date") == ipp.date_time("x-date", datetime(2026, 11, 21, 9, 30, 15, tzinfo=zone))
    text = Value(ValueTag.TEXT_WITH_LANGUAGE, ipp.Localized("hallo", ""))
    assert job.get("x-text") == Attribute("x-text", (text,))
    media = Collection((ipp.collection("media-size", size(21000, 29700)), ipp.keyword("media-type", "stationery")))
    assert job.get("overrides") == ipp.collection(
        "overrides",
        Collection((ipp.range_of_integer("pages", Range(1, 2)), ipp.collection("media-col", media))),
        Collection((ipp.boolean("last", True),)),
    )


def test_jobs_of_cupsd() -> None:
    taken = ipp.take_response(JOBS)
    assert taken is not None
    response, used = taken
    assert used == len(JOBS) and response.successful
    first, second = response.groups_of(GroupTag.JOB)
    assert (first.integer("job-id"), second.integer("job-id")) == (4, 5)
    assert second.text("job-state-reasons") == "job-incoming"
    assert first.integer("time-at-completed") is None
    assert first.get("date-time-at-creation") == ipp.date_time(
        "date-time-at-creation", datetime(2026, 11, 21, 9, 51, 17, tzinfo=UTC)
    )


@pytest.mark.parametrize("data", [CREATE_JOB, SEND_DOCUMENT, ALL_TYPES])
def test_bytes_come_one_by_one(data: bytes) -> None:
    whole = ipp.take_request(data)
    assert whole is not None
    extent = ipp.Extent()
    for have in range(whole[1]):
        assert ipp.take_request(data[:have]) is None
        assert extent.reach(data[:have]) is None
    assert extent.reach(data) == whole[1]


@pytest.mark.parametrize("data", [CREATE_JOB, SEND_DOCUMENT, ALL_TYPES])
def test_what_follows_is_not_looked_at(data: bytes) -> None:
    whole = ipp.take_request(data)
    assert whole is not None
    for rest in (b"\x03", b"\xff" * 100, data):
        assert ipp.take_request(data[: whole[1]] + rest) == whole


@pytest.mark.parametrize("data", [CREATE_JOB, SEND_DOCUMENT[:-6], ALL_TYPES])
def test_requests_are_put_as_they_came(data: bytes) -> None:
    assert ipp.put_request(take(data)) == data


def test_responses_are_put_as_they_came() -> None:
    taken = ipp.take_response(JOBS)
    assert taken is not None
    assert ipp.put_response(taken[0]) == JOBS


# ---- what is refused, and where


@pytest.mark.parametrize(
    ("tail", "offset", "what"),
    [
        ("00", 8, "reserved"),
        ("2100016100040000000103", 8, "before any group"),
        ("01210000000400000001", 9, "without an attribute"),
        ("012100016100030000010121000162000400000001", 15, "3 bytes, must be 4"),
        ("012200016100010203", 15, "neither 0 nor 1"),
        ("0133000161000400000001", 15, "must be 8"),
        ("0132000161000400000001", 15, "must be 9"),
        ("01310001610002000003", 15, "must be 11"),
        ("013100016100" + "0b" + "07ea0d0100000000" + "2b0000", 15, "impossible dateTime"),
        ("013100016100" + "0b" + "07ea010100000000" + "200000", 15, "impossible dateTime"),
        ("01420001610002c32803", 15, "not UTF-8"),
        ("0142000280810001" + "61", 12, "not UTF-8"),
        ("013500016100020000", 15, "do not add up"),
        ("0136000161000800026465000361" + "62", 15, "do not add up"),
        ("01370001610000", 9, "outside a collection"),
        ("014a00016100016103", 9, "outside a collection"),
        ("01340001610000", 9, "without an end"),
        ("013400016100004a000000016102", 9, "without an end"),
        ("0134000161000021000000040000000137000000" + "00", 15, "before its member name"),
        ("0134000161000021000162000400000001", 15, "named attribute inside"),
        ("013400016100004a0000000162" + "3700000000", 21, "has no value"),
        ("013400016100004a00000000", 15, "without a name"),
        ("01480100", 10, "name of 256 bytes"),
        ("014200016180000000", 13, "value of 32768 bytes"),
    ],
)
def test_a_precise_error(tail: str, offset: int, what: str) -> None:
    with pytest.raises(IppError, match=what) as caught:
        ipp.take_request(HEAD + bytes.fromhex(tail) + b"\x03")
    assert caught.value.offset == offset
    assert str(caught.value).startswith(f"offset {offset}: ")


def test_an_attribute_twice_in_a_group() -> None:
    with pytest.raises(IppError, match="'attributes-charset' appears twice"):
        ipp.take_request(HEAD + b"\x01" + CHARSET + CHARSET + b"\x03")
    assert ipp.take_request(HEAD + b"\x01" + CHARSET + b"\x02" + CHARSET + b"\x03") is not None


def nested(depth: int) -> bytes:
    opened = bytes.fromhex("3400000000") + bytes.fromhex("4a0000000161")
    return (
        HEAD + b"\x01" + bytes.fromhex("3400016100004a0000000161") + opened * (depth - 1)
        + bytes.fromhex("210000000400000001") + bytes.fromhex("3700000000") * depth + b"\x03"
    )  # fmt: skip


def test_collections_nest_eight_deep() -> None:
    assert ipp.take_request(nested(8)) is not None
    with pytest.raises(IppError, match="nested deeper than 8"):
        ipp.take_request(nested(9))


def test_an_endless_section_is_refused_at_its_limit() -> None:
    name = b"\x42\x00\x01a" + b"\x10\x00" + b"x" * 4096
    with pytest.raises(IppError, match="attributes are over 65536 bytes"):
        ipp.take_request(HEAD + b"\x01" + name * 16)
    extent, data = ipp.Extent(), HEAD + b"\x01"
    with pytest.raises(IppError, match="attributes are over"):
        for _ in range(20):
            data += name
            assert extent.reach(data) is None


def test_the_largest_section_fits() -> None:
    fill = b"\x41\x00\x01a" + (32767).to_bytes(2, "big") + b"x" * 32767
    rest = 65536 - len(HEAD) - 1 - len(fill) - 1 - 6
    data = HEAD + b"\x01" + fill + b"\x41\x00\x01b" + rest.to_bytes(2, "big") + b"y" * rest + b"\x03"
    assert len(data) == 65536
    assert ipp.take_request(data) is not None
    assert ipp.take_request(data[:-1]) is None


def test_too_many_values_and_groups() -> None:
    with pytest.raises(IppError, match="more than 2000 values"):
        ipp.take_request(HEAD + b"\x01\x44\x00\x01a\x00\x00" + b"\x44\x00\x00\x00\x00" * 2000 + b"\x03")
    with pytest.raises(IppError, match="more than 2000 values"):
        ipp.take_request(HEAD + b"\x01" * 2001 + b"\x03")


def test_unknown_tags_stay_bytes_and_out_of_band_values_are_none() -> None:
    data = (
        HEAD + b"\x0b" + bytes.fromhex("7f000161000201ff" + "13000162000178" + "43000163000179" + "15000164000000"[:12])
    )
    group = take(data + b"\x03").groups[0]
    assert group.tag == 0x0B
    assert [(a.tag, a.data) for a in group.attributes] == [
        (0x7F, b"\x01\xff"),
        (0x13, None),
        (0x43, b"y"),
        (0x15, None),
    ]


def test_a_header_is_known_before_the_rest() -> None:
    assert ipp.take_header(HEAD[:7]) is None
    assert ipp.take_header(HEAD + b"\x00") == ipp.Header((2, 0), 0x0B, 1)
    assert ipp.take_header(bytes.fromhex("0901fffffffffff7")) == ipp.Header((9, 1), 0xFFFF, -9)


def test_readers_say_what_has_the_wrong_type() -> None:
    group = ipp.Group(GroupTag.JOB, (ipp.integer("copies", 1), ipp.keyword("sides", "x"), ipp.boolean("b", True)))
    with pytest.raises(IppError, match="copies must be text, not integer"):
        group.text("copies")
    with pytest.raises(IppError, match="sides must be a number, not keyword"):
        group.integer("sides")
    with pytest.raises(IppError, match="b must be a number, not boolean"):
        group.integer("b")
    with pytest.raises(IppError, match="copies must be a boolean"):
        group.boolean("copies")
    assert (group.text("x"), group.integer("x"), group.boolean("x"), group.texts("x")) == (None, None, None, ())


@pytest.mark.parametrize(
    "attribute",
    [
        ipp.integer("n", 2**31),
        ipp.keyword("k", "x" * 32768),
        ipp.keyword("k" * 256, "x"),
        ipp.date_time("d", datetime(2026, 1, 1)),
        ipp.resolution("r", Resolution(1, 2**31)),
    ],
)
def test_what_has_no_encoding_is_a_value_error(attribute: Attribute) -> None:
    with pytest.raises(ValueError):
        ipp.put_request(ipp.Request((2, 0), 2, 1, (ipp.Group(GroupTag.JOB, (attribute,)),)))


def test_an_attribute_has_a_value() -> None:
    with pytest.raises(ValueError, match="has no value"):
        ipp.keyword("k")


# ---- anything at all


def check_any(data: bytes) -> None:
    """Nothing but the documented error, in bounded time; what is understood says the same again."""
    began = time.process_time()
    try:
        taken = ipp.take_request(data)
    except IppError:
        taken = None
    try:
        ipp.take_response(data)
    except IppError:
        pass
    assert time.process_time() - began < 1.0
    if taken is not None:
        request, used = taken
        assert used <= len(data)
        again = ipp.take_request(ipp.put_request(request))
        assert again is not None and again[0] == request


@given(st.binary(max_size=600))
@settings(max_examples=300, deadline=None)
def test_random_attributes(data: bytes) -> None:
    check_any(HEAD + b"\x01" + data)


TAGS = st.sampled_from([*range(0x0C), *map(int, ValueTag), 0x14, 0x22, 0x43, 0x4B, 0x7F, 0xFF])
TRIPLE = st.builds(
    lambda tag, name, value: bytes([tag]) + len(name).to_bytes(2, "big") + name + len(value).to_bytes(2, "big") + value,
    TAGS,
    st.sampled_from([b"", b"", b"a", b"b", b"media-col"]),
    st.one_of(st.binary(max_size=12), st.sampled_from([b"", b"\x01", b"\0\0\0\x01", b"en", b"\0\x02en\0\x01x"])),
)


@given(st.lists(TRIPLE, max_size=40), st.booleans())
@settings(max_examples=400, deadline=None)
def test_random_triples(triples: list[bytes], ended: bool) -> None:
    check_any(HEAD + b"\x01" + b"".join(triples) + (b"\x03" if ended else b""))


@given(st.sampled_from([CREATE_JOB, ALL_TYPES, JOBS]), st.data())
@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.data_too_large])
def test_damaged_captures(data: bytes, draw: st.DataObject) -> None:
    damaged = bytearray(data)
    for _ in range(draw.draw(st.integers(1, 6))):
        damaged[draw.draw(st.integers(0, len(damaged) - 1))] = draw.draw(st.integers(0, 255))
    check_any(bytes(damaged))


def test_a_sender_of_single_bytes_costs_linear_time() -> None:
    data = HEAD + b"\x01" + (b"\x41\x00\x01a" + b"\x00\x28" + b"x" * 40) * 1390
    assert 60_000 < len(data) < 65_536
    extent, buffer, began = ipp.Extent(), bytearray(), time.process_time()
    for byte in data:
        buffer.append(byte)
        assert extent.reach(buffer) is None
    assert time.process_time() - began < 2.0
