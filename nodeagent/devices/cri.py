"""Which pod sandboxes and containers run, as the container runtime tells it over CRI (runtime.v1).

CRI works with the API server and the kubelet away, and a sandbox is there before its containers, with the pod's own labels.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Annotated, Self

import grpc
import msgspec
from msgspec import Meta

from nodeagent.devices.peer import Peer, PeerError, PeerName
from nodeagent.devices.shared_call import SharedCall
from nodeagent.errors import Reason
from nodeagent.host import HostRoot
from nodeagent.model import Container, PodRef, Sandbox
from nodeagent.wire.pb.cri.v1 import api_pb2 as pb

SOCKETS = ("/run/containerd/containerd.sock", "/run/crio/crio.sock", "/var/run/cri-dockerd.sock")
"""Where containerd, CRI-O and cri-dockerd listen when nobody says otherwise; the first that is there is taken."""

SERVICE = "/runtime.v1.RuntimeService/"
KUBERNETES_LABELS = "io.kubernetes."
"""The kubelet's own labels on sandboxes; no pod label may begin so (kubernetes.io names are checked by the API server)."""

LIST_TIMEOUT_S = 5.0
STATUS_TIMEOUT_S = 2.0
"""One container whose shim hangs must not keep the others waiting for long."""
STATUS_RETRY_S = 10.0
"""A container whose status timed out is not asked again for so long."""
STOP_MARGIN_S = 10.0
STATUS_CONCURRENCY = 8
MAX_INFO_BYTES = 4 << 20
"""info["info"] repeats the container's whole OCI spec."""


class CriView(msgspec.Struct, frozen=True):
    """Sandboxes and running containers of one look."""

    sandboxes: tuple[Sandbox, ...]
    containers: tuple[Container, ...]


class _Process(msgspec.Struct, frozen=True):
    """The part of info["info"] that containerd and CRI-O agree on; unknown fields are skipped."""

    pid: Annotated[int, Meta(ge=0, le=2**31 - 1)] = 0


class _Status(msgspec.Struct, frozen=True):
    mounts: dict[str, str] = {}
    pid: int = 0


_process_decoder = msgspec.json.Decoder(_Process)


class Cri:
    """The container runtime's socket, at `socket` or where the well-known runtimes have theirs; both below the host's root.

    Every method raises AgentError(CRI_UNAVAILABLE) when the runtime does not answer.
    """

    def __init__(self, host: HostRoot, socket: str = "") -> None:
        self._host = host
        self._wanted = socket
        name = f"the container runtime at {socket}" if socket else "the container runtime"
        self._peer = Peer(
            PeerName(
                name=name,
                reason=Reason.CRI_UNAVAILABLE,
                hint="is containerd (1.6 or later), CRI-O or cri-dockerd running, and is cri.socket its socket?",
            ),
            self._socket,
        )
        self._known: dict[str, _Status] = {}
        self._silent: dict[str, float] = {}  # container id -> when it may be asked again
        self._asking = asyncio.Semaphore(STATUS_CONCURRENCY)
        self._shared_containers = SharedCall(self._containers)
        self._shared_view = SharedCall(self._view)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._peer.close()

    async def sandboxes(self) -> tuple[Sandbox, ...]:
        """Every pod sandbox, ready or not."""
        answer = await self._peer.call(
            SERVICE + "ListPodSandbox",
            pb.ListPodSandboxRequest(),
            pb.ListPodSandboxResponse,
            timeout_s=LIST_TIMEOUT_S,
        )
        return tuple(_sandbox(item) for item in answer.items)

    async def containers(self) -> tuple[Container, ...]:
        """Every running container, with its mounts and the host's pid of its first process.

        Both are empty (`{}`, 0) for a container whose status the runtime does not tell; it is asked again next time.
        """
        return await self._shared_containers()

    async def fresh(self) -> CriView:
        """A look at both that began after this call, shared by everybody who asks meanwhile.

        Sandboxes are listed after containers, so that the sandbox of a container that is shown is there as well.
        """
        return await self._shared_view()

    async def stop_container(self, container_id: str, timeout_s: int) -> None:
        """Ask the container to end (SIGTERM), kill it after `timeout_s`. One that is gone already is fine."""
        try:
            await self._peer.call(
                SERVICE + "StopContainer",
                pb.StopContainerRequest(container_id=container_id, timeout=timeout_s),
                pb.StopContainerResponse,
                timeout_s=timeout_s + STOP_MARGIN_S,
            )
        except PeerError as error:
            if error.code is not grpc.StatusCode.NOT_FOUND:
                raise

    def _socket(self) -> Path:
        if self._wanted:
            return self._host.path(self._wanted)
        candidates = [self._host.path(s) for s in SOCKETS]
        return next((c for c in candidates if c.is_socket()), candidates[0])

    async def _view(self) -> CriView:
        containers = await self.containers()
        return CriView(await self.sandboxes(), containers)

    async def _containers(self) -> tuple[Container, ...]:
        answer = await self._peer.call(
            SERVICE + "ListContainers",
            pb.ListContainersRequest(),
            pb.ListContainersResponse,
            timeout_s=LIST_TIMEOUT_S,
        )
        running = {c.id: c for c in answer.containers if c.state == pb.CONTAINER_RUNNING}
        now_s = asyncio.get_running_loop().time()
        self._known = {i: status for i, status in self._known.items() if i in running}
        self._silent = {i: again_s for i, again_s in self._silent.items() if i in running and again_s > now_s}
        new = [i for i in running if i not in self._known and i not in self._silent]
        async with asyncio.TaskGroup() as group:
            asked = {i: group.create_task(self._status(i)) for i in new}
        gone = set()
        for container_id, task in asked.items():
            status = task.result()
            if isinstance(status, _Status):
                self._known[container_id] = status
            elif status is grpc.StatusCode.NOT_FOUND:
                gone.add(container_id)
            elif status is grpc.StatusCode.DEADLINE_EXCEEDED:
                self._silent[container_id] = now_s + STATUS_RETRY_S
        return tuple(_container(c, self._known.get(i, _Status())) for i, c in running.items() if i not in gone)

    async def _status(self, container_id: str) -> _Status | grpc.StatusCode:
        """What does not change while the container runs, or the code of the failure to tell."""
        async with self._asking:
            try:
                answer = await self._peer.call(
                    SERVICE + "ContainerStatus",
                    pb.ContainerStatusRequest(container_id=container_id, verbose=True),
                    pb.ContainerStatusResponse,
                    timeout_s=STATUS_TIMEOUT_S,
                )
            except PeerError as error:
                return error.code
        mounts = {m.container_path: m.host_path for m in answer.status.mounts}
        return _Status(mounts, take_pid(answer.info))


def take_pid(untrusted_info: Mapping[str, str]) -> int:
    """The process id in the verbose info of a ContainerStatus; 0 when it is missing, malformed or larger than allowed."""
    untrusted_json = untrusted_info.get("info", "")
    if len(untrusted_json) > MAX_INFO_BYTES:
        return 0
    try:
        return _process_decoder.decode(untrusted_json).pid
    except (msgspec.DecodeError, UnicodeError, RecursionError):
        return 0


def _sandbox(item: pb.PodSandbox) -> Sandbox:
    return Sandbox(
        id=item.id,
        pod=PodRef(item.metadata.namespace, item.metadata.name, item.metadata.uid),
        ready=item.state == pb.SANDBOX_READY,
        labels={k: v for k, v in item.labels.items() if not k.startswith(KUBERNETES_LABELS)},
        handler=item.runtime_handler,
        created_ns=item.created_at,
    )


def _container(item: pb.Container, status: _Status) -> Container:
    return Container(
        id=item.id,
        sandbox_id=item.pod_sandbox_id,
        name=item.metadata.name,
        running=True,
        created_ns=item.created_at,
        mounts=status.mounts,
        pid=status.pid,
    )
