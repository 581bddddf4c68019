"""HTTP/1.1 of one desktop connection on a non-blocking socket, with limits and deadlines: h11 reads the heads, bodies are
cut out of what was received without a copy (wire.http_body; h11 alone costs 30 us a chunk, and the stock client sends
chunks of 8 KiB).

A `Conversation` is read in order: `next_post()`, `parts()` until empty (or `discard()`), `respond()`, `finish()`.
Requests that come before the last one is answered wait in the socket: one at a time, in order.

Everything the client can do wrong becomes `HttpError` (a status that can still be told) or `ConnectionError` (nobody is
there to be told).
"""

from __future__ import annotations

import asyncio
import socket
from http import HTTPStatus

import h11

from nodeagent.errors import Reason
from nodeagent.wire.http_body import BodyError, ChunkedBody, SizedBody

HEAD_BYTES = 16 * 1024
"""Request line and headers; more is 431."""
RECEIVE_BYTES = 256 * 1024
"""One receive. The kernel's default buffer of a Unix socket (net.core.wmem_default, 208 KiB) fits."""
DRAIN_BYTES = 8 * 1024 * 1024
"""Of a body that is too long or not wanted: read and thrown away so that the client comes to read the answer."""
TURNS = 16
"""Calls of `parts` after which the other connections get a turn: a fast client never makes us wait. 4 MiB at most."""
LINGER_S = 2.0
"""How long a client that broke the rules is read on, so that it comes to read why."""
IPP_MIME = "application/ipp"

Part = bytes | bytearray | memoryview


class HttpError(Exception):
    """The request is answered with this status. `reason` None: nothing was denied, there only is no such thing."""

    def __init__(self, status: int, reason: Reason | None, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.reason = reason
        self.message = message


class Traffic:
    """Bytes that went over all connections of a service."""

    def __init__(self) -> None:
        self.received = 0
        self.sent = 0


class Conversation:
    """One accepted connection; the socket stays the caller's. A connection that moves no byte for `idle_s` ends, and a
    request head (with its IPP attributes: until `head_is_complete`) must arrive within `idle_s` of its first byte."""

    def __init__(self, sock: socket.socket, idle_s: float, max_body_bytes: int, traffic: Traffic) -> None:
        self._sock = sock
        self._idle_s = idle_s
        self._max_body_bytes = max_body_bytes
        self._traffic = traffic
        self._loop = asyncio.get_running_loop()
        self._head_deadline: float | None = None
        self._unread = b""
        self._at = 0
        self._body: SizedBody | ChunkedBody = SizedBody(0)
        self._body_bytes = 0
        self._turns = 0
        self._pushed_back: Part = b""
        self._close = False
        self._lost = False
        """Where this request ends, nobody knows; so no other can follow."""
        self._bodiless = False

    async def next_post(self) -> bool:
        """Wait for the next request. False: the client has left or said nothing for `idle_s`. Raises HttpError for any
        request but a POST of application/ipp."""
        self._body, self._body_bytes, self._pushed_back = SizedBody(0), 0, b""
        self._bodiless = False
        try:
            head = await self._receive_head()
        except TimeoutError:
            if self._head_deadline is None:
                return False
            self._lost = True
            raise HttpError(408, Reason.TOO_SLOW, f"the request did not arrive within {self._idle_s:g} s") from None
        except h11.RemoteProtocolError as error:
            self._lost = True
            reason = Reason.TOO_LARGE if error.error_status_hint == 431 else Reason.MALFORMED
            raise HttpError(error.error_status_hint, reason, f"not HTTP as it should be: {error}") from None
        if head is None:
            return False
        headers = dict(list(head.headers))
        self._close = b"close" in headers.get(b"connection", b"").lower() or head.http_version < b"1.1"
        self._bodiless = head.method == b"HEAD"
        self._lost = True
        self._body = _framing(headers)
        # Whether a client that was to wait and is refused sends its body, is up to it (RFC 9110 10.1.1).
        waits = headers.get(b"expect", b"").lower() == b"100-continue" and head.http_version >= b"1.1"
        self._lost = waits
        _check(head, headers, self._max_body_bytes)
        if waits:
            # At once, even where the body is here already: libcups waits for it a second before it goes on, and takes
            # a final answer without it badly when it compresses.
            await self._send(b"HTTP/1.1 100 Continue\r\n\r\n")
            self._lost = False
        return True

    def head_is_complete(self) -> None:
        """The request is understood: from here on only silence is too slow."""
        self._head_deadline = None

    def push_back(self, part: Part) -> None:
        """`parts` starts with this: body bytes that were read too far. Only when nothing is pushed back already."""
        assert not self._pushed_back
        self._pushed_back = part

    async def parts(self) -> list[Part]:
        """The next pieces of the body, as many as are there, at most `http_body.MAX_PARTS`; empty at its end.

        Raises HttpError (malformed or slow body), ConnectionError when the client left in the middle.
        """
        if self._pushed_back:
            part, self._pushed_back = self._pushed_back, b""
            return [part]
        parts: list[Part] = []
        while not parts and not self._body.ended:
            if self._at >= len(self._unread):
                self._unread, self._at = await self._receive_body(), 0
            try:
                found, self._at = self._body.take(self._unread, self._at)
            except BodyError as error:
                self._lost = True
                raise HttpError(400, Reason.MALFORMED, f"not HTTP as it should be: {error}") from None
            parts += found
        self._body_bytes += sum(map(len, parts))
        self._turns += 1
        if self._turns % TURNS == 0:
            await asyncio.sleep(0)
        return parts

    async def discard(self) -> None:
        """Read what is left of the body: libcups takes "200 OK" in the middle of its document for a broken connection.
        Raises HttpError as `parts` does, and when the body is too long; libcups listens to that at any time."""
        while await self.parts():
            if self._body_bytes > self._max_body_bytes + DRAIN_BYTES:
                self._lost = True
                raise HttpError(413, Reason.TOO_LARGE, f"a request may have {self._max_body_bytes} bytes")

    async def respond(self, status: int, mime: str, body: bytes) -> None:
        """Answer, also before the body has ended. Raises ConnectionError or TimeoutError when nobody takes it."""
        lines = [
            f"HTTP/1.1 {status} {HTTPStatus(status).phrase}",
            f"Content-Type: {mime}",
            f"Content-Length: {len(body)}",
            *(["Allow: POST"] if status == 405 else []),
            f"Connection: {'close' if self._close or self._lost else 'keep-alive'}",
        ]
        await self._send("\r\n".join((*lines, "", "")).encode() + (b"" if self._bodiless else body))

    async def finish(self) -> bool:
        """After `respond`: read what is left of a refused body, `DRAIN_BYTES` at most, so that the client comes to read
        the answer. True: another request may follow on this connection."""
        self.head_is_complete()
        self._pushed_back = b""
        self._body_bytes = 0
        try:
            while not self._lost and self._body_bytes < DRAIN_BYTES and await self.parts():
                pass
        except HttpError:
            pass
        if self._lost or not self._body.ended:
            await self._linger()
            return False
        await asyncio.sleep(0)  # also after a request without a body
        return not self._close

    async def _linger(self) -> None:
        """A connection that is closed with bytes unread takes the answer with it: the client's next write fails before
        its next read. So let it send a little longer into the void."""
        left = DRAIN_BYTES
        try:
            self._sock.shutdown(socket.SHUT_WR)
            async with asyncio.timeout(LINGER_S):
                while left > 0 and (data := await self._loop.sock_recv(self._sock, RECEIVE_BYTES)):
                    left -= len(data)
                    self._traffic.received += len(data)
                    await asyncio.sleep(0)
        except OSError:  # TimeoutError is one
            pass

    async def _receive_head(self) -> h11.Request | None:
        """The head of the next request; the rest stays in `_unread`. None: the client has left. The deadline of a head
        starts with its first byte."""
        http = h11.Connection(h11.SERVER, max_incomplete_event_size=HEAD_BYTES)
        data, self._unread, self._at = self._unread[self._at :], b"", 0
        self._head_deadline = None
        fed = 0
        while True:
            if data:
                if self._head_deadline is None:
                    self._head_deadline = self._loop.time() + self._idle_s
                http.receive_data(data)
                fed += len(data)
                event = http.next_event()
                if isinstance(event, h11.Request):
                    self._unread = http.trailing_data[0]
                    if fed - len(self._unread) > HEAD_BYTES:  # h11 looks only while the head is incomplete
                        raise h11.RemoteProtocolError("the head is too long", error_status_hint=431)
                    return event
            data = await self._receive(HEAD_BYTES)
            if not data:
                if self._head_deadline is None:
                    return None
                raise ConnectionResetError("the client left in the middle of a request")

    async def _receive_body(self) -> bytes:
        try:
            data = await self._receive(RECEIVE_BYTES)
        except TimeoutError:
            self._lost = True
            raise HttpError(408, Reason.TOO_SLOW, f"the body stopped for {self._idle_s:g} s") from None
        if not data:
            raise ConnectionResetError("the client left in the middle of a request")
        return data

    async def _receive(self, limit: int) -> bytes:
        deadline = self._loop.time() + self._idle_s
        if self._head_deadline is not None:
            deadline = min(deadline, self._head_deadline)
        async with asyncio.timeout_at(deadline):
            data = await self._loop.sock_recv(self._sock, limit)
        self._traffic.received += len(data)
        return data

    async def _send(self, data: bytes) -> None:
        async with asyncio.timeout(self._idle_s):
            await self._loop.sock_sendall(self._sock, data)
        self._traffic.sent += len(data)


def _framing(headers: dict[bytes, bytes]) -> SizedBody | ChunkedBody:
    """How the body of a request comes; h11 has seen that the headers are well formed. Raises HttpError."""
    if b"transfer-encoding" not in headers:
        return SizedBody(int(headers.get(b"content-length", b"0")))
    # Both would be two opinions about where the next request starts (RFC 9112 6.1). h11 knows only "chunked".
    if b"content-length" in headers:
        raise HttpError(400, Reason.MALFORMED, "the request has both a length and chunks")
    return ChunkedBody()


def _check(head: h11.Request, headers: dict[bytes, bytes], max_body_bytes: int) -> None:
    """Raises HttpError unless this is a POST of application/ipp."""
    if head.method in (b"GET", b"HEAD"):
        raise HttpError(404, None, "there are no files here, only IPP")
    if head.method != b"POST":
        raise HttpError(405, Reason.NOT_SUPPORTED, "only POST is served here")
    mime = headers.get(b"content-type", b"").split(b";")[0].strip().lower()
    if mime != IPP_MIME.encode():
        raise HttpError(415, Reason.NOT_SUPPORTED, f"only {IPP_MIME} is served here")
    if headers.get(b"content-encoding", b"identity").lower() != b"identity":
        raise HttpError(415, Reason.NOT_SUPPORTED, "no content encoding is supported")
    if b"content-length" not in headers and b"transfer-encoding" not in headers:
        raise HttpError(411, Reason.MALFORMED, "the request has neither a length nor chunks")
    if int(headers.get(b"content-length", b"0")) > max_body_bytes:
        raise HttpError(413, Reason.TOO_LARGE, f"a request may have {max_body_bytes} bytes")
