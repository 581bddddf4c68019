"""A fake kubelet over the plugins' real servers: it admits pods, asks before containers start, and goes on after a crash."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from nodeagent.model import DeviceNode
from nodeagent.wire.pb.deviceplugin.v1beta1 import api_pb2 as pb
from tests.histories.edges import Aborted, FakeContext, FakeRegistrar, Pauses
from tests.histories.model import Book, claims_of
from tests.histories.world import DOMAIN, WALL_S, Allocation, ContainerRecord, Pod, SandboxRecord, World

RETRY_S = (1.0, 3.0, 7.0)
"""After a container that did not start."""
RESUME_S = (0.0, 0.5, 4.0)
"""From the start of the daemon; it is registered after a second or so."""
PENDING = 16
"""Quarter seconds that a pod waits for a device."""
INIT_S = (0.1, 1.0)
"""How long an init container runs."""


class Rejected(Exception):
    """Admission failed; the pod is no more."""


class FakeKubelet:
    """What it remembers is in the world; what it is doing ends with the life of the daemon and is taken up in the next."""

    def __init__(
        self, world: World, book: Book, registrar: FakeRegistrar, pause: Pauses, tasks: asyncio.TaskGroup,
        bus_ids: Callable[[], dict[str, DeviceNode]],
    ) -> None:  # fmt: skip
        self._world, self._book, self._registrar, self._pause = world, book, registrar, pause
        self._tasks, self._bus_ids = tasks, bus_ids
        self._admission = asyncio.Lock()

    def resume(self) -> None:
        """Containers that are still to be started when a daemon begins."""
        for pod in tuple(self._world.pods.values()):
            if pod.phase == "starting":
                self._tasks.create_task(self._resume(pod))

    async def _resume(self, pod: Pod) -> None:
        await self._pause(RESUME_S)
        await self._start(pod)

    def run(self, pod: Pod) -> None:
        self._world.pods[pod.uid] = pod
        self._tasks.create_task(self._run(pod))

    async def _run(self, pod: Pod) -> None:
        try:
            await self._scheduled(pod)
            async with self._admission:
                await self._admit(pod)
        except Rejected as why:
            self._world.tell(f"kubelet: {pod.name} is rejected: {why}")
            self._world.forget(pod.uid)
            return
        if pod.uid not in self._world.pods:
            return
        pod.phase = "starting"
        await self._pause()
        self._make_sandbox(pod)
        await self._start(pod)

    # ---- admission

    async def _scheduled(self, pod: Pod) -> None:
        """A pod waits while there is not enough for it, and is forgotten after a while."""
        for _ in range(PENDING):
            wanted: dict[str, int] = {}
            for wants in pod.wants.values():
                for leaf, count in wants.items():
                    wanted[leaf] = max(wanted.get(leaf, 0), count) if pod.init else wanted.get(leaf, 0) + count
            if all(len(self._free(leaf) or ()) >= count for leaf, count in wanted.items()):
                return
            await asyncio.sleep(0.25)
            if pod.uid not in self._world.pods:
                break
        raise Rejected("no room")

    async def _admit(self, pod: Pod) -> None:
        world = self._world
        if not world.kubelet_up:
            raise Rejected("no kubelet")
        reusable: dict[str, set[str]] = {}
        for container in pod.in_order:
            wants = list(pod.wants[container].items())
            self._pause.chance.shuffle(wants)
            for leaf, count in wants:
                had = reusable.setdefault(leaf, set())
                ids = self._choose(leaf, count, had)
                await self._allocate(pod, container, f"{DOMAIN}/{leaf}", ids)
                if container == pod.init:
                    had.update(ids)
                else:
                    had.difference_update(ids)

    def _free(self, leaf: str) -> set[str] | None:
        devices = self._world.lists.get(f"{DOMAIN}/{leaf}")
        if devices is None:
            return None
        used = {i for (_, _, r), a in self._world.allocations.items() if r == f"{DOMAIN}/{leaf}" for i in a.ids}
        return {i for i, healthy in devices.items() if healthy and i not in used}

    def _choose(self, leaf: str, count: int, reusable: set[str]) -> tuple[str, ...]:
        """As the kubelet does: what its init containers had, then the plugin's preference or any."""
        again = sorted(reusable)[:count]
        free = sorted((self._free(leaf) or set()) - set(again))
        missing = count - len(again)
        if len(free) < missing:
            raise Rejected(f"insufficient {leaf}")
        return (*again, *self._pause.chance.sample(free, missing))

    async def _allocate(self, pod: Pod, container: str, resource: str, ids: tuple[str, ...]) -> None:
        world, server = self._world, self._registrar.servers.get(resource)
        if server is None:
            raise Rejected(f"{resource} is not registered")
        await self._pause()
        offers = dict(server.resource.offers)
        for i in ids:
            if i in offers and (claims := claims_of(world, offers[i])):
                self._book.asked[resource, i] = claims
            self._book.holders[resource, i] = pod.uid
        request = pb.AllocateRequest(container_requests=[pb.ContainerAllocateRequest(devices_ids=ids)])
        world.tell(f"kubelet: Allocate {resource} {', '.join(ids)} for {pod.name}")
        try:
            response = await server._on_allocate(request, FakeContext())  # type: ignore[arg-type]
        except Aborted as error:
            raise Rejected(str(error)) from error
        answer = response.container_responses[0]
        self._check_siblings(resource, ids)
        await self._pause()
        known = self._bus_ids()
        world.allocations[pod.uid, container, resource] = Allocation(
            ids,
            {m.container_path: m.host_path for m in answer.mounts},
            tuple(known[d.host_path] for d in answer.devices if d.host_path in known),
        )
        world.tell(f"kubelet: Allocate for {pod.name} is answered")

    def _check_siblings(self, resource: str, ids: tuple[str, ...]) -> None:
        """At the moment Allocate returns the kubelet must not think that anything else of the same part is free."""
        mine = frozenset[tuple[str, int]]().union(*(self._book.asked.get((resource, i), frozenset()) for i in ids))
        for name, server in self._registrar.servers.items():
            for device_id, offer in server.resource.offers.items():
                if (name == resource and device_id in ids) or not claims_of(self._world, offer) & mine:
                    continue
                leased = self._book.leases.get(device_id)
                if leased is not None and leased.resource == name and device_id not in ids:
                    continue
                if self._world.lists.get(name, {}).get(device_id):
                    self._world.violated(f"Allocate of {resource} returned while {name} {device_id} was Healthy")

    # ---- containers

    def _make_sandbox(self, pod: Pod) -> None:
        world = self._world
        world.made += 1
        world.sandboxes.append(
            SandboxRecord(f"s{world.made}", pod.ref, pod.labels, pod.handler, int((WALL_S + world.now_s) * 1e9))
        )

    async def _start(self, pod: Pod) -> None:
        """Start its containers in order, each until it runs. Ends with the pod."""
        if pod.uid not in self._world.pods:
            return
        if self._world.sandbox(pod.uid) is None:
            self._make_sandbox(pod)
        for container in pod.in_order:
            if container in pod.started:
                continue
            while not await self.start_container(pod, container):
                await self._pause(RETRY_S)
            if pod.uid not in self._world.pods:
                return
            pod.started.append(container)
            if container == pod.init:
                await self._pause(INIT_S)
                self._world.containers = [
                    c for c in self._world.containers if (c.sandbox_id, c.name) != (self._sandbox_id(pod), container)
                ]
        pod.phase = "running"

    def _sandbox_id(self, pod: Pod) -> str:
        sandbox = self._world.sandbox(pod.uid)
        return sandbox.id if sandbox else ""

    async def start_container(self, pod: Pod, container: str) -> bool:
        """Ask, mount, run. A resource that is not registered is not asked: the container starts all the same.

        Whether there is nothing left to do about it.
        """
        world = self._world
        asked = True
        await self._pause()
        for leaf in pod.wants[container]:
            resource = f"{DOMAIN}/{leaf}"
            allocation = world.allocations.get((pod.uid, container, resource))
            if allocation is None:
                return True
            if resource not in world.lists:
                asked = False
                continue
            request = pb.PreStartContainerRequest(devices_ids=allocation.ids)
            try:
                await self._registrar.servers[resource]._on_prestart(request, FakeContext())  # type: ignore[arg-type]
            except Aborted as error:
                world.tell(f"kubelet: {pod.name}/{container} is not started: {error}")
                return pod.uid not in world.pods
            self._book.broken.discard(pod.uid)
            await self._pause()
        if pod.uid not in world.pods or world.sandbox(pod.uid) is None:
            return True
        self._mount(pod, container, asked)
        return True

    def _mount(self, pod: Pod, container: str, asked: bool) -> None:
        """The runtime makes the container; a missing host path becomes an empty directory, as containerd does."""
        world = self._world
        mounts: dict[str, str] = {}
        nodes: set[DeviceNode] = set()
        for leaf in pod.wants[container]:
            allocation = world.allocations[pod.uid, container, f"{DOMAIN}/{leaf}"]
            mounts |= allocation.mounts
            nodes |= set(allocation.nodes)
        inodes = {}
        for inside, path in mounts.items():
            inodes[inside] = world.inode(path)
            self._book.used(inodes[inside], pod.uid, "mounted")
        world.made += 1
        sandbox_id = self._sandbox_id(pod)
        world.containers = [c for c in world.containers if (c.sandbox_id, c.name) != (sandbox_id, container)]
        pid = 0 if pod.handler == "runsc" else world.made
        world.containers.append(
            ContainerRecord(
                f"c{world.made}",
                sandbox_id,
                container,
                int((WALL_S + world.now_s) * 1e9),
                pid,
                mounts,
                inodes,
                nodes,
                asked,
            )
        )
        world.tell(f"runtime: {pod.name}/{container} runs" + ("" if asked else ", nobody was asked"))
