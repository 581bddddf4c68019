"""The comparison: every two seconds, what leases say against what the container runtime and the kubelet say.

It looks at CRI (which works with the API server away) and at the leases, and does what is missing: binds running containers,
refuses those that `to:` does not fit, reports those that started on a directory that is not their slot, takes device nodes after
a replug into containers that run, and ends the leases whose sandbox is gone.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable

import msgspec

from nodeagent.devices.cri import Cri, CriView
from nodeagent.devices.leases import Leases
from nodeagent.devices.pod_cgroups import pods_with_cgroups
from nodeagent.devices.podresources import PodResources
from nodeagent.devices.slots import Slots
from nodeagent.errors import AgentError, Reason
from nodeagent.host import HostRoot
from nodeagent.metrics import Metrics
from nodeagent.model import Container, Lease, Resource, Sandbox
from nodeagent.sandboxes import mounted
from nodeagent.seats.binding import Binding
from nodeagent.seats.clean_ups import CleanUps
from nodeagent.seats.node_carriage import NodeCarriage
from nodeagent.seats.refusals import Reporter
from nodeagent.seats.roster import Roster

log = logging.getLogger(__name__)

COMPARE_S = 2.0
EARLY_S = 0.2
"""Between two comparisons that a change of devices asked for."""
UNSEEN_S = 120.0
"""An allocation that no pod was ever seen to hold is forgotten after this, once PodResources lists others but not it."""
BLIND_S = 60.0
"""Without an answer of the container runtime for so long, pods are looked for among the cgroups."""
MAX_REMEMBERED = 4096


class Seen(msgspec.Struct, frozen=True):
    """A running container that has a slot mounted."""

    slot: str
    ids: tuple[str, ...]
    resource: Resource | None
    destination: str
    container: Container
    sandbox: Sandbox
    shared: bool
    """A container of another pod has the same path mounted."""


class Comparison:
    """`run()` compares until it is cancelled; `wake()` asks for a comparison now."""

    def __init__(
        self,
        *,
        binding: Binding,
        host: HostRoot,
        leases: Leases,
        slots: Slots,
        roster: Roster,
        cri: Cri,
        pod_resources: PodResources,
        clean_ups: CleanUps,
        carriage: NodeCarriage,
        report: Reporter,
        metrics: Metrics,
        on_release: Callable[[], None] = lambda: None,
        now: Callable[[], float] = time.time,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.cri_error = ""
        self.cri_since_s = 0.0
        """When the container runtime began or ceased to answer, Unix seconds."""
        self._binding, self._host, self._leases, self._slots, self._roster = binding, host, leases, slots, roster
        self._cri, self._pod_resources, self._clean_ups, self._carriage = cri, pod_resources, clean_ups, carriage
        self._report, self._metrics, self._on_release = report, metrics, on_release
        self._now, self._clock = now, clock
        self._wanted = asyncio.Event()
        self._blind_at: float | None = None
        self._missing: frozenset[str] = frozenset()  # pods without a cgroup at the last look
        self._unlisted: dict[tuple[str, int], float] = {}  # device id, generation -> when it was first not listed
        self._judged: dict[str, None] = {}  # containers whose mount was looked at, oldest first
        self._unbound: dict[str, str] = {}  # slot -> why its container could not be given its seat

    def wake(self) -> None:
        """Devices changed: containers with device nodes may need others."""
        if any(x.pod is not None and x.container for x in self._leases.leases):
            self._wanted.set()

    async def run(self) -> None:
        """Compare every two seconds, and when asked to, until cancelled."""
        while True:
            self._wanted.clear()
            try:
                await self.compare()
            except (AgentError, OSError) as error:  # a full disk, say: seats go on, the next comparison tries again
                log.error("a comparison was not finished: %s", error)
            await asyncio.sleep(EARLY_S)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(COMPARE_S - EARLY_S):
                    await self._wanted.wait()

    async def compare(self) -> None:
        """One comparison. CRI being away changes nothing but `cri_error`, for a minute; then a pod without a cgroup is gone."""
        asked_at = self._clock()
        try:
            view = await self._cri.fresh()
        except AgentError as error:
            self._heard(error.message)
            await self._release_without_cgroup(asked_at)
            return
        self._heard("")
        alive = {s.pod.uid for s in view.sandboxes if s.ready}
        await self._release_dead(view, alive, asked_at)
        self._clean_ups.of_dead(alive)
        await self._roster.clear_spool(alive)
        for seen in self._seen(view):
            try:
                await self._see_to(seen)
                self._unbound.pop(seen.slot, None)
            except (AgentError, OSError) as error:
                self._could_not(seen, error)
        await self._carriage.follow(view)
        await self._forget_unseen(view)

    def _heard(self, error: str) -> None:
        if not self.cri_since_s or bool(error) != bool(self.cri_error):
            self.cri_since_s = self._now()
            self._blind_at = self._clock() if error else None
        self.cri_error = error

    def _could_not(self, seen: Seen, error: AgentError | OSError) -> None:
        """One desktop's trouble is nobody else's; it is tried again at the next comparison, and said once."""
        if self._unbound.get(seen.slot) == str(error):
            return
        self._unbound[seen.slot] = str(error)
        pod = seen.sandbox.pod
        log.error("pod %s cannot be given its devices now: %s", pod, error)
        reason = error.reason if isinstance(error, AgentError) else Reason.INTERNAL
        self._metrics.denied.labels(reason.value).inc()
        self._report.pod_event(pod, reason, str(error))

    # ---- containers that run

    def _seen(self, view: CriView) -> list[Seen]:
        """Every running container that mounted a slot and does not yet have it for sure."""
        sandboxes = {s.id: s for s in view.sandboxes if s.ready}
        running = [(c, sandboxes[c.sandbox_id]) for c in view.containers if c.running and c.sandbox_id in sandboxes]
        found = []
        for container, sandbox in running:
            for destination, source in container.mounts.items():
                name = source.rpartition("/")[2]
                if source != str(self._slots.path(name)):
                    continue
                holder = self._roster.holder(name)
                if holder is not None and holder.pod == sandbox.pod and f"{container.id}/{name}" in self._judged:
                    continue
                leases = [x for x in self._leases.leases if x.slot == name]
                document = self._slots.read(name)
                ids = tuple(sorted(x.device_id for x in leases)) or (document.ids if document else ())
                resource = leases[0].resource if leases else document.resource if document else ""
                shared = any(s.pod != sandbox.pod and source in c.mounts.values() for c, s in running)
                offered = self._binding.resources.get(resource)
                found.append(Seen(name, ids, offered, destination, container, sandbox, shared))
        return found

    async def _see_to(self, seen: Seen) -> None:
        """Bind the slot to the pod whose running container mounted it, or say why not."""
        binding, pod = self._binding, seen.sandbox.pod
        if not seen.ids:
            return await self._stale(seen, "nothing is known of it")
        if seen.resource is None:
            return None  # its rule is gone, or its devices have not been read yet
        account = await binding.account_of(seen.resource.to, pod)
        async with binding.lock:
            if not await self._is_due(seen, seen.resource, account):
                return None
            leased = binding.generations(seen.ids)
            binding.vacate_others(seen.ids, pod)
        await binding.settled(seen.ids, pod)
        async with binding.lock:
            if binding.generations(seen.ids) == leased:
                await binding.bind(seen.slot, seen.resource, seen.ids, seen.sandbox, seen.container.name, running=True)
                self._remember(seen)
        binding.on_leases()
        return None

    async def _is_due(self, seen: Seen, resource: Resource, account: str | None) -> bool:
        """Whether the slot is still to be bound to the pod, and may be. Under the lock."""
        name, sandbox = seen.slot, seen.sandbox
        holder = self._roster.holder(name)
        mine = holder is not None and holder.pod == sandbox.pod
        try:
            await self._binding.admit(
                name, resource, seen.ids, sandbox, account, attempt=False, note=holder is None or mine
            )
        except AgentError:
            return False
        if mine and holder is not None:
            holder.kind = self._binding.kind(sandbox)  # not known when it was rebound
        if not await self._is_ours(seen) or (seen.shared and not mine):
            await self._stale(seen, "it was made before its slot" if not seen.shared else "another pod has it too")
            return False
        if mine:
            self._remember(seen)
        return not mine

    def _remember(self, seen: Seen) -> None:
        self._judged[f"{seen.container.id}/{seen.slot}"] = None
        while len(self._judged) > MAX_REMEMBERED:
            del self._judged[next(iter(self._judged))]

    async def _is_ours(self, seen: Seen) -> bool:
        """Whether the container has mounted the directory that stands at the slot's path now."""
        kind = self._binding.kind(seen.sandbox)
        root = await asyncio.to_thread(mounted, self._host, kind, seen.container, seen.destination)
        if root is not None:
            return root.endswith(f"/{seen.slot}")
        document = self._slots.read(seen.slot)
        return document is None or document.made_ns <= seen.container.created_ns

    async def _stale(self, seen: Seen, why: str) -> None:
        """A container started on a directory that is not its slot: the kubelet skipped us, or the node was rebooted."""
        if f"{seen.container.id}/{seen.slot}" in self._judged:
            return
        self._remember(seen)
        restart = self._binding.config.devices.stale_slot == "restart"
        message = (
            f"container {seen.container.name} of pod {seen.sandbox.pod} started without its devices: the directory it"
            f" mounted is not its slot ({why}); " + ("it is being restarted" if restart else "restart the container")
        )
        log.warning("%s", message)
        self._metrics.denied.labels(Reason.STALE_SLOT.value).inc()
        self._report.pod_event(seen.sandbox.pod, Reason.STALE_SLOT, message)
        if restart:
            try:
                await self._cri.stop_container(seen.container.id, timeout_s=10)
            except AgentError as error:
                log.error("cannot restart container %s of pod %s: %s", seen.container.name, seen.sandbox.pod, error)

    # ---- what has ended

    async def _release_dead(self, view: CriView, alive: set[str], asked_at: float) -> None:
        """End what belongs to pods that have no ready sandbox any more, and directories that belong to nobody.

        One at a time, so that an Allocate never waits for a node that is being drained. A pod that was seen after the
        question was asked may be missing in the answer and yet live.
        """
        for lease in self._leases.leases:
            if lease.pod is not None and lease.pod.uid not in alive:
                await self._release(lease, asked_at, "its sandbox is gone")
        async with self._binding.lock:
            for seat in tuple(self._roster.seats.values()):
                if seat.pod.uid not in alive and self._roster.began_at(seat.name) < asked_at:
                    self._roster.end(seat.name)
            mounts = _mounted_sources(view)
            for name in self._slots.names() - {x.slot for x in self._leases.leases}:
                if str(self._slots.path(name)) not in mounts and self._roster.holder(name) is None:
                    self._slots.discard(self._slots.set_aside(name))

    async def _release_without_cgroup(self, asked_at: float) -> None:
        """The runtime has been away for a minute: end leases of pods that had no cgroup twice in a row."""
        if self._blind_at is None or self._clock() - self._blind_at < BLIND_S:
            return
        found = await asyncio.to_thread(pods_with_cgroups, self._host)
        held = {x.pod.uid for x in self._leases.leases if x.pod is not None}
        missing = frozenset(held - found) if found is not None else frozenset()
        for lease in self._leases.leases:
            if lease.pod is not None and lease.pod.uid in missing & self._missing:
                await self._release(lease, asked_at, "its pod has no cgroup any more")
        self._missing = missing

    async def _release(self, lease: Lease, asked_at: float, why: str) -> None:
        async with self._binding.lock:
            if lease in self._leases.leases and not self._binding.seen_since(lease.slot, asked_at):
                await self._binding.release(lease, why)
                self._on_release()

    async def _forget_unseen(self, view: CriView) -> None:
        """Forget allocations whose pod failed before anybody saw it. Never while the kubelet lists nothing: it may be blind.

        By our own count of seconds: the wall clock of a node jumps.
        """
        unheld = [x for x in self._leases.leases if x.pod is None]
        keys = {(x.device_id, x.generation) for x in unheld}
        self._unlisted = {key: at for key, at in self._unlisted.items() if key in keys}
        if not unheld:
            return
        try:
            holdings = await self._pod_resources.list()
        except AgentError:
            return
        held = {(h.resource, i) for h in holdings for i in h.ids}
        mounts = _mounted_sources(view)
        for lease in unheld:
            key = (lease.device_id, lease.generation)
            if self._roster.holder(lease.slot) is not None:
                continue  # allocated anew while the pod that had it still ends
            listed = not holdings or (lease.resource, lease.device_id) in held
            if listed or str(self._slots.path(lease.slot)) in mounts:
                self._unlisted.pop(key, None)
                continue
            if self._clock() - self._unlisted.setdefault(key, self._clock()) >= UNSEEN_S:
                async with self._binding.lock:
                    if lease in self._leases.leases:
                        await self._binding.release(lease, "no pod was ever seen to hold it")
                        self._on_release()


def _mounted_sources(view: CriView) -> set[str]:
    """Every path of the host that a running container has mounted."""
    return {source for c in view.containers for source in c.mounts.values()}
