"""A stand-in kubelet: real sockets, real gRPC, and the habits of the real one, for the demo and the tests.

It registers device plugins, admits pods, hands out devices, and answers PodResources. It runs no containers: the callback
`start_container` does, or nothing does. What it imitates was seen on a real kubelet or read in its source; the comments say
what a plugin author would not expect.
"""

from __future__ import annotations

import asyncio
import random
from collections import deque
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn, Self, TypeVar

import grpc
import grpc.aio
import msgspec

from nodeagent import rpc
from nodeagent.demo.endpoints import Endpoint, PluginCall
from nodeagent.demo.pods import (
    ContainerNotStarted,
    ContainerSpec,
    NodeSpec,
    PodPending,
    PodRejected,
    PodSpec,
    RunOptions,
)
from nodeagent.devices.plugin import MountSpec
from nodeagent.wire.pb.deviceplugin.v1beta1 import api_pb2 as pb
from nodeagent.wire.pb.podresources.v1 import api_pb2 as podresources

T = TypeVar("T")

LIST_PER_S = 100.0
LIST_BURST = 10
"""The kubelet's limits on PodResources (pkg/kubelet/apis/podresources: DefaultQPS, DefaultBurstTokens)."""
MAX_CALLS = 10_000
KEPT_CALLS = 4096

Mounts = tuple[MountSpec, ...]
Nodes = tuple[NodeSpec, ...]
StartContainer = Callable[[PodSpec, ContainerSpec, dict[str, str], Mounts, Nodes], Awaitable[None]]
"""(pod, container, variables, mounts, device nodes); returns when it runs, or for an init container when it has ended."""


class _Allocation(msgspec.Struct, frozen=True):
    """One line of the checkpoint: it outlives restarts of the kubelet, the plugin's answer included."""

    ids: tuple[str, ...]
    answer: pb.ContainerAllocateResponse


async def _start_nothing(
    pod: PodSpec, container: ContainerSpec, env: dict[str, str], mounts: Mounts, nodes: Nodes
) -> None:
    """For tests that are about the kubelet alone."""


class StandInKubelet:
    """Use as `async with`. `directory` is the device-plugin directory, `pod_resources` the path of that socket.

    `stream_end_lag_s` imitates kubelets before #135437: so long after a plugin's stream ended they disconnect whoever is
    registered under its name by then (k8s#127803).
    """

    def __init__(
        self,
        directory: Path,
        pod_resources: Path,
        start_container: StartContainer = _start_nothing,
        *,
        seed: int = 0,
        stream_end_lag_s: float = 0.0,
    ) -> None:
        self.socket = directory / "kubelet.sock"
        self.has_sources = True
        """False while the API server is away: PodResources lists no pods then."""
        self.endpoints: dict[str, Endpoint] = {}
        self.pods: dict[str, PodSpec] = {}
        """Admitted pods by uid."""
        self.calls: deque[PluginCall] = deque(maxlen=KEPT_CALLS)
        """What plugins were asked, newest last."""
        self.lists = 0
        """How many PodResources Lists were answered."""
        self.registrations = 0
        self._directory = directory
        self._pod_resources = pod_resources
        self._start_container = start_container
        self._random = random.Random(seed)  # noqa: S311 (a map's order of iteration, not a secret)
        self._lag_s = stream_end_lag_s
        self._allocations: dict[tuple[str, str, str], _Allocation] = {}  # pod uid, container, resource
        self._admission = asyncio.Lock()
        self._changed = asyncio.Event()
        self._answering = asyncio.Event()
        self._answering.set()
        self._tokens = float(LIST_BURST)
        self._refilled_s = 0.0
        self._servers: list[tuple[grpc.aio.Server, Path]] = []
        self._stack = AsyncExitStack()
        self._group = asyncio.TaskGroup()

    async def __aenter__(self) -> Self:
        await self._stack.enter_async_context(self._group)
        self._stack.push_async_callback(self.vanish)
        await self._serve()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._stack.__aexit__(kind, error, trace)

    # ---- what a person sees with kubectl

    def allocatable(self, resource: str) -> frozenset[str]:
        """Ids that count as allocatable: healthy ones of a connected plugin, held or not."""
        endpoint = self.endpoints.get(resource)
        return endpoint.healthy if endpoint else frozenset()

    def held(self, pod: PodSpec, container: str, resource: str) -> tuple[str, ...]:
        """The ids a container holds, () when none."""
        found = self._allocations.get((pod.uid, container, resource))
        return found.ids if found else ()

    async def until(self, condition: Callable[[], bool], timeout_s: float = 10.0) -> None:
        """Wait for something that follows from registrations, device lists or calls; raises TimeoutError."""
        async with asyncio.timeout(timeout_s):
            while not condition():
                await self._changed.wait()

    # ---- pods

    async def start(self, pod: PodSpec) -> None:
        """Admit a pod and start its containers in order. Raises PodPending, PodRejected, ContainerNotStarted."""
        await self.admit(pod)
        for container in pod.in_start_order:
            await self.start_container(pod, container.name)

    async def admit(self, pod: PodSpec) -> None:
        """Give the pod its devices; one pod at a time on the whole node, however slow a plugin is (k8s#117435)."""
        async with self._admission:
            await self._answering.wait()
            if not pod.static:
                self._schedule(pod)
            self.pods[pod.uid] = pod
            reusable: dict[str, set[str]] = {}
            try:
                for container in pod.in_start_order:
                    for resource, count in self._shuffled(container.limits):
                        await self._allocate(pod, container, resource, count, reusable.setdefault(resource, set()))
            except PodRejected:
                self.delete(pod)
                raise

    async def pre_start(self, pod: PodSpec, container: str) -> None:
        """PreStartContainer for each resource of a container, before every start of it; raises ContainerNotStarted.

        A plugin that has not registered since the kubelet was restarted is *not* called: its options are unknown. Only
        one that went away under the same kubelet is an error.
        """
        await self._answering.wait()
        held = {r: a.ids for (uid, name, r), a in self._allocations.items() if (uid, name) == (pod.uid, container)}
        for resource, ids in self._shuffled(held):
            endpoint = self.endpoints.get(resource)
            if endpoint is None or endpoint.options is None or not endpoint.options.pre_start_required:
                continue
            if not endpoint.connected:
                raise ContainerNotStarted(f"endpoint {endpoint.socket} has been stopped")
            self._note("PreStartContainer", resource, ids)
            try:
                await endpoint.prestart(ids)
            except grpc.aio.AioRpcError as error:
                raise ContainerNotStarted(
                    f"device plugin PreStartContainer rpc failed with err: {_rpc(error)}"
                ) from error

    async def start_container(self, pod: PodSpec, container: str) -> None:
        """Start or restart one container of an admitted pod, with the answers that Allocate gave once."""
        await self.pre_start(pod, container)
        options = self.run_options(pod, container)
        spec = pod.container(container)
        await self._start_container(pod, spec, {**options.env, **spec.env}, options.mounts, options.nodes)

    def run_options(self, pod: PodSpec, container: str) -> RunOptions:
        """The plugins' cached answers in one. Of two variables or two mounts of one name the first is kept, and which
        resource comes first is chance."""
        mine = {r: a.answer for (uid, name, r), a in self._allocations.items() if (uid, name) == (pod.uid, container)}
        env: dict[str, str] = {}
        mounts: dict[str, MountSpec] = {}
        nodes: dict[str, NodeSpec] = {}
        annotations: dict[str, str] = {}
        for _, answer in self._shuffled(mine):
            env = {**answer.envs, **env}
            annotations = {**answer.annotations, **annotations}
            for m in answer.mounts:
                given = MountSpec(container_path=m.container_path, host_path=m.host_path, read_only=m.read_only)
                mounts.setdefault(m.container_path, given)
            for d in answer.devices:
                node = NodeSpec(container_path=d.container_path, host_path=d.host_path, permissions=d.permissions)
                nodes.setdefault(d.container_path, node)
        return RunOptions(env=env, mounts=tuple(mounts.values()), nodes=tuple(nodes.values()), annotations=annotations)

    def delete(self, pod: PodSpec) -> None:
        """The pod has ended: its ids are free at once. No plugin is told."""
        self.pods.pop(pod.uid, None)
        self._allocations = {key: a for key, a in self._allocations.items() if key[0] != pod.uid}

    # ---- what happens to a kubelet

    async def restart(self, *, api_away: bool = False) -> None:
        """Restart: allocations are kept, connections and every socket in the directory are not; resources are known by name
        with no devices until their plugins register again. With the API server away there are no pods to list either."""
        await self.vanish()
        self.has_sources = not api_away
        await self._serve()

    async def vanish(self) -> None:
        """The kubelet ends; its sockets are gone and its connections closed. `restart()` brings it back."""
        self.unhang()
        servers, self._servers = self._servers, []
        for server, path in servers:
            path.unlink(missing_ok=True)
            await server.stop(None)
        for endpoint in self.endpoints.values():
            await endpoint.close()
        self.endpoints = {r: Endpoint(r, None, self._pulse) for r in self.endpoints}
        self._pulse()

    def hang(self) -> None:
        """Accept connections and calls, answer none, as if stopped by a signal. Open connections stay open."""
        self._answering.clear()

    def unhang(self) -> None:
        self._answering.set()

    # ---- admission

    def _schedule(self, pod: PodSpec) -> None:
        for resource in sorted({r for c in pod.containers for r in c.limits}):
            used = {i for (_, _, r), a in self._allocations.items() if r == resource for i in a.ids}
            if pod.request(resource) > len(self.allocatable(resource) - used):
                raise PodPending(f"Insufficient {resource}")

    async def _allocate(
        self, pod: PodSpec, container: ContainerSpec, resource: str, count: int, reusable: set[str]
    ) -> None:
        """One Allocate. An app container takes over what the pod's init containers had, so an id may be asked for twice."""
        endpoint = self.endpoints.get(resource)
        if endpoint is None:
            return  # only a static pod comes here: it runs without its devices and nobody says so
        used = {i for (_, _, r), a in self._allocations.items() if r == resource for i in a.ids}
        again = sorted(reusable & endpoint.healthy)[:count]
        free = sorted(endpoint.healthy - used)
        if len(again) + len(free) < count:
            self._reject(
                f"requested number of devices unavailable for {resource}."
                f" Requested: {count}, Available: {len(again) + len(free)}"
            )
        ids = (*again, *self._random.sample(free, count - len(again)))
        self._note("Allocate", resource, ids)
        try:
            answer = await endpoint.allocate(ids)
        except grpc.aio.AioRpcError as error:
            self._reject(f"Allocate failed due to {_rpc(error)}, which is unexpected")
        self._allocations[pod.uid, container.name, resource] = _Allocation(ids, answer)
        if container.init:
            reusable.update(ids)
        else:
            reusable.difference_update(ids)

    def _reject(self, message: str) -> NoReturn:
        raise PodRejected("UnexpectedAdmissionError", message)

    # ---- the servers

    async def _serve(self) -> None:
        for path in self._directory.iterdir():
            if path.is_socket():
                path.unlink()
        self._pod_resources.parent.mkdir(parents=True, exist_ok=True)
        registration = rpc.service("v1beta1.Registration", {"Register": (pb.RegisterRequest, self._on_register)})
        lister = rpc.service(
            "v1.PodResourcesLister",
            {
                "List": (podresources.ListPodResourcesRequest, self._on_list),
                "GetAllocatableResources": (podresources.AllocatableResourcesRequest, self._on_allocatable),
            },
        )
        await self._listen(self._pod_resources, lister)
        await self._listen(self.socket, registration)

    async def _listen(self, path: Path, service: grpc.GenericRpcHandler[Any, Any]) -> None:
        """gRPC removes the path it bound when its server is collected, which may be after the next one has its name:
        hence another name at first."""
        server = grpc.aio.server(options=rpc.OPTIONS, maximum_concurrent_rpcs=MAX_CALLS)
        server.add_generic_rpc_handlers((service,))
        unnamed = path.with_name(f".{path.name}-{self._random.getrandbits(32):08x}")
        server.add_insecure_port(f"unix:{unnamed}")
        await server.start()
        unnamed.rename(path)
        self._servers.append((server, path))

    async def _on_register(self, request: pb.RegisterRequest, context: grpc.aio.ServicerContext[Any, Any]) -> pb.Empty:
        await self._answering.wait()
        if request.version != "v1beta1":
            await context.abort(grpc.StatusCode.UNKNOWN, f"requested API version {request.version!r} is not supported")
        if "/" not in request.resource_name:
            await context.abort(grpc.StatusCode.UNKNOWN, f"the ResourceName {request.resource_name!r} is invalid")
        endpoint = Endpoint(request.resource_name, self._directory / request.endpoint, self._pulse)
        try:
            await endpoint.dial()
        except BaseException as error:
            await endpoint.close()
            if not isinstance(error, grpc.aio.AioRpcError):
                raise
            await context.abort(grpc.StatusCode.UNKNOWN, f"failed to dial device plugin: {_rpc(error)}")
        previous = self.endpoints.get(request.resource_name)
        self.endpoints[request.resource_name] = endpoint
        self.registrations += 1
        endpoint.watch(self._group, self._on_stream_end)
        if previous is not None:
            await previous.close()
        self._pulse()
        return pb.Empty()

    def _on_stream_end(self, endpoint: Endpoint) -> None:
        if self._lag_s:
            self._group.create_task(self._disconnect_late(endpoint.resource))
        endpoint.disconnect()

    async def _disconnect_late(self, resource: str) -> None:
        await asyncio.sleep(self._lag_s)
        await self.endpoints[resource].close()

    async def _on_list(
        self, request: podresources.ListPodResourcesRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> podresources.ListPodResourcesResponse:
        await self._answering.wait()
        await self._limit(context)
        self.lists += 1
        pods = self.pods.values() if self.has_sources else ()
        return podresources.ListPodResourcesResponse(pod_resources=[self._listed(pod) for pod in pods])

    def _listed(self, pod: PodSpec) -> podresources.PodResources:
        """App containers only: a device of an init container alone shows nowhere. One entry per device, as with NUMA nodes."""
        return podresources.PodResources(
            name=pod.name,
            namespace=pod.namespace,
            containers=[
                podresources.ContainerResources(
                    name=c.name,
                    devices=[
                        podresources.ContainerDevices(resource_name=resource, device_ids=[i])
                        for (uid, name, resource), a in self._allocations.items()
                        if (uid, name) == (pod.uid, c.name)
                        for i in a.ids
                    ],
                )
                for c in pod.containers
                if not c.init
            ],
        )

    async def _on_allocatable(
        self, request: podresources.AllocatableResourcesRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> podresources.AllocatableResourcesResponse:
        await self._answering.wait()
        await self._limit(context)
        return podresources.AllocatableResourcesResponse(
            devices=[
                podresources.ContainerDevices(resource_name=e.resource, device_ids=sorted(e.healthy))
                for e in self.endpoints.values()
            ]
        )

    async def _limit(self, context: grpc.aio.ServicerContext[Any, Any]) -> None:
        now_s = asyncio.get_running_loop().time()
        self._tokens = min(float(LIST_BURST), self._tokens + (now_s - self._refilled_s) * LIST_PER_S)
        self._refilled_s = now_s
        if self._tokens < 1:
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "rejected by rate limit")
        self._tokens -= 1

    # ---- small things

    def _shuffled(self, mapping: dict[str, T]) -> list[tuple[str, T]]:
        return self._random.sample(list(mapping.items()), len(mapping))

    def _note(self, method: str, resource: str, ids: tuple[str, ...]) -> None:
        self.calls.append(PluginCall(method, resource, ids))
        self._pulse()

    def _pulse(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()


def _rpc(error: grpc.aio.AioRpcError) -> str:
    return f"rpc error: code = {error.code().name} desc = {error.details()}"
