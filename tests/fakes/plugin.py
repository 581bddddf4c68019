"""A device plugin whose every answer a test writes: for what the kubelet does with it."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import grpc
import grpc.aio

from nodeagent import rpc
from nodeagent.wire.pb.deviceplugin.v1beta1 import api_pb2 as pb


class FakePlugin:
    """Use as `async with`, then `register()`. Grants what it is asked for; `prefer` None refuses GetPreferredAllocation."""

    def __init__(self, directory: Path, resource: str, endpoint: str = "fake.sock", **devices: bool) -> None:
        self.directory = directory
        self.resource = resource
        self.endpoint = endpoint
        self.options = pb.DevicePluginOptions(pre_start_required=True)
        self.prefer: list[str] | None = []
        self.answer: pb.ContainerAllocateResponse | None = pb.ContainerAllocateResponse(envs={"FAKE": "1"})
        """None: Allocate is answered for no container."""
        self.asked: list[pb.ContainerPreferredAllocationRequest] = []
        self._list = self._message(devices)
        self._changed = asyncio.Event()
        self._ended = asyncio.Event()
        self._server: grpc.aio.Server | None = None

    def devices(self, **devices: bool) -> None:
        """The list from now on: id -> healthy."""
        self._list = self._message(devices)
        self._wake()

    def end_streams(self) -> None:
        self._ended.set()
        self._wake()

    async def register(self) -> None:
        """A kubelet that starts removes every socket; then this serves on a new one."""
        if not (self.directory / self.endpoint).exists():
            await self._serve()
        async with rpc.channel(self.directory / "kubelet.sock") as channel:
            request = pb.RegisterRequest(version="v1beta1", endpoint=self.endpoint, resource_name=self.resource)
            await rpc.unary(channel, "/v1beta1.Registration/Register", pb.Empty)(request, timeout=5)

    async def __aenter__(self) -> Self:
        await self._serve()
        return self

    async def _serve(self) -> None:
        if self._server is not None:
            await self._server.stop(None)
        self._server = grpc.aio.server(options=rpc.OPTIONS)
        unaries: dict[str, tuple[Any, Any]] = {
            "GetDevicePluginOptions": (pb.Empty, self._on_options),
            "Allocate": (pb.AllocateRequest, self._on_allocate),
            "PreStartContainer": (pb.PreStartContainerRequest, self._on_prestart),
            "GetPreferredAllocation": (pb.PreferredAllocationRequest, self._on_preferred),
        }
        service = rpc.service("v1beta1.DevicePlugin", unaries, {"ListAndWatch": (pb.Empty, self._on_watch)})
        self._server.add_generic_rpc_handlers((service,))
        self._server.add_insecure_port(f"unix:{self.directory / self.endpoint}")
        await self._server.start()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._server is not None
        self.end_streams()
        await self._server.stop(0.2)

    def _message(self, devices: dict[str, bool]) -> pb.ListAndWatchResponse:
        return pb.ListAndWatchResponse(
            devices=[pb.Device(ID=i, health="Healthy" if good else "Unhealthy") for i, good in devices.items()]
        )

    def _wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    async def _on_options(self, request: Any, context: Any) -> pb.DevicePluginOptions:
        return self.options

    async def _on_watch(self, request: Any, context: Any) -> None:
        while not self._ended.is_set():
            changed = self._changed
            await context.write(self._list)
            await changed.wait()

    async def _on_allocate(self, request: pb.AllocateRequest, context: Any) -> pb.AllocateResponse:
        answers = [self.answer] * len(request.container_requests) if self.answer is not None else []
        return pb.AllocateResponse(container_responses=answers)

    async def _on_prestart(self, request: Any, context: Any) -> pb.PreStartContainerResponse:
        return pb.PreStartContainerResponse()

    async def _on_preferred(
        self, request: pb.PreferredAllocationRequest, context: Any
    ) -> pb.PreferredAllocationResponse:
        self.asked += request.container_requests
        if self.prefer is None:
            await context.abort(grpc.StatusCode.INTERNAL, "cannot say")
        return pb.PreferredAllocationResponse(
            container_responses=[pb.ContainerPreferredAllocationResponse(deviceIDs=self.prefer)]
        )
