"""A stand-in kubelet: real sockets, real gRPC, and the habits of the real one, for the demo and the tests.

It registers device plugins, admits pods, hands out devices, and answers PodResources. It runs no containers: the callback
`start_container` does, or nothing does. What it imitates was seen on a real kubelet or read in its source; the comments say
what a plugin author would not expect. Decisions about devices are in admission.py, plugins in endpoints.py, memory in
checkpoint.py.
"""

from __future__ import annotations

import asyncio
import random
from collections import deque
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import grpc
import grpc.aio
import msgspec

from nodeagent import rpc
from nodeagent.demo.admission import Admission, ResourceCount
from nodeagent.demo.checkpoint import Checkpoint, Holder, put_checkpoint, read_checkpoint, write_checkpoint
from nodeagent.demo.endpoints import DeviceTable, Endpoint, PluginCall, PluginFailed
from nodeagent.demo.pods import ContainerNotStarted, ContainerSpec, PodPending, PodRejected, PodSpec, RunOptions
from nodeagent.wire.pb.deviceplugin.v1beta1 import api_pb2 as pb
from nodeagent.wire.pb.podresources.v1 import api_pb2 as podresources

LIST_PER_S = 100.0
LIST_BURST = 10
"""The kubelet's limits on PodResources (pkg/kubelet/apis/podresources: DefaultQPS, DefaultBurstTokens)."""
MAX_CALLS = 10_000
KEPT_CALLS = 4096

StartContainer = Callable[[PodSpec, ContainerSpec, RunOptions], Awaitable[None]]
"""Starts a container; returns when it runs, or for an init container when it has ended. `env` has the container's own
variables too, and they win."""


async def _start_nothing(pod: PodSpec, container: ContainerSpec, options: RunOptions) -> None:
    """For tests that are about the kubelet alone."""


class StandInKubelet:
    """Use as `async with`. `directory` is the device-plugin directory, `pod_resources` the path of that socket.

    `stream_end_lag_s` imitates kubelets before #135437: so long after a plugin's stream ended they disconnect whoever is
    registered under its name by then (k8s#127803). `checks_health`: see Admission. `clock` gives seconds, the loop's own by
    default; the grace period of a plugin that went away is measured with it.
    """

    def __init__(
        self,
        directory: Path,
        pod_resources: Path,
        start_container: StartContainer = _start_nothing,
        *,
        seed: int = 0,
        stream_end_lag_s: float = 0.0,
        checks_health: bool = True,
        clock: Callable[[], float] | None = None,
    ) -> None:
        self.socket = directory / "kubelet.sock"
        self.has_sources = True
        """False while the API server is away: PodResources lists no pods then, and nothing is forgotten."""
        self.pods: dict[str, PodSpec] = {}
        """Admitted pods by uid."""
        self.running: set[tuple[str, str]] = set()
        """(pod uid, container) that the runtime has running; what was started and has not ended since."""
        self.resource_health: dict[str, dict[str, bool]] = {}
        """Pod uid -> id -> healthy: what the pod's status says of its devices (KEP-4680). See `sync`."""
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
        self._clock = clock or (lambda: asyncio.get_running_loop().time())
        self._devices = Admission(self._random, self._note, checks_health=checks_health)
        self._clients: set[Endpoint] = set()  # every connection, that of a plugin that registered again since included
        self._admitting = asyncio.Lock()
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

    @property
    def endpoints(self) -> dict[str, Endpoint]:
        """The last plugin that registered, by resource."""
        return self._devices.endpoints

    def allocatable(self, resource: str) -> frozenset[str]:
        """Ids that count as allocatable: healthy ones of a connected plugin, held or not."""
        endpoint = self.endpoints.get(resource)
        return endpoint.healthy if endpoint else frozenset()

    def node_status(self) -> dict[str, ResourceCount]:
        """Capacity and allocatable of every resource, as the kubelet would report them now."""
        return self._devices.node_status()

    def held(self, pod: PodSpec, container: str, resource: str) -> tuple[str, ...]:
        """The ids a container holds, () when none."""
        found = self._devices.allocations.get(Holder(pod.uid, container, resource))
        return found.ids if found else ()

    def sync(self, pod: PodSpec) -> dict[str, bool]:
        """What the pod's status says of its devices once it is written anew, which any change of the pod brings about: an id
        that its plugin does not list counts as healthy."""
        status = {}
        for holder, allocation in self._devices.allocations.items():
            if holder.pod_uid == pod.uid:
                told = self._devices.table(holder.resource).told
                status.update({i: told.get(i, True) for i in allocation.ids})
        self.resource_health[pod.uid] = status
        return status

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
        """Give the pod its devices; one pod at a time on the whole node, however slow a plugin is (k8s#117435).

        A static pod that comes before its plugin is admitted without the device, and nobody says so.
        """
        async with self._admitting:
            await self._answering.wait()
            if self.has_sources:
                self._devices.free(lambda uid: uid not in self.pods)
            if not pod.static:
                self._schedule(pod)
            self.pods[pod.uid] = pod
            try:
                await self._devices.admit(pod)
            except PodRejected:
                self.delete(pod)
                raise

    async def readmit(self) -> dict[str, PodRejected]:
        """What a kubelet does when it learns its pods anew after a start: each is admitted again, and a container that does not
        run has to find its devices healthy. Returns the pods that were rejected, by uid; they are gone (k8s#125579)."""
        rejected = {}
        async with self._admitting:
            for pod in tuple(self.pods.values()):
                try:
                    await self._devices.admit(pod, lambda name, uid=pod.uid: (uid, name) in self.running)  # type: ignore[misc]
                except PodRejected as refusal:
                    rejected[pod.uid] = refusal
                    self.delete(pod)
        return rejected

    async def pre_start(self, pod: PodSpec, container: str) -> None:
        """PreStartContainer for each resource of a container, before every start of it; raises ContainerNotStarted."""
        await self._answering.wait()
        await self._devices.prepare(pod, pod.container(container))

    async def start_container(self, pod: PodSpec, container: str) -> None:
        """Start or restart one container of an admitted pod, with the answers that Allocate gave once."""
        self.running.discard((pod.uid, container))
        await self.pre_start(pod, container)
        options = self.run_options(pod, container)
        spec = pod.container(container)
        await self._start_container(pod, spec, msgspec.structs.replace(options, env={**options.env, **spec.env}))
        if not spec.init or spec.restartable:
            self.running.add((pod.uid, container))

    def run_options(self, pod: PodSpec, container: str) -> RunOptions:
        """What the device plugins' cached answers come to."""
        return self._devices.run_options(pod.uid, container)

    def delete(self, pod: PodSpec) -> None:
        """The pod has ended: its ids are free at once. No plugin is told."""
        self.pods.pop(pod.uid, None)
        self.resource_health.pop(pod.uid, None)
        self.running = {(uid, name) for uid, name in self.running if uid != pod.uid}
        self._devices.free(lambda uid: uid == pod.uid)

    # ---- what happens to a kubelet

    async def restart(self, *, api_away: bool = False) -> None:
        """Restart: allocations are kept, connections and every socket in the directory are not; resources are known by name
        with no devices until their plugins register again. With the API server away there are no pods to list either.

        Containers run on; the pods are admitted again with `readmit()`.
        """
        await self.vanish()
        self.has_sources = not api_away
        await self._serve()

    async def reboot(
        self, before_pods: Callable[[], Awaitable[object]] | None = None
    ) -> dict[str, PodRejected | ContainerNotStarted]:
        """The node reboots: no container runs, the kubelet has its checkpoint. After `before_pods` (a plugin that registers,
        say) every pod is admitted again and its containers are started from the cached answers, without Allocate, and with
        PreStartContainer only if the plugin has registered by then. Returns what became of pods that do not run, by uid."""
        await self.vanish()
        self.running.clear()
        self.has_sources = True
        await self._serve()
        if before_pods is not None:
            await before_pods()
        failed: dict[str, PodRejected | ContainerNotStarted] = dict(await self.readmit())
        for pod in tuple(self.pods.values()):
            try:
                for container in pod.in_start_order:
                    await self.start_container(pod, container.name)
            except (PodRejected, ContainerNotStarted) as failure:
                failed[pod.uid] = failure
        return failed

    async def vanish(self) -> None:
        """The kubelet ends; its sockets are gone and its connections closed. `restart()` brings it back."""
        self.unhang()
        devices = self._devices
        if self._servers:
            registered = [(r, t.healthy) for r, t in devices.tables.items()]
            content = put_checkpoint(Checkpoint(devices.allocations), registered)
            await asyncio.to_thread(write_checkpoint, self._directory, content)
        servers, self._servers = self._servers, []
        for server, path in servers:
            path.unlink(missing_ok=True)
            await server.stop(None)
        for endpoint in tuple(self._clients):
            await endpoint.close()
        self._clients.clear()
        self._pulse()

    def hang(self) -> None:
        """Accept connections and calls, answer none, as if stopped by a signal. Open connections stay open."""
        self._answering.clear()

    def unhang(self) -> None:
        self._answering.set()

    # ---- the cluster

    def _schedule(self, pod: PodSpec) -> None:
        for resource in sorted({r for c in pod.containers for r in c.limits}):
            if pod.request(resource) > len(self.allocatable(resource) - self._devices.used(resource)):
                raise PodPending(f"Insufficient {resource}")

    # ---- the servers

    async def _serve(self) -> None:
        for path in self._directory.iterdir():
            if path.is_socket():
                path.unlink()
        checkpoint = await asyncio.to_thread(read_checkpoint, self._directory)
        self._devices.load(checkpoint, lambda resource, table: self._endpoint(resource, None, table))
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

    def _endpoint(self, resource: str, socket: Path | None, table: DeviceTable) -> Endpoint:
        return Endpoint(resource, socket, table, self._pulse, self._clock)

    async def _on_register(self, request: pb.RegisterRequest, context: grpc.aio.ServicerContext[Any, Any]) -> pb.Empty:
        """A plugin that registers again does not lose its old connection: both streams are read until the plugin ends one."""
        await self._answering.wait()
        if request.version != "v1beta1":
            await context.abort(grpc.StatusCode.UNKNOWN, f"requested API version {request.version!r} is not supported")
        if "/" not in request.resource_name:
            await context.abort(grpc.StatusCode.UNKNOWN, f"the ResourceName {request.resource_name!r} is invalid")
        table = self._devices.table(request.resource_name)
        endpoint = self._endpoint(request.resource_name, self._directory / request.endpoint, table)
        try:
            await endpoint.dial()
        except PluginFailed as error:
            await endpoint.close()
            await context.abort(grpc.StatusCode.UNKNOWN, str(error))
        except BaseException:
            await endpoint.close()
            raise
        self._clients.add(endpoint)
        self.endpoints[request.resource_name] = endpoint
        self.registrations += 1
        endpoint.watch(self._group, self._on_devices, self._on_stream_end)
        self._pulse()
        return pb.Empty()

    def _on_devices(self, endpoint: Endpoint, message: pb.ListAndWatchResponse) -> None:
        """A list. A pod's status hears of an id only where the list names it: one that vanished stays as it was."""
        changed = endpoint.table.tell(message.devices)
        held = self._devices.allocations.items()
        touched = {h.pod_uid for h, a in held if h.resource == endpoint.resource and changed.intersection(a.ids)}
        for uid in touched & self.pods.keys():
            self.sync(self.pods[uid])

    def _on_stream_end(self, endpoint: Endpoint) -> None:
        if self._lag_s:
            self._group.create_task(self._disconnect_late(endpoint.resource))
        if self.endpoints.get(endpoint.resource) is endpoint:
            endpoint.table.lose()
        self._clients.discard(endpoint)
        endpoint.disconnect()

    async def _disconnect_late(self, resource: str) -> None:
        await asyncio.sleep(self._lag_s)
        if resource in self.endpoints:
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
        """App containers and sidecars: a device of an init container alone shows nowhere. One entry per device, as with NUMA
        nodes."""
        return podresources.PodResources(
            name=pod.name,
            namespace=pod.namespace,
            containers=[
                podresources.ContainerResources(
                    name=c.name,
                    devices=[
                        podresources.ContainerDevices(resource_name=resource, device_ids=[i])
                        for resource, a in self._devices.held(pod.uid, c.name).items()
                        for i in a.ids
                    ],
                )
                for c in pod.containers
                if not c.init or c.restartable
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

    def _note(self, method: str, resource: str, ids: tuple[str, ...]) -> None:
        self.calls.append(PluginCall(method, resource, ids))
        self._pulse()

    def _pulse(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()
