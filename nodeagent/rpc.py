"""gRPC without generated stubs: a method is its path and two message types.

The .proto files give the messages (wire/pb); services and calls are a table of names, so no generated code
talks to sockets. All channels are Unix sockets.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any, Protocol, TypeVar

import grpc
import grpc.aio
from google.protobuf.message import DecodeError, Message

Q = TypeVar("Q", bound=Message)
R = TypeVar("R", bound=Message)

MAX_MESSAGE_BYTES = 16 << 20
"""PodResources and CRI answer whole nodes in one message; the kubelet's own client allows 16 MiB."""

OPTIONS: list[tuple[str, Any]] = [
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.enable_http_proxy", 0),
    ("grpc.default_authority", "localhost"),
    # A peer on a Unix socket that is back answers at once; gRPC's own back-off of 1 s to 2 min is made for networks,
    # and its process-wide pool would hand a new channel the back-off of the old one.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 1000),
    ("grpc.max_reconnect_backoff_ms", 1000),
    ("grpc.use_local_subchannel_pool", 1),
]


class Unary(Protocol):
    def __call__(self, request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Awaitable[Any]: ...


class Stream(Protocol):
    """An async generator; a coroutine function (`Unary`) that awaits `context.write(...)` serves a stream as well."""

    def __call__(self, request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> AsyncIterator[Any]: ...


def channel(socket: str | Path) -> grpc.aio.Channel:
    """A channel to a Unix socket. It connects lazily; every call needs a timeout."""
    return grpc.aio.insecure_channel(f"unix:{socket}", options=OPTIONS)


def unary(channel: grpc.aio.Channel, path: str, answer: type[R]) -> Callable[..., Awaitable[R]]:
    """A callable for `path` (`/v1beta1.Registration/Register`): `await call(request, timeout=2)` gives the answer or raises
    grpc.aio.AioRpcError, with status INTERNAL also for bytes that are no such message: gRPC by itself would return None."""
    call = channel.unary_unary(path, request_serializer=lambda m: m.SerializeToString(), response_deserializer=bytes)

    async def ask(request: Message, *, timeout: float | None = None) -> R:
        untrusted_answer = await call(request, timeout=timeout)
        try:
            return answer.FromString(untrusted_answer)
        except DecodeError as error:
            raise grpc.aio.AioRpcError(
                grpc.StatusCode.INTERNAL,
                grpc.aio.Metadata(),
                grpc.aio.Metadata(),
                details=f"the answer to {path} is no {answer.DESCRIPTOR.full_name}",
                debug_error_string=None,
            ) from error

    return ask


def stream(channel: grpc.aio.Channel, path: str, answer: type[R]) -> Callable[..., Any]:
    return channel.unary_stream(
        path, request_serializer=lambda m: m.SerializeToString(), response_deserializer=answer.FromString
    )


def service(
    name: str,
    unaries: dict[str, tuple[type[Message], Unary]],
    streams: dict[str, tuple[type[Message], Stream | Unary]] | None = None,
) -> grpc.GenericRpcHandler[Any, Any]:
    """A service for `server.add_generic_rpc_handlers`: method name -> (request type, coroutine function)."""
    table: dict[str, grpc.RpcMethodHandler[Any, Any]] = {}
    for method, (question, call) in unaries.items():
        table[method] = grpc.unary_unary_rpc_method_handler(
            call,
            request_deserializer=question.FromString,
            response_serializer=lambda m: m.SerializeToString(),
        )
    for method, (question, flow) in (streams or {}).items():
        table[method] = grpc.unary_stream_rpc_method_handler(
            flow,
            request_deserializer=question.FromString,
            response_serializer=lambda m: m.SerializeToString(),
        )
    return grpc.method_handlers_generic_handler(name, table)
