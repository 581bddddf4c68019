"""The CRI face of the stand-in runtime: runtime.v1.RuntimeService over its records, on a Unix socket.

The five calls that nodeagent makes, answered as containerd answers them: names, namespaces and uids of pods both as metadata
and as `io.kubernetes.*` labels, mounts and times in ContainerStatus, process id and OCI spec in its verbose part.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Protocol

import grpc
import grpc.aio

from nodeagent import rpc
from nodeagent.demo.records import ContainerRecord, SandboxRecord
from nodeagent.wire.pb.cri.v1 import api_pb2 as pb

Context = grpc.aio.ServicerContext[Any, Any]


class Source(Protocol):
    """The runtime behind the socket."""

    def sandboxes(self) -> tuple[SandboxRecord, ...]: ...
    def containers(self) -> tuple[ContainerRecord, ...]: ...
    async def stop(self, container_id: str, timeout_s: float = 1.0) -> None: ...


@asynccontextmanager
async def serve(source: Source, socket: Path) -> AsyncIterator[None]:
    """Serve CRI until the block is left; the socket file is gone afterwards."""
    server = grpc.aio.server(options=rpc.OPTIONS)
    face = _Face(source)
    methods: dict[str, tuple[Any, rpc.Unary]] = {
        "Version": (pb.VersionRequest, face.version),
        "ListPodSandbox": (pb.ListPodSandboxRequest, face.list_pod_sandbox),
        "ListContainers": (pb.ListContainersRequest, face.list_containers),
        "ContainerStatus": (pb.ContainerStatusRequest, face.container_status),
        "StopContainer": (pb.StopContainerRequest, face.stop_container),
    }
    server.add_generic_rpc_handlers((rpc.service("runtime.v1.RuntimeService", methods),))
    server.add_insecure_port(f"unix:{socket}")
    await server.start()
    try:
        yield
    finally:
        await server.stop(0.2)
        await asyncio.to_thread(socket.unlink, missing_ok=True)


class _Face:
    def __init__(self, source: Source) -> None:
        self._source = source

    async def version(self, request: pb.VersionRequest, context: Context) -> pb.VersionResponse:
        return pb.VersionResponse(
            version="0.1.0", runtime_name="nodeagent-stand-in", runtime_version="1", runtime_api_version="v1"
        )

    async def list_pod_sandbox(self, request: pb.ListPodSandboxRequest, context: Context) -> pb.ListPodSandboxResponse:
        return pb.ListPodSandboxResponse(items=[_sandbox(s) for s in self._source.sandboxes()])

    async def list_containers(self, request: pb.ListContainersRequest, context: Context) -> pb.ListContainersResponse:
        return pb.ListContainersResponse(containers=[self._container(c) for c in self._source.containers()])

    async def container_status(
        self, request: pb.ContainerStatusRequest, context: Context
    ) -> pb.ContainerStatusResponse:
        record = await self._find(request.container_id, context)
        status = pb.ContainerStatus(
            id=record.id,
            metadata=pb.ContainerMetadata(name=record.name, attempt=record.attempt),
            state=pb.ContainerState.Name(record.state),
            created_at=record.created_ns,
            started_at=record.started_ns,
            finished_at=record.finished_ns,
            exit_code=record.exit_code,
            mounts=[
                pb.Mount(container_path=m.destination, host_path=m.source, readonly=m.readonly) for m in record.mounts
            ],
        )
        if not request.verbose:
            return pb.ContainerStatusResponse(status=status)
        info = {"sandboxID": record.sandbox_id, "pid": record.pid, "runtimeSpec": record.spec}
        return pb.ContainerStatusResponse(status=status, info={"info": json.dumps(info)})

    async def stop_container(self, request: pb.StopContainerRequest, context: Context) -> pb.StopContainerResponse:
        record = await self._find(request.container_id, context)
        await self._source.stop(record.id, float(request.timeout))
        return pb.StopContainerResponse()

    async def _find(self, container_id: str, context: Context) -> ContainerRecord:
        """By id or an unambiguous beginning of it, as containerd does; NOT_FOUND otherwise."""
        found = [c for c in self._source.containers() if container_id and c.id.startswith(container_id)]
        if len(found) != 1:
            await context.abort(
                grpc.StatusCode.NOT_FOUND, f"an error occurred when try to find container {container_id!r}: not found"
            )
        return found[0]

    def _container(self, record: ContainerRecord) -> pb.Container:
        pod = next(s.pod for s in self._source.sandboxes() if s.id == record.sandbox_id)
        return pb.Container(
            id=record.id,
            pod_sandbox_id=record.sandbox_id,
            metadata=pb.ContainerMetadata(name=record.name, attempt=record.attempt),
            state=pb.ContainerState.Name(record.state),
            created_at=record.created_ns,
            labels={
                "io.kubernetes.container.name": record.name,
                "io.kubernetes.pod.name": pod.name,
                "io.kubernetes.pod.namespace": pod.namespace,
                "io.kubernetes.pod.uid": pod.uid,
            },
        )


def _sandbox(record: SandboxRecord) -> pb.PodSandbox:
    pod = record.pod
    return pb.PodSandbox(
        id=record.id,
        metadata=pb.PodSandboxMetadata(name=pod.name, uid=pod.uid, namespace=pod.namespace),
        state=pb.SANDBOX_READY if record.ready else pb.SANDBOX_NOTREADY,
        created_at=record.created_ns,
        labels={
            **record.labels,
            "io.kubernetes.pod.name": pod.name,
            "io.kubernetes.pod.namespace": pod.namespace,
            "io.kubernetes.pod.uid": pod.uid,
        },
        runtime_handler=record.handler,
    )
