"""The body of an HTTP/1.1 message (RFC 9112 sections 6 and 7), cut out of received bytes without copying them. No I/O.

    body = ChunkedBody() or SizedBody(length)
    parts, at = body.take(untrusted_data, at)     # views of the payload; what is left starts at `at`
    body.ended                                     # what follows is the next message

Whatever comes in, only `BodyError` is raised.
"""

from __future__ import annotations

MAX_PARTS = 64
"""Views handed out at once, so that a body of tiny chunks does not keep anybody else waiting."""
MAX_LINE_BYTES = 1024
"""The line of a chunk's size with its extensions, or of a trailer field."""
MAX_TRAILERS = 64
_SIZE_DIGITS = 12
"""Hexadecimal digits of a chunk's size: 256 TiB is enough."""
_HEX = frozenset(b"0123456789abcdefABCDEF")


class BodyError(ValueError):
    """The body is not framed as HTTP says."""


class SizedBody:
    """A body of Content-Length bytes."""

    def __init__(self, length: int) -> None:
        self._left = length

    @property
    def ended(self) -> bool:
        return self._left == 0

    def take(self, untrusted_data: bytes, at: int = 0) -> tuple[list[memoryview], int]:
        part = memoryview(untrusted_data)[at : at + self._left]
        self._left -= len(part)
        return [part] if part else [], at + len(part)


class ChunkedBody:
    """A body in chunks. Extensions and trailers are read over."""

    def __init__(self) -> None:
        self._left = 0
        self._line = b""
        self._expects = self._size_line
        self._trailers = 0
        self.ended = False

    def take(self, untrusted_data: bytes, at: int = 0) -> tuple[list[memoryview], int]:
        view, have = memoryview(untrusted_data), len(untrusted_data)
        parts: list[memoryview] = []
        while at < have and not self.ended and len(parts) < MAX_PARTS:
            if self._left:
                part = view[at : at + self._left]
                parts.append(part)
                self._left -= len(part)
                at += len(part)
                continue
            # The line may have begun in earlier data; then only its rest is looked for, in a copy of a few bytes.
            end = untrusted_data.find(b"\n", at, at + MAX_LINE_BYTES)
            line = self._line + untrusted_data[at : (at + MAX_LINE_BYTES if end < 0 else end + 1)]
            if len(line) > MAX_LINE_BYTES or (end < 0 and len(line) == MAX_LINE_BYTES):
                raise BodyError(f"a line between chunks is over {MAX_LINE_BYTES} bytes")
            if end < 0:
                self._line = line
                return parts, have
            if line[-2:] != b"\r\n":
                raise BodyError("a line between chunks does not end with CR LF")
            self._line, at = b"", end + 1
            self._expects(line[:-2])
        return parts, at

    def _size_line(self, line: bytes) -> None:
        digits = line.partition(b";")[0].rstrip(b" \t")
        if not digits or len(digits) > _SIZE_DIGITS or not _HEX.issuperset(digits):
            raise BodyError(f"{line[:20]!r} is no size of a chunk")
        self._left = int(digits, 16)
        self._expects = self._end_of_chunk if self._left else self._trailer

    def _end_of_chunk(self, line: bytes) -> None:
        if line:
            raise BodyError("a chunk is longer than its size")
        self._expects = self._size_line

    def _trailer(self, line: bytes) -> None:
        self._trailers += 1
        if self._trailers > MAX_TRAILERS:
            raise BodyError(f"more than {MAX_TRAILERS} trailers")
        self.ended = not line
