"""The plugin side of the stand-in kubelet: one registered device plugin each, and what is known of its devices."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import grpc
import grpc.aio
import msgspec

from nodeagent import rpc
from nodeagent.wire.pb.deviceplugin.v1beta1 import api_pb2 as pb

DIAL_TIMEOUT_S = 10.0
PRESTART_TIMEOUT_S = 30.0
METHOD = "/v1beta1.DevicePlugin/"


class PluginCall(msgspec.Struct, frozen=True):
    """One call the stand-in made to a plugin."""

    method: str
    resource: str
    ids: tuple[str, ...]


class Endpoint:
    """One registration. After a restart of the kubelet it is known by name only: no connection, no options, no devices."""

    def __init__(self, resource: str, socket: Path | None, changed: Callable[[], None]) -> None:
        self.resource = resource
        self.socket = socket
        self.options: pb.DevicePluginOptions | None = None
        self.devices: dict[str, bool] = {}
        """Id -> healthy. Empty until the first message of ListAndWatch."""
        self.connected = False
        self._changed = changed
        self._channel: grpc.aio.Channel | None = None
        self._stream: asyncio.Task[None] | None = None

    @property
    def healthy(self) -> frozenset[str]:
        """Ids that may be handed out: none without a connection."""
        return frozenset(i for i, good in self.devices.items() if good and self.connected)

    async def dial(self) -> None:
        """Connect and ask for options; raises grpc.aio.AioRpcError."""
        self._channel = rpc.channel(str(self.socket))
        call = rpc.unary(self._channel, METHOD + "GetDevicePluginOptions", pb.DevicePluginOptions)
        self.options = await call(pb.Empty(), timeout=DIAL_TIMEOUT_S)
        self.connected = True

    def watch(self, group: asyncio.TaskGroup, ended: Callable[[Endpoint], object]) -> None:
        """Read the plugin's lists until its stream ends; `ended` is then told."""
        self._stream = group.create_task(self._read(ended), name=f"ListAndWatch {self.resource}")

    async def _read(self, ended: Callable[[Endpoint], object]) -> None:
        assert self._channel is not None
        try:
            async for message in rpc.stream(self._channel, METHOD + "ListAndWatch", pb.ListAndWatchResponse)(
                pb.Empty()
            ):
                self.devices = {d.ID: d.health == "Healthy" for d in message.devices}
                self._changed()
        except grpc.aio.AioRpcError:
            pass
        ended(self)

    def disconnect(self) -> None:
        """The stream ended or another registration took its place: no device of it can be handed out any more."""
        self.connected = False
        self._changed()

    async def close(self) -> None:
        self.disconnect()
        if self._stream is not None:
            self._stream.cancel()
            await asyncio.wait({self._stream})
        if self._channel is not None:
            await self._channel.close(None)

    async def allocate(self, ids: tuple[str, ...]) -> pb.ContainerAllocateResponse:
        """Allocate for one container, as a kubelet: without a deadline. Raises grpc.aio.AioRpcError."""
        assert self._channel is not None
        request = pb.AllocateRequest(container_requests=[pb.ContainerAllocateRequest(devices_ids=ids)])
        answer = await rpc.unary(self._channel, METHOD + "Allocate", pb.AllocateResponse)(request)
        return answer.container_responses[0]

    async def prestart(self, ids: tuple[str, ...]) -> None:
        """PreStartContainer; raises grpc.aio.AioRpcError."""
        assert self._channel is not None
        call = rpc.unary(self._channel, METHOD + "PreStartContainer", pb.PreStartContainerResponse)
        await call(pb.PreStartContainerRequest(devices_ids=ids), timeout=PRESTART_TIMEOUT_S)
