"""A container runtime that exists only as answers: a real gRPC server for runtime.v1, with records a test writes."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import grpc
import grpc.aio

from nodeagent import rpc
from nodeagent.wire.pb.cri.v1 import api_pb2 as pb


class FakeCri:
    """Use as `async with`. `sandboxes` and `containers` are what it lists; `calls` counts by method."""

    def __init__(self, socket: Path) -> None:
        self.socket = socket
        self.sandboxes: list[pb.PodSandbox] = []
        self.containers: list[pb.Container] = []
        self.mounts: dict[str, dict[str, str]] = {}
        self.info: dict[str, str] = {}
        self.broken: dict[str, grpc.StatusCode] = {}
        """Container id -> how its ContainerStatus fails."""
        self.calls: dict[str, int] = {}
        self.stopped: list[tuple[str, int]] = []
        self.most_at_once = 0
        self.gate = asyncio.Event()
        """Cleared: ContainerStatus does not answer."""
        self.gate.set()
        self._now = 0
        self._server: grpc.aio.Server | None = None

    def add_sandbox(self, name: str, *, ready: bool = True, **labels: str) -> pb.PodSandbox:
        sandbox = pb.PodSandbox(
            id=f"sandbox-{name}",
            metadata=pb.PodSandboxMetadata(name=name, namespace="default", uid=f"uid-{name}"),
            state=pb.SANDBOX_READY if ready else pb.SANDBOX_NOTREADY,
            created_at=5,
            labels={"io.kubernetes.pod.name": name, "io.kubernetes.pod.uid": f"uid-{name}", **labels},
            runtime_handler="runsc",
        )
        self.sandboxes.append(sandbox)
        return sandbox

    def add_container(
        self, container_id: str, sandbox_id: str, mounts: dict[str, str], pid: int = 7, state: int = 1
    ) -> None:
        self.containers.append(
            pb.Container(
                id=container_id,
                pod_sandbox_id=sandbox_id,
                metadata=pb.ContainerMetadata(name="desktop"),
                state=state,  # type: ignore[arg-type]
                created_at=6,
            )
        )
        self.mounts[container_id] = mounts
        self.info[container_id] = json.dumps({"sandboxID": sandbox_id, "pid": pid, "runtimeSpec": {"hooks": None}})

    async def __aenter__(self) -> Self:
        self._server = grpc.aio.server(options=rpc.OPTIONS)
        self._server.add_generic_rpc_handlers(
            (
                rpc.service(
                    "runtime.v1.RuntimeService",
                    {
                        "ListPodSandbox": (pb.ListPodSandboxRequest, self._sandboxes),
                        "ListContainers": (pb.ListContainersRequest, self._containers),
                        "ContainerStatus": (pb.ContainerStatusRequest, self._status),
                        "StopContainer": (pb.StopContainerRequest, self._stop),
                    },
                ),
            )
        )
        self._server.add_insecure_port(f"unix:{self.socket}")
        await self._server.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._server is not None
        await self._server.stop(None)

    def _count(self, method: str) -> None:
        self.calls[method] = self.calls.get(method, 0) + 1

    async def _sandboxes(self, request: pb.ListPodSandboxRequest, context: Any) -> pb.ListPodSandboxResponse:
        self._count("ListPodSandbox")
        return pb.ListPodSandboxResponse(items=self.sandboxes)

    async def _containers(self, request: pb.ListContainersRequest, context: Any) -> pb.ListContainersResponse:
        self._count("ListContainers")
        return pb.ListContainersResponse(containers=self.containers)

    async def _status(self, request: pb.ContainerStatusRequest, context: Any) -> pb.ContainerStatusResponse:
        self._count("ContainerStatus")
        self._now += 1
        self.most_at_once = max(self.most_at_once, self._now)
        try:
            await self.gate.wait()
            await asyncio.sleep(0.01)
        finally:
            self._now -= 1
        if request.container_id in self.broken:
            await context.abort(self.broken[request.container_id], "no such container")
        assert request.verbose
        return pb.ContainerStatusResponse(
            status=pb.ContainerStatus(
                id=request.container_id,
                mounts=[
                    pb.Mount(container_path=inside, host_path=host)
                    for inside, host in self.mounts[request.container_id].items()
                ],
            ),
            info={"info": self.info[request.container_id]},
        )

    async def _stop(self, request: pb.StopContainerRequest, context: Any) -> pb.StopContainerResponse:
        self._count("StopContainer")
        if not any(c.id == request.container_id for c in self.containers):
            await context.abort(grpc.StatusCode.NOT_FOUND, f"container {request.container_id!r} not found")
        self.stopped.append((request.container_id, request.timeout))
        return pb.StopContainerResponse()
