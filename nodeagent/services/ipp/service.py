"""Printing, the seat side: IPP over HTTP on the seat's sockets, spoken with the stock CUPS client and print dialogs.

Runs in the seat's unprivileged worker. What comes over the socket is hostile; what it can cost is limited by `Serve`
and by the constants of `http` and `wire.ipp`.
"""

from __future__ import annotations

import socket
import time
from collections import Counter
from collections.abc import Callable

from nodeagent.errors import Reason
from nodeagent.services import Link
from nodeagent.services.ipp.http import IPP_MIME, Conversation, HttpError, Traffic
from nodeagent.services.ipp.operations import Operations
from nodeagent.services.ipp.requests import response
from nodeagent.wire import ipp
from nodeagent.wire.seat import Counters, Jobs, Printers, Serve

NAME = "ipp"


class IppService:
    """`services.SeatService` for printing."""

    def __init__(self, link: Link, serve: Serve, clock: Callable[[], float] = time.time) -> None:
        self._serve = serve
        self._operations = Operations(link, serve, self._deny, clock)
        self._traffic = Traffic()
        self._connections = 0
        self._denied: Counter[Reason] = Counter()

    def on_message(self, message: Printers | Jobs) -> None:
        self._operations.on_message(message)

    def counters(self) -> Counters:
        return Counters(
            service=NAME,
            bytes_in=self._traffic.received,
            bytes_out=self._traffic.sent,
            connections=self._connections,
            denied=dict(self._denied),
        )

    async def connection(self, sock: socket.socket) -> None:
        """How many there are at a time is limited by the worker, which accepts them."""
        self._connections += 1
        max_body_bytes = self._serve.max_document_bytes + ipp.REQUEST_LIMITS.section_bytes
        conversation = Conversation(sock, self._serve.idle_s, max_body_bytes, self._traffic)
        try:
            while await self._exchange(conversation):
                pass
        except OSError:  # TimeoutError is one
            pass  # the client left, or does not take its answer
        finally:
            sock.close()

    def _deny(self, reason: Reason) -> None:
        self._denied[reason] += 1

    async def _exchange(self, conversation: Conversation) -> bool:
        """One request and its answer. False: the connection is over."""
        try:
            if not await conversation.next_post():
                return False
            body = ipp.put_response(await self._answer(conversation))
            await conversation.discard()
            await conversation.respond(200, IPP_MIME, body)
        except HttpError as error:
            if error.reason is not None:
                self._deny(error.reason)
            await conversation.respond(error.status, "text/plain", f"{error.message}\n".encode())
        return await conversation.finish()

    async def _answer(self, conversation: Conversation) -> ipp.Response:
        untrusted_head, extent = bytearray(), ipp.Extent()
        try:
            while (end := extent.reach(untrusted_head)) is None:
                parts = await conversation.parts()
                if not parts:
                    raise ipp.IppError("the request ends before its attributes do", len(untrusted_head))
                untrusted_head += b"".join(parts)
            conversation.head_is_complete()
            taken = ipp.take_request(untrusted_head[:end])
            assert taken is not None
            conversation.push_back(untrusted_head[end:])
            return await self._operations.answer(taken[0], conversation)
        except ipp.IppError as error:
            header = ipp.take_header(untrusted_head)
            if header is None:
                raise HttpError(400, Reason.MALFORMED, f"not an IPP request: {error}") from None
            self._deny(Reason.MALFORMED)
            return response(header, ipp.Status.BAD_REQUEST, f"not a proper IPP request: {error}")
