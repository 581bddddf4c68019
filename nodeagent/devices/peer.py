"""A gRPC server on a Unix socket that may be restarted, replaced or gone at any time: the kubelet, a container runtime."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import grpc
import grpc.aio
import msgspec
from google.protobuf.message import Message

from nodeagent import rpc
from nodeagent.errors import AgentError, Reason

R = TypeVar("R", bound=Message)

MAX_DETAIL = 300
"""Characters of a peer's own words that are repeated in our sentences."""


class PeerName(msgspec.Struct, frozen=True, kw_only=True):
    """How failures of a peer are told: who it is, the reason for machines, what a person can do."""

    name: str
    reason: Reason
    hint: str


class PeerError(AgentError):
    """A call that failed; `code` is the gRPC status that the peer or the transport gave."""

    def __init__(self, reason: Reason, message: str, *, hint: str, code: grpc.StatusCode) -> None:
        super().__init__(reason, message, hint=hint)
        self.code = code


class _Line:
    """A channel and how many calls are on it. Closing a channel cancels its calls, so the last user closes it."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self.channel = channel
        self.users = 0
        self.retired = False


class Peer:
    """Unary calls over one kept connection. `close()` it after the last call; a call after that opens it again.

    `find` names the socket and is asked whenever a new connection is made.
    """

    def __init__(self, name: PeerName, find: Callable[[], Path]) -> None:
        self._name = name
        self._find = find
        self._line: _Line | None = None

    async def call(self, path: str, request: Message, answer: type[R], *, timeout_s: float) -> R:
        """One call with a deadline; raises PeerError. A connection that broke since its last use is replaced at once."""
        kept = self._line is not None
        try:
            return await self._call_once(path, request, answer, timeout_s)
        except grpc.aio.AioRpcError as error:
            if not (kept and error.code() is grpc.StatusCode.UNAVAILABLE):
                raise self._told(path, error) from error
        try:
            return await self._call_once(path, request, answer, timeout_s)
        except grpc.aio.AioRpcError as error:
            raise self._told(path, error) from error

    async def close(self) -> None:
        line, self._line = self._line, None
        if line is not None:
            await line.channel.close(None)

    async def _call_once(self, path: str, request: Message, answer: type[R], timeout_s: float) -> R:
        line = self._line
        if line is None:
            line = self._line = _Line(rpc.channel(self._find()))
        line.users += 1
        try:
            return await rpc.unary(line.channel, path, answer)(request, timeout=timeout_s)
        except grpc.aio.AioRpcError as error:
            if error.code() is grpc.StatusCode.UNAVAILABLE:
                line.retired = True
                if self._line is line:
                    self._line = None
            raise
        finally:
            line.users -= 1
            if line.retired and not line.users:
                await line.channel.close(None)

    def _told(self, path: str, error: grpc.aio.AioRpcError) -> PeerError:
        method = path.rpartition("/")[2]
        return PeerError(
            self._name.reason,
            f"{self._name.name} did not answer {method}: {words_of(error)}",
            hint=self._name.hint,
            code=error.code(),
        )


def words_of(error: grpc.aio.AioRpcError) -> str:
    """The status and the peer's own words about it: one line that can be printed on any terminal, cut to MAX_DETAIL."""
    untrusted_details = " ".join((error.details() or "").split())
    printable = "".join(c if c.isprintable() else "?" for c in untrusted_details[:MAX_DETAIL])
    return f"{error.code().name.lower()}: {printable}"
