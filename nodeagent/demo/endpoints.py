"""The plugin side of the stand-in kubelet: what was said of the devices of a resource, and the connections to its plugins."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from pathlib import Path

import grpc
import grpc.aio
import msgspec

from nodeagent import rpc
from nodeagent.wire.pb.deviceplugin.v1beta1 import api_pb2 as pb

DIAL_TIMEOUT_S = 10.0
PRESTART_TIMEOUT_S = 30.0
GRACE_S = 300.0
"""So long after its last plugin went away a resource stays in the node's status (endpointStopGracePeriod)."""
METHOD = "/v1beta1.DevicePlugin/"


class PluginCall(msgspec.Struct, frozen=True):
    """One call the stand-in made to a plugin. GetPreferredAllocation: `ids` are those that were offered to choose from."""

    method: str
    resource: str
    ids: tuple[str, ...]


class PluginFailed(Exception):
    """A call to a plugin failed; the text is what a kubelet would write into the pod's status."""


class DeviceTable:
    """The devices of one resource, as its plugins told them. It belongs to the name, not to a connection: a plugin that
    registers again finds its devices there, all unhealthy, until its first list."""

    def __init__(self) -> None:
        self.told: dict[str, bool] = {}
        """Id -> healthy, as in the last list. A plugin that goes away changes nothing here."""
        self.healthy: frozenset[str] = frozenset()
        self.unhealthy: frozenset[str] = frozenset()

    def tell(self, devices: Iterable[pb.Device]) -> frozenset[str]:
        """A whole new list. Returns the ids whose health changed or that are new; one that is missing now is not among them."""
        before, self.told = self.told, {d.ID: d.health == "Healthy" for d in devices}
        self.healthy = frozenset(i for i, good in self.told.items() if good)
        self.unhealthy = frozenset(self.told) - self.healthy
        return frozenset(i for i, good in self.told.items() if before.get(i) is not good)

    def lose(self) -> None:
        """The plugin went away: every device counts as unhealthy."""
        self.unhealthy |= self.healthy
        self.healthy = frozenset()


class Endpoint:
    """One registration. After a restart of the kubelet it is known by name only: no connection, no options, no devices.

    `clock` gives seconds; `changed` is told of everything that happens here.
    """

    def __init__(
        self,
        resource: str,
        socket: Path | None,
        table: DeviceTable,
        changed: Callable[[], None],
        clock: Callable[[], float],
    ) -> None:
        self.resource = resource
        self.socket = socket
        self.options: pb.DevicePluginOptions | None = None
        self.table = table
        self.connected = False
        self.stopped_s: float | None = None if socket else clock()
        """When the plugin went away; None while it is there."""
        self._changed = changed
        self._clock = clock
        self._channel: grpc.aio.Channel | None = None
        self._stream: asyncio.Task[None] | None = None

    @property
    def devices(self) -> dict[str, bool]:
        """Id -> healthy. Empty until the first message of ListAndWatch."""
        return self.table.told

    @property
    def healthy(self) -> frozenset[str]:
        """Ids that may be handed out: none without a connection."""
        return self.table.healthy if self.connected else frozenset()

    @property
    def expired(self) -> bool:
        """The plugin has been away for longer than the grace period."""
        return self.stopped_s is not None and self._clock() - self.stopped_s > GRACE_S

    async def dial(self) -> None:
        """Connect and ask for options; raises PluginFailed."""
        self._channel = rpc.channel(str(self.socket))
        call = rpc.unary(self._channel, METHOD + "GetDevicePluginOptions", pb.DevicePluginOptions)
        try:
            self.options = await call(pb.Empty(), timeout=DIAL_TIMEOUT_S)
        except grpc.aio.AioRpcError as error:
            raise PluginFailed(f"failed to dial device plugin: {_said(error)}") from error
        self.connected = True

    def watch(
        self,
        group: asyncio.TaskGroup,
        told: Callable[[Endpoint, pb.ListAndWatchResponse], object],
        ended: Callable[[Endpoint], object],
    ) -> None:
        """Read the plugin's lists until its stream ends; `ended` is then told."""
        self._stream = group.create_task(self._read(told, ended), name=f"ListAndWatch {self.resource}")

    async def _read(
        self,
        told: Callable[[Endpoint, pb.ListAndWatchResponse], object],
        ended: Callable[[Endpoint], object],
    ) -> None:
        assert self._channel is not None
        try:
            async for message in rpc.stream(self._channel, METHOD + "ListAndWatch", pb.ListAndWatchResponse)(
                pb.Empty()
            ):
                told(self, message)
                self._changed()
        except grpc.aio.AioRpcError:
            pass
        ended(self)
        await self._channel.close(None)

    def disconnect(self) -> None:
        """The stream ended, or a kubelet takes it to have ended: no call can be made any more."""
        if self.connected:
            self.connected = False
            self.stopped_s = self._clock()
        self._changed()

    async def close(self) -> None:
        """End the connection; the devices count as unhealthy."""
        if self.connected:
            self.table.lose()
        self.disconnect()
        if self._stream is not None and self._stream is not asyncio.current_task():
            self._stream.cancel()
            await asyncio.wait({self._stream})
        if self._channel is not None:
            await self._channel.close(None)

    # ---- calls; all raise PluginFailed

    async def allocate(self, ids: tuple[str, ...]) -> pb.ContainerAllocateResponse:
        """Allocate for one container, as a kubelet: without a deadline."""
        request = pb.AllocateRequest(container_requests=[pb.ContainerAllocateRequest(devices_ids=ids)])
        answer = await self._call("Allocate", request, pb.AllocateResponse)
        if not answer.container_responses:
            raise PluginFailed(f"no containers return in allocation response {answer}")
        return answer.container_responses[0]

    async def prefer(self, available: tuple[str, ...], must: tuple[str, ...], size: int) -> frozenset[str]:
        """GetPreferredAllocation, without a deadline; none preferred where the plugin names no container."""
        one = pb.ContainerPreferredAllocationRequest(
            available_deviceIDs=available, must_include_deviceIDs=must, allocation_size=size
        )
        request = pb.PreferredAllocationRequest(container_requests=[one])
        try:
            answer = await self._call("GetPreferredAllocation", request, pb.PreferredAllocationResponse)
        except PluginFailed as error:
            raise PluginFailed(f"device plugin GetPreferredAllocation rpc failed with err: {error}") from error
        return frozenset(answer.container_responses[0].deviceIDs if answer.container_responses else ())

    async def prestart(self, ids: tuple[str, ...]) -> None:
        """PreStartContainer."""
        request = pb.PreStartContainerRequest(devices_ids=ids)
        try:
            await self._call("PreStartContainer", request, pb.PreStartContainerResponse, PRESTART_TIMEOUT_S)
        except PluginFailed as error:
            raise PluginFailed(f"device plugin PreStartContainer rpc failed with err: {error}") from error

    async def _call(self, method: str, request: rpc.Q, answer: type[rpc.R], timeout_s: float | None = None) -> rpc.R:
        if not self.connected or self._channel is None:
            raise PluginFailed(f"endpoint {self.socket} has been stopped")
        try:
            return await rpc.unary(self._channel, METHOD + method, answer)(request, timeout=timeout_s)
        except grpc.aio.AioRpcError as error:
            raise PluginFailed(_said(error)) from error
        except asyncio.CancelledError as error:
            task = asyncio.current_task()
            if self.connected or (task is not None and task.cancelling()):
                raise
            # A kubelet closes the connection when the stream has ended, under the calls that are on it.
            raise PluginFailed("rpc error: code = Canceled desc = grpc: the client connection is closing") from error


def _said(error: grpc.aio.AioRpcError) -> str:
    """As Go's gRPC prints a status: `rpc error: code = PermissionDenied desc = ...`."""
    code = error.code().name.title().replace("_", "").replace("Cancelled", "Canceled")
    return f"rpc error: code = {code} desc = {error.details()}"
