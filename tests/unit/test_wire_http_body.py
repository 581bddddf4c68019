"""Bodies of HTTP messages: whole, cut anywhere, with more behind them, and everything that is not one."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nodeagent.wire.http_body import MAX_PARTS, BodyError, ChunkedBody, SizedBody

# The document `hello\n` as lp sends it after its attributes (CUPS 2.4.2), chunk by chunk as it came over the socket.
LP = bytes.fromhex("360d0a68656c6c6f0a0d0a300d0a0d0a")


def whole(body: SizedBody | ChunkedBody, data: bytes) -> tuple[bytes, int]:
    """The payload in one piece of data, and where the next message starts."""
    payload, at = b"", 0
    while at < len(data) and not body.ended:
        parts, at = body.take(data, at)
        assert len(parts) <= MAX_PARTS
        payload += b"".join(parts)
    return payload, at


def in_pieces(body: ChunkedBody, data: bytes, cuts: list[int]) -> bytes:
    payload, edges = b"", [0, *sorted(cuts), len(data)]
    for start, end in pairwise(edges):
        if body.ended:
            break
        payload += whole(body, data[start:end])[0]
    return payload


def test_what_lp_sends() -> None:
    body = ChunkedBody()
    assert whole(body, LP + b"POST / HTTP/1.1") == (b"hello\n", len(LP)) and body.ended


@given(st.lists(st.integers(0, 60)))
def test_cut_anywhere(cuts: list[int]) -> None:
    data = b"3;a=b\r\nabc\r\n00D  \r\n\r\n\r\n0\r\n\r\n0123\r\n0\r\nX: y\r\n\r\n"
    body = ChunkedBody()
    assert in_pieces(body, data, [cut for cut in cuts if cut < len(data)]) == b"abc\r\n\r\n0\r\n\r\n0123"
    assert body.ended


def test_many_small_chunks_come_in_portions() -> None:
    body, data = ChunkedBody(), b"1\r\nx\r\n" * 1000 + b"0\r\n\r\n"
    parts, at = body.take(data)
    assert (len(parts), at) == (MAX_PARTS, MAX_PARTS * 6 - 2)
    rest, end = whole(body, data[at:])
    assert (len(rest), at + end, body.ended) == (1000 - MAX_PARTS, len(data), True)


def test_a_sized_body() -> None:
    body = SizedBody(5)
    assert whole(body, b"abc") == (b"abc", 3) and not body.ended
    assert whole(body, b"defgh") == (b"de", 2) and body.ended
    assert SizedBody(0).ended


@pytest.mark.parametrize(
    "data",
    [
        b"\r\n",
        b"x\r\n",
        b"-1\r\n",
        b"+1\r\nx\r\n",
        b"0x1\r\nx\r\n",
        b"1_0\r\n",
        b" 1\r\nx\r\n",
        b"1\nx\n0\n\n",
        b"1\r\nxy\r\n",
        b"1\r\nx\n",
        b"1234567890abc\r\n",
        b"1;" + b"x" * 2000,
        b"1;" + b"x" * 2000 + b"\r\n",
        b"0\r\n" + b"X: y\r\n" * 100,
        b"0\r\n" + b"X" * 2000,
    ],
)
def test_what_is_no_chunk(data: bytes) -> None:
    with pytest.raises(BodyError):
        whole(ChunkedBody(), data)
    body = ChunkedBody()
    with pytest.raises(BodyError):
        for byte in data:
            body.take(bytes([byte]))


@given(st.lists(st.sampled_from([b"0", b"1", b"a", b"\r", b"\n", b"\r\n", b"\r\n", b";", b"x", b"\xff"]), max_size=60))
@settings(max_examples=300)
def test_nothing_else_is_raised_and_pieces_do_not_matter(words: list[bytes]) -> None:
    data = b"".join(words)

    def outcome(size: int) -> tuple[bytes | None, bool]:
        body = ChunkedBody()
        try:
            return in_pieces(body, data, list(range(size, len(data), size))), body.ended
        except BodyError:
            return None, False

    assert outcome(1) == outcome(7) == outcome(1000)
