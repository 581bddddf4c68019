"""A kubelet that misbehaves by script: one act for each Register, and a client that asks a plugin anything at all.

The stand-in kubelet (nodeagent.demo.kubelet) has the habits of a real one; this one has none.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import grpc
import grpc.aio

from nodeagent import rpc
from nodeagent.wire.pb.deviceplugin.v1beta1 import api_pb2 as pb

METHOD = "/v1beta1.DevicePlugin/"
GARBAGE = b"\xff\xfe\xfd" * 11
"""No protobuf message of any kind: field numbers and wire types that do not exist."""
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
SETTINGS = b"\x00\x00\x00\x04\x00\x00\x00\x00\x00"

Act = Callable[["ScriptedKubelet", pb.RegisterRequest, Any], Awaitable[pb.Empty | bytes]]


class ScriptedKubelet:
    """Use as `async with`. Each Register takes the next act; the last act stays. `registers` is what was asked."""

    def __init__(self, directory: Path, *script: Act) -> None:
        self.directory = directory
        self.socket = directory / "kubelet.sock"
        self.registers: list[pb.RegisterRequest] = []
        self.lists: list[dict[str, str]] = []
        """What plugins said of their devices, every message of every stream."""
        self._script = deque(script)
        self._server: grpc.aio.Server | None = None
        self._channels: list[grpc.aio.Channel] = []
        self._group = asyncio.TaskGroup()
        self._tasks: list[asyncio.Task[None]] = []
        self._changed = asyncio.Event()

    async def __aenter__(self) -> Self:
        await self._group.__aenter__()
        await self.serve()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.stop()
        await self._group.__aexit__(kind, error, trace)

    async def serve(self, methods: tuple[str, ...] = ("Register",)) -> None:
        """Listen. Without a method, the service answers UNIMPLEMENTED."""
        self._server = grpc.aio.server(options=rpc.OPTIONS)
        table = {
            name: grpc.unary_unary_rpc_method_handler(
                self._on_register,
                request_deserializer=pb.RegisterRequest.FromString,
                response_serializer=lambda m: m if isinstance(m, bytes) else m.SerializeToString(),
            )
            for name in methods
        }
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("v1beta1.Registration", table),))
        unnamed = self.directory / f".k{len(self.registers)}-{id(self._server) & 0xFFFF:x}"
        self._server.add_insecure_port(f"unix:{unnamed}")
        await self._server.start()
        unnamed.rename(self.socket)

    async def stop(self, *, leave_socket: bool = False) -> None:
        """End like a killed process: connections break. `leave_socket` as kill -9 does."""
        server, self._server = self._server, None
        for task in self._tasks:
            task.cancel()
        self._tasks.clear()
        for channel in self._channels:
            await channel.close(None)
        self._channels.clear()
        if server is not None:
            await server.stop(None)
        if not leave_socket:
            self.socket.unlink(missing_ok=True)

    async def until(self, condition: Callable[[], object], timeout_s: float = 10.0) -> None:
        async with asyncio.timeout(timeout_s):
            while not condition():
                await self._changed.wait()

    def perform(self, *script: Act) -> None:
        """What comes next, instead of what is left of the script."""
        self._script = deque(script)

    async def _on_register(self, request: pb.RegisterRequest, context: Any) -> pb.Empty | bytes:
        self.registers.append(request)
        self._pulse()
        act = self._script[0] if len(self._script) == 1 else self._script.popleft()
        return await act(self, request, context)

    def _pulse(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    # ---- what a kubelet does with a plugin

    def plugin(self, request: pb.RegisterRequest | None = None) -> grpc.aio.Channel:
        """A connection to a plugin, by default the last that registered; closed with the kubelet."""
        channel = rpc.channel(self.directory / (request or self.registers[-1]).endpoint)
        self._channels.append(channel)
        return channel

    def watch(self, request: pb.RegisterRequest, messages: int | None = None) -> None:
        """Read the plugin's lists, and end the stream after so many of them."""
        self._tasks.append(self._group.create_task(self._watch(self.plugin(request), messages)))

    async def _watch(self, channel: grpc.aio.Channel, messages: int | None) -> None:
        stream = rpc.stream(channel, METHOD + "ListAndWatch", pb.ListAndWatchResponse)(pb.Empty())
        with contextlib.suppress(grpc.aio.AioRpcError):
            for _ in range(messages) if messages is not None else iter(int, 1):
                message = await stream.read()
                if message is grpc.aio.EOF:  # type: ignore[attr-defined]
                    break
                self.lists.append({d.ID: d.health for d in message.devices})
                self._pulse()
        stream.cancel()
        await channel.close(None)


# ---- acts


async def good(kubelet: ScriptedKubelet, request: pb.RegisterRequest, context: Any) -> pb.Empty:
    """As it should be: ask for the options, answer, read the lists."""
    call = rpc.unary(kubelet.plugin(request), METHOD + "GetDevicePluginOptions", pb.DevicePluginOptions)
    await call(pb.Empty(), timeout=5)
    kubelet.watch(request)
    return pb.Empty()


async def hung(kubelet: ScriptedKubelet, request: pb.RegisterRequest, context: Any) -> pb.Empty:
    """No answer, ever."""
    await asyncio.Event().wait()
    raise AssertionError


async def forgetful(kubelet: ScriptedKubelet, request: pb.RegisterRequest, context: Any) -> pb.Empty:
    """A good answer, and nothing after it."""
    return pb.Empty()


async def refusing(kubelet: ScriptedKubelet, request: pb.RegisterRequest, context: Any) -> pb.Empty:
    await context.abort(grpc.StatusCode.UNKNOWN, "no\x00\x1b[31m\n" + "x" * 5000)
    raise AssertionError


async def unimplemented(kubelet: ScriptedKubelet, request: pb.RegisterRequest, context: Any) -> pb.Empty:
    await context.abort(grpc.StatusCode.UNIMPLEMENTED, "unknown service v1beta1.Registration")
    raise AssertionError


async def broken(kubelet: ScriptedKubelet, request: pb.RegisterRequest, context: Any) -> bytes:
    """An answer that is no message."""
    return GARBAGE


async def enormous(kubelet: ScriptedKubelet, request: pb.RegisterRequest, context: Any) -> bytes:
    """An answer beyond any limit: an unknown field of 17 MiB."""
    size = 17 << 20
    return (
        b"\x7a"
        + bytes([size & 0x7F | 0x80, size >> 7 & 0x7F | 0x80, size >> 14 & 0x7F | 0x80, size >> 21])
        + bytes(size)
    )


async def vanishing(kubelet: ScriptedKubelet, request: pb.RegisterRequest, context: Any) -> pb.Empty:
    """The call is dropped in the middle, as by a crash; the socket's name stays."""
    await context.abort(grpc.StatusCode.UNAVAILABLE, "Socket closed")
    raise AssertionError


async def dialling_wildly(kubelet: ScriptedKubelet, request: pb.RegisterRequest, context: Any) -> pb.Empty:
    """Calls what is not there, and with bytes that mean nothing, before the good answer."""
    channel = kubelet.plugin(request)
    for method in ("Allocate", "ListAndWatch", "PreStartContainer", "NoSuchMethod", ""):
        with contextlib.suppress(grpc.aio.AioRpcError):
            await raw(channel, METHOD + method, GARBAGE)
    with contextlib.suppress(grpc.aio.AioRpcError):
        await raw(channel, "/v1alpha.DevicePlugin/ListAndWatch", b"")
    return await good(kubelet, request, context)


def slow(seconds: float) -> Act:
    """A good answer, late."""

    async def act(kubelet: ScriptedKubelet, request: pb.RegisterRequest, context: Any) -> pb.Empty:
        await asyncio.sleep(seconds)
        with contextlib.suppress(grpc.aio.AioRpcError):
            return await good(kubelet, request, context)
        return pb.Empty()

    return act


def dropping(messages: int) -> Act:
    """Reads so many lists and then lets go of the stream."""

    async def act(kubelet: ScriptedKubelet, request: pb.RegisterRequest, context: Any) -> pb.Empty:
        kubelet.watch(request, messages)
        return pb.Empty()

    return act


# ---- requests


async def raw(channel: grpc.aio.Channel, path: str, data: bytes, timeout_s: float = 5.0) -> bytes:
    """A call with any bytes to any path; raises grpc.aio.AioRpcError."""
    call: Any = channel.unary_unary(path, request_serializer=bytes, response_deserializer=bytes)
    answer: bytes = await call(data, timeout=timeout_s)
    return answer


async def allocate(
    channel: grpc.aio.Channel, *containers: Iterable[str], timeout_s: float = 5.0
) -> pb.AllocateResponse:
    """Allocate for any number of containers; raises grpc.aio.AioRpcError."""
    request = pb.AllocateRequest(container_requests=[pb.ContainerAllocateRequest(devices_ids=c) for c in containers])
    return await rpc.unary(channel, METHOD + "Allocate", pb.AllocateResponse)(request, timeout=timeout_s)


async def refusal(call: Awaitable[object]) -> tuple[grpc.StatusCode, str]:
    """How a call was refused."""
    try:
        await call
    except grpc.aio.AioRpcError as error:
        return error.code(), error.details() or ""
    raise AssertionError("it was not refused")


# ---- a socket that speaks no gRPC


@contextlib.asynccontextmanager
async def speaking(directory: Path, answer: bytes, *, then_close: bool = True) -> AsyncIterator[None]:
    """kubelet.sock accepts, says `answer`, and closes or keeps silent."""

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            writer.write(answer)
            await writer.drain()
            if then_close:
                await reader.read(64)
            else:
                while await reader.read(4096):
                    pass
        writer.close()

    path = directory / "kubelet.sock"
    async with await asyncio.start_unix_server(talk, path):
        yield
    path.unlink(missing_ok=True)


@contextlib.contextmanager
def deaf(directory: Path) -> Any:
    """kubelet.sock has a queue of connections that nobody accepts."""
    path = directory / "kubelet.sock"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen(16)
        yield
    path.unlink(missing_ok=True)
