"""Who holds which device ids, as the kubelet's PodResources API tells it (KEP-606)."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Self, TypeVar

import grpc
import msgspec
from google.protobuf.message import Message

from nodeagent.devices.peer import Peer, PeerError, PeerName
from nodeagent.devices.shared_call import SharedCall
from nodeagent.errors import Reason
from nodeagent.wire.pb.podresources.v1 import api_pb2 as pb

R = TypeVar("R", bound=Message)

LIST = "/v1.PodResourcesLister/List"
ALLOCATABLE = "/v1.PodResourcesLister/GetAllocatableResources"

INTERVAL_S = 0.025
"""Between two shared Lists: 40 a second, with room below the kubelet's 100 a second for others who ask (burst 10)."""
LIMITED_PAUSES_S = (0.05, 0.1, 0.2, 0.4, 0.8)
"""After RESOURCE_EXHAUSTED: the kubelet's limiter refills a call every 10 ms, for everybody on the node."""


class Holding(msgspec.Struct, frozen=True, order=True):
    """Device ids of one resource in one container, sorted."""

    namespace: str
    pod: str
    container: str
    resource: str
    ids: tuple[str, ...]


class PodResources:
    """The kubelet's PodResources socket. Every method raises AgentError(KUBELET_UNAVAILABLE) when it does not answer.

    An empty list says nothing about release: a kubelet without its API server lists no pods while they run.
    Containers that only initialise a pod are never listed.
    """

    def __init__(self, socket: Path, *, timeout_s: float = 5.0) -> None:
        self._timeout_s = timeout_s
        self._peer = Peer(
            PeerName(
                name=f"the kubelet's PodResources socket {socket}",
                reason=Reason.KUBELET_UNAVAILABLE,
                hint="is the kubelet running, and is kubelet.root_dir its --root-dir?",
            ),
            lambda: socket,
        )
        self._shared_list = SharedCall(self.list, interval_s=INTERVAL_S)
        self._shared_allocatable = SharedCall(self._allocatable, interval_s=INTERVAL_S)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._peer.close()

    async def list(self) -> tuple[Holding, ...]:
        """One List of its own, sorted. Prefer `fresh()` where many may ask at once."""
        return _holdings(await self._limited(LIST, pb.ListPodResourcesRequest(), pb.ListPodResourcesResponse))

    async def fresh(self) -> tuple[Holding, ...]:
        """A List that began after this call, shared by everybody who asks meanwhile."""
        return await self._shared_list()

    async def allocatable(self) -> dict[str, frozenset[str]]:
        """Resource -> ids the kubelet would hand out, healthy ones only (KEP-2403); begun after this call, shared."""
        return await self._shared_allocatable()

    async def _allocatable(self) -> dict[str, frozenset[str]]:
        answer = await self._limited(ALLOCATABLE, pb.AllocatableResourcesRequest(), pb.AllocatableResourcesResponse)
        return {resource: frozenset(ids) for resource, ids in _by_resource(answer.devices).items()}

    async def _limited(self, path: str, request: Message, answer: type[R]) -> R:
        for pause_s in LIMITED_PAUSES_S:
            try:
                return await self._peer.call(path, request, answer, timeout_s=self._timeout_s)
            except PeerError as error:
                if error.code is not grpc.StatusCode.RESOURCE_EXHAUSTED:
                    raise
            await asyncio.sleep(pause_s)
        return await self._peer.call(path, request, answer, timeout_s=self._timeout_s)


def _by_resource(devices: Iterable[pb.ContainerDevices]) -> dict[str, set[str]]:
    """The kubelet may split one resource into an entry per NUMA node."""
    found: dict[str, set[str]] = {}
    for entry in devices:
        found.setdefault(entry.resource_name, set()).update(entry.device_ids)
    return found


def _holdings(answer: pb.ListPodResourcesResponse) -> tuple[Holding, ...]:
    return tuple(
        sorted(
            Holding(pod.namespace, pod.name, container.name, resource, tuple(sorted(ids)))
            for pod in answer.pod_resources
            for container in pod.containers
            for resource, ids in _by_resource(container.devices).items()
            if ids
        )
    )
