"""Which devices a container gets: the decisions of the kubelet's device manager, in its order and with its words.

After pkg/kubelet/cm/devicemanager/manager.go of Kubernetes 1.28 to 1.34; what a plugin's author would not expect is said where
it happens. NUMA hints are left out: devices without topology take that way anyway.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Mapping
from typing import TypeVar

import msgspec

from nodeagent.demo.checkpoint import Allocation, Checkpoint, Holder
from nodeagent.demo.endpoints import DeviceTable, Endpoint, PluginFailed
from nodeagent.demo.pods import ContainerNotStarted, ContainerSpec, NodeSpec, PodRejected, PodSpec, RunOptions
from nodeagent.devices.plugin import MountSpec

T = TypeVar("T")


class ResourceCount(msgspec.Struct, frozen=True):
    """One resource in the node's status. `capacity` counts unhealthy devices, `allocatable` does not; both count held ones."""

    capacity: int
    allocatable: int


class Admission:
    """The devices of the node, who holds them, and who gets them next. Admitting pods one at a time is the caller's part.

    `choose` stands for Go's order of iterating a map; `note` hears (method, resource, ids) before each call of a plugin.
    `checks_health` False imitates kubelets before kubernetes#109595 was fixed (1.25 to 1.27 by patch level): they gave a pod
    that comes again its devices without a look at them.
    """

    def __init__(
        self, choose: random.Random, note: Callable[[str, str, tuple[str, ...]], None], *, checks_health: bool = True
    ) -> None:
        self.endpoints: dict[str, Endpoint] = {}
        self.tables: dict[str, DeviceTable] = {}
        self.allocations: dict[Holder, Allocation] = {}
        self._choose = choose
        self._note = note
        self._checks_health = checks_health

    def load(self, checkpoint: Checkpoint, endpoint: Callable[[str, DeviceTable], Endpoint]) -> None:
        """A kubelet's start: allocations are as they were; resources are known by name, with no device and no plugin."""
        self.allocations = dict(checkpoint.allocations)
        self.tables = {r: DeviceTable() for r in checkpoint.resources}
        self.endpoints = {r: endpoint(r, table) for r, table in self.tables.items()}

    # ---- what is there

    def table(self, resource: str) -> DeviceTable:
        return self.tables.setdefault(resource, DeviceTable())

    def used(self, resource: str) -> set[str]:
        """Ids that somebody holds, there or not."""
        return {i for holder, a in self.allocations.items() if holder.resource == resource for i in a.ids}

    def known(self, resource: str) -> bool:
        """Registered, or held by somebody. Anything else is no business of the device manager, and a container that asks for
        it runs without it."""
        return resource in self.tables or any(h.resource == resource for h in self.allocations)

    def held(self, pod_uid: str, container: str) -> dict[str, Allocation]:
        """Resource -> what the container holds of it."""
        return {h.resource: a for h, a in self.allocations.items() if (h.pod_uid, h.container) == (pod_uid, container)}

    def node_status(self) -> dict[str, ResourceCount]:
        """Every resource of the node's status. One whose plugin has been away for too long is forgotten at this moment."""
        for resource in [r for r, e in self.endpoints.items() if e.expired]:
            del self.endpoints[resource], self.tables[resource]
        return {
            r: ResourceCount(len(t.healthy) + len(t.unhealthy), len(t.healthy))
            for r, t in self.tables.items()
            if r in self.endpoints
        }

    def free(self, gone: Callable[[str], bool]) -> None:
        """Forget what pods held that are gone (told by uid). No plugin is told."""
        self.allocations = {h: a for h, a in self.allocations.items() if not gone(h.pod_uid)}

    # ---- admission

    async def admit(self, pod: PodSpec, running: Callable[[str], bool] = lambda _: False) -> None:
        """Give each container of the pod its devices; raises PodRejected.

        `running` says of a container that the runtime has it running while the kubelet starts: it has what it needs.
        """
        reusable: dict[str, set[str]] = {}
        for container in pod.in_start_order:
            if not running(container.name):
                await self._admit_container(pod, container, reusable)
            for resource, allocation in self.held(pod.uid, container.name).items():
                if container.init and not container.restartable:
                    reusable.setdefault(resource, set()).update(allocation.ids)
                else:
                    reusable.get(resource, set()).difference_update(allocation.ids)

    async def _admit_container(self, pod: PodSpec, container: ContainerSpec, reusable: Mapping[str, set[str]]) -> None:
        for resource, count in self._shuffled(container.limits):
            try:
                await self._allocate(Holder(pod.uid, container.name, resource), count, reusable.get(resource, set()))
            except PluginFailed as error:
                raise PodRejected(
                    "UnexpectedAdmissionError", f"Allocate failed due to {error}, which is unexpected"
                ) from error

    async def _allocate(self, holder: Holder, count: int, reusable: set[str]) -> None:
        """One Allocate; none for a container that has its devices already."""
        if not self.known(holder.resource):
            return
        ids = await self._ids_for(holder, count, reusable)
        if not ids:
            return
        self._note("Allocate", holder.resource, ids)
        self.allocations[holder] = Allocation(ids, await self.endpoints[holder.resource].allocate(ids))

    async def _ids_for(self, holder: Holder, count: int, reusable: set[str]) -> tuple[str, ...]:
        """The ids to ask the plugin for, () for none. Health is looked at before anything else, also for who has them."""
        resource = holder.resource
        before = self.allocations.get(holder)
        if before is not None and not self._checks_health:
            return ()
        table = self.tables.get(resource)
        if table is None:
            raise PluginFailed(f"cannot allocate unregistered device {resource}")
        if not table.healthy:
            raise PluginFailed(f"no healthy devices present; cannot allocate unhealthy devices {resource}")
        if before is not None:
            if not table.healthy.issuperset(before.ids):
                raise PluginFailed(
                    f"previously allocated devices are no longer healthy; cannot allocate unhealthy devices {resource}"
                )
            return ()
        # What the pod's init containers had is taken over without a look at its health: one id is asked for twice.
        taken = self._some(reusable, count)
        if (missing := count - len(taken)) == 0:
            return taken
        available = table.healthy - self.used(resource)
        if len(available) < missing:
            raise PluginFailed(
                f"requested number of devices unavailable for {resource}."
                f" Requested: {missing}, Available: {len(available)}"
            )
        preferred = await self._preferred(resource, available | set(taken), taken, count) & available
        chosen = self._some(preferred, missing)
        return (*taken, *chosen, *self._some(available - set(chosen), missing - len(chosen)))

    async def _preferred(
        self, resource: str, available: frozenset[str], must: tuple[str, ...], count: int
    ) -> frozenset[str]:
        """The plugin's hint. It is asked also where there is nothing to choose, and a plugin that fails here fails the pod."""
        endpoint = self.endpoints[resource]
        if endpoint.options is None or not endpoint.options.get_preferred_allocation_available:
            return frozenset()
        offered = self._some(available, len(available))
        self._note("GetPreferredAllocation", resource, offered)
        return await endpoint.prefer(offered, must, count)

    # ---- starting a container

    async def prepare(self, pod: PodSpec, container: ContainerSpec) -> None:
        """Before every start of a container: PreStartContainer of each resource; raises ContainerNotStarted, or PodRejected when
        the container has to be given its devices only now and cannot be.

        A plugin that has not registered since the kubelet was started is *not* called: its options are unknown.
        """
        missing = False
        for resource, count in self._shuffled(container.limits):
            if not self.known(resource) or not count:
                continue
            try:
                await self._prestart(Holder(pod.uid, container.name, resource))
            except PluginFailed as error:
                raise ContainerNotStarted(str(error)) from error
            missing = missing or Holder(pod.uid, container.name, resource) not in self.allocations
        if missing:
            await self._admit_container(pod, container, {})

    async def _prestart(self, holder: Holder) -> None:
        endpoint = self.endpoints.get(holder.resource)
        if endpoint is None:
            raise PluginFailed(f"endpoint not found in cache for a registered resource: {holder.resource}")
        if endpoint.options is None or not endpoint.options.pre_start_required:
            return
        allocation = self.allocations.get(holder)
        if allocation is None:
            # A static pod that was admitted before its plugin registered: such a container can never be started again.
            raise PluginFailed(
                f"no devices found allocated in local cache for pod {holder.pod_uid},"
                f" container {holder.container}, resource {holder.resource}"
            )
        self._note("PreStartContainer", holder.resource, allocation.ids)
        await endpoint.prestart(allocation.ids)

    def run_options(self, pod_uid: str, container: str) -> RunOptions:
        """The plugins' cached answers in one. Of two variables or two mounts of one name the first is kept, and which
        resource comes first is chance."""
        env: dict[str, str] = {}
        mounts: dict[str, MountSpec] = {}
        nodes: dict[str, NodeSpec] = {}
        annotations: dict[str, str] = {}
        cdi: dict[str, None] = {}
        for _, allocation in self._shuffled(self.held(pod_uid, container)):
            answer = allocation.answer
            env = {**answer.envs, **env}
            annotations = {**answer.annotations, **annotations}
            for m in answer.mounts:
                given = MountSpec(container_path=m.container_path, host_path=m.host_path, read_only=m.read_only)
                mounts.setdefault(m.container_path, given)
            for d in answer.devices:
                node = NodeSpec(container_path=d.container_path, host_path=d.host_path, permissions=d.permissions)
                nodes.setdefault(d.container_path, node)
            cdi.update(dict.fromkeys(c.name for c in answer.cdi_devices))
        return RunOptions(
            env=env,
            mounts=tuple(mounts.values()),
            nodes=tuple(nodes.values()),
            annotations=annotations,
            cdi=tuple(cdi),
        )

    # ---- chance

    def _some(self, ids: Iterable[str], count: int) -> tuple[str, ...]:
        every = sorted(ids)
        return tuple(self._choose.sample(every, min(count, len(every))))

    def _shuffled(self, mapping: Mapping[str, T]) -> list[tuple[str, T]]:
        return self._choose.sample(list(mapping.items()), len(mapping))
