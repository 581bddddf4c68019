"""Binding: who holds a slot, learned quickly in PreStartContainer and in any case by a comparison every two seconds.

Allocate names no pod; it makes the slot and its lease. `compare` looks at CRI (which works with the API server away) and at
the leases, and does what is missing: binds running containers, refuses those that `to:` does not fit, reports those that
started on a directory that is not their slot, and ends the leases whose sandbox is gone. PreStartContainer is only the fast
path: a kubelet that lost its plugin starts containers without it.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Protocol

import msgspec

from nodeagent.config import Config
from nodeagent.devices import slots as slot_rules
from nodeagent.devices.cri import Cri, CriView
from nodeagent.devices.leases import Leases
from nodeagent.devices.plugin import SlotAnswer
from nodeagent.devices.podresources import Holding, PodResources
from nodeagent.devices.slots import Slots
from nodeagent.errors import AgentError, Reason
from nodeagent.host import HostRoot
from nodeagent.metrics import Metrics
from nodeagent.model import Audience, Container, Lease, Offer, PodRef, Resource, Sandbox, SandboxKind
from nodeagent.sandboxes import kind_of, mounted
from nodeagent.seats.admission import admit, needs_account
from nodeagent.seats.roster import Roster

log = logging.getLogger(__name__)

COMPARE_S = 2.0
LIVE_S = 5.0
"""How long a binding waits for its worker to listen; the kubelet gives PreStartContainer 30 s."""
UNSEEN_S = 120.0
"""An allocation that no pod was ever seen to hold is forgotten after this, once PodResources lists others but not it."""
MAX_REMEMBERED = 4096


class Reporter(Protocol):
    """Where Events about pods go."""

    def pod_event(self, pod: PodRef, reason: Reason | str, message: str, *, warning: bool = True) -> None: ...


AccountLookup = Callable[[PodRef], Awaitable[str | None]]


class Refusal(msgspec.Struct, frozen=True):
    """A pod that holds a slot it may not have."""

    slot: str
    resource: str
    pod: PodRef
    reason: Reason
    message: str
    since_s: float


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


class Binding:
    """The one writer of leases and seats. All changes to one slot happen under one lock."""

    def __init__(
        self,
        *,
        config: Config,
        host: HostRoot,
        leases: Leases,
        slots: Slots,
        roster: Roster,
        cri: Cri,
        pod_resources: PodResources,
        account: AccountLookup,
        report: Reporter,
        metrics: Metrics,
        on_release: Callable[[], None] = lambda: None,
        now: Callable[[], float] = time.time,
    ) -> None:
        self.config = config
        self.resources: Mapping[str, Resource] = {}
        self.refusals: dict[str, Refusal] = {}
        self.cri_error = ""
        self.cri_since_s = 0.0
        """When the container runtime began or ceased to answer, Unix seconds."""
        self._host, self._leases, self._slots, self._roster = host, leases, slots, roster
        self._cri, self._pod_resources, self._account = cri, pod_resources, account
        self._report, self._metrics, self._on_release, self._now = report, metrics, on_release, now
        self._lock = asyncio.Lock()
        self._seen_s: dict[str, float] = {}  # slot -> when its pod was last seen to want it
        self._judged: dict[str, None] = {}  # containers whose mount was looked at, oldest first
        self._unbound: dict[str, str] = {}  # slot -> why its container could not be given its seat

    # ---- the kubelet's calls (devices.plugin.Allocator)

    async def allocate(self, resource: Resource, ids: tuple[str, ...]) -> SlotAnswer:
        """Lease `ids` and make their slot. Raises AgentError when another resource holds one of them.

        The directory is always a fresh one: whoever mounted the last one was a holder before this.
        """
        name = slot_rules.slot_name(resource.name, ids)
        async with self._lock:
            await self._leases.allocate(resource.name, ids, name, self._now())
            aside = self._slots.set_aside(name)
            if self._roster.holder(name) is None:
                self._slots.discard(aside)
            else:
                self._roster.moved(name, aside)
            self.refusals.pop(name, None)
            path = self._slots.ensure(name)
            self._slots.write(slot_rules.document(name, resource, ids, "allocated", self._now_ns()))
        return slot_rules.answer(resource, ids, path)

    async def prestart(self, resource: Resource, ids: tuple[str, ...]) -> None:
        """Bind the slot to the pod that is about to start a container with `ids`, or raise AgentError to refuse it."""
        holdings, view = await self._look()
        holding = _holding(holdings, resource.name, ids)
        if holding is None:
            raise AgentError(
                Reason.INIT_CONTAINER_ONLY,
                f"the kubelet lists no app container that holds {', '.join(ids)} of {resource.name}",
                hint="a device asked for by an init container alone cannot be given; ask for it in an app container too",
            )
        sandbox = _newest_ready(view, holding.namespace, holding.pod)
        if sandbox is None:
            raise AgentError(
                Reason.IDENTITY_UNAVAILABLE,
                f"the container runtime shows no ready sandbox of pod {holding.namespace}/{holding.pod}",
                hint="the kubelet tries again by itself",
            )
        name = slot_rules.slot_name(resource.name, ids)
        account = await self._account_of(resource.to, sandbox.pod)
        async with self._lock:
            await self._admit(name, resource, ids, sandbox, account)
            for _, slot in self._roster.others(ids, sandbox.pod):
                self._roster.vacate(slot)
        await self._roster.settled(ids)
        async with self._lock:
            await self._bind(name, resource, ids, sandbox, holding.container, running=False)
        await self._roster.wait_live(name, LIVE_S)

    async def _look(self) -> tuple[tuple[Holding, ...], CriView]:
        """What the kubelet and the container runtime say from now on, asked side by side. Raises AgentError."""
        try:
            async with asyncio.TaskGroup() as both:
                holdings = both.create_task(self._pod_resources.fresh())
                view = both.create_task(self._cri.fresh())
        except* AgentError as errors:
            raise errors.exceptions[0] from None
        return holdings.result(), view.result()

    # ---- the comparison

    async def run(self) -> None:
        """Compare every two seconds until cancelled."""
        while True:
            try:
                await self.compare()
            except (AgentError, OSError) as error:  # a full disk, say: seats go on, the next comparison tries again
                log.error("a comparison was not finished: %s", error)
            await asyncio.sleep(COMPARE_S)

    async def compare(self) -> None:
        """One comparison of leases, CRI and PodResources. CRI being away changes nothing but `cri_error`."""
        asked_s = self._now()
        try:
            view = await self._cri.fresh()
        except AgentError as error:
            self._heard(error.message)
            return
        self._heard("")
        await self._release_dead(view, asked_s)
        await self._roster.clear_spool({s.pod.uid for s in view.sandboxes if s.ready})
        for seen in self._seen(view):
            account = None
            if seen.resource is not None:
                account = await self._account_of(seen.resource.to, seen.sandbox.pod)
            await self._roster.settled(seen.ids)
            try:
                async with self._lock:
                    await self._judge(seen, account)
                self._unbound.pop(seen.slot, None)
            except (AgentError, OSError) as error:
                self._could_not(seen, error)
        await self._forget_unseen(view)

    def _heard(self, error: str) -> None:
        if not self.cri_since_s or bool(error) != bool(self.cri_error):
            self.cri_since_s = self._now()
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
                found.append(Seen(name, ids, self.resources.get(resource), destination, container, sandbox, shared))
        return found

    async def _judge(self, seen: Seen, account: str | None) -> None:
        """Bind the slot to the pod whose running container mounted it, or say why not. Under the lock."""
        name, sandbox = seen.slot, seen.sandbox
        if not seen.ids:
            return await self._stale(seen, "nothing is known of it")
        if seen.resource is None:
            return None  # its rule is gone, or its devices have not been read yet
        holder = self._roster.holder(name)
        mine = holder is not None and holder.pod == sandbox.pod
        try:
            await self._admit(name, seen.resource, seen.ids, sandbox, account, note=holder is None or mine)
        except AgentError:
            return None
        if mine and holder is not None:
            holder.kind = self._kind(sandbox)  # not known when it was rebound
        if not await self._is_ours(seen) or (seen.shared and not mine):
            return await self._stale(
                seen, "it was made before its slot" if not seen.shared else "another pod has it too"
            )
        self._remember(seen)
        if not mine:
            await self._bind(name, seen.resource, seen.ids, sandbox, seen.container.name, running=True)
        return None

    def _remember(self, seen: Seen) -> None:
        self._judged[f"{seen.container.id}/{seen.slot}"] = None
        while len(self._judged) > MAX_REMEMBERED:
            del self._judged[next(iter(self._judged))]

    async def _is_ours(self, seen: Seen) -> bool:
        """Whether the container has mounted the directory that stands at the slot's path now."""
        kind = self._kind(seen.sandbox)
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
        restart = self.config.devices.stale_slot == "restart"
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

    async def _release_dead(self, view: CriView, asked_s: float) -> None:
        """End what belongs to pods that have no ready sandbox any more, and directories that belong to nobody.

        One at a time, so that an Allocate never waits for a node that is being drained. A pod that was seen after the
        question was asked may be missing in the answer and yet live.
        """
        alive = {s.pod.uid for s in view.sandboxes if s.ready}
        for lease in self._leases.leases:
            if lease.pod is not None and lease.pod.uid not in alive:
                async with self._lock:
                    if lease in self._leases.leases and self._seen_s.get(lease.slot, 0.0) < asked_s:
                        await self._release(lease)
        async with self._lock:
            for seat in tuple(self._roster.seats.values()):
                if seat.pod.uid not in alive and seat.since_s < asked_s:
                    self._roster.end(seat.name)
            mounts = _mounted_sources(view)
            for name in self._slots.names() - {x.slot for x in self._leases.leases}:
                if str(self._slots.path(name)) not in mounts and self._roster.holder(name) is None:
                    self._slots.discard(self._slots.set_aside(name))

    async def _release(self, lease: Lease) -> None:
        holder = self._roster.holder(lease.slot)
        await self._leases.release(lease.slot)
        self._seen_s.pop(lease.slot, None)
        self.refusals.pop(lease.slot, None)
        if holder is None or holder.pod == lease.pod:
            self._roster.vacate(lease.slot)
            self._slots.discard(self._slots.set_aside(lease.slot))
        log.info("released %s of %s: its sandbox is gone", lease.device_id, lease.resource)
        self._on_release()

    async def _forget_unseen(self, view: CriView) -> None:
        """Forget allocations whose pod failed before anybody saw it. Never while the kubelet lists nothing: it may be blind."""
        old = [x for x in self._leases.leases if x.pod is None and self._now() - x.created_s > UNSEEN_S]
        if not old:
            return
        try:
            holdings = await self._pod_resources.list()
        except AgentError:
            return
        held = {(h.resource, i) for h in holdings for i in h.ids}
        mounts = _mounted_sources(view)
        async with self._lock:
            for lease in old:
                unlisted = bool(holdings) and (lease.resource, lease.device_id) not in held
                if unlisted and lease in self._leases.leases and str(self._slots.path(lease.slot)) not in mounts:
                    await self._release(lease)

    # ---- what both paths share; under the lock

    async def _admit(
        self, name: str, resource: Resource, ids: tuple[str, ...], sandbox: Sandbox, account: str | None,
        *, note: bool = True,
    ) -> None:  # fmt: skip
        """Raise AgentError unless the pod may have the slot. A refused pod is noted as its holder, with no container;
        not so (`note`) one that still ends while the slot is another pod's already: the lease is that pod's."""
        self._seen_s[name] = self._now()
        offers = [resource.offers[i] for i in ids if i in resource.offers]
        try:
            admit(resource.to, offers, sandbox, self._kind(sandbox), account)
        except AgentError as error:
            known = self.refusals.get(name)
            if note and (known is None or (known.pod, known.reason) != (sandbox.pod, error.reason)):
                self.refusals[name] = Refusal(
                    name, resource.name, sandbox.pod, error.reason, error.message, self._now()
                )
                self._metrics.denied.labels(error.reason.value).inc()
                log.warning("refused: %s", error)
                self._report.pod_event(sandbox.pod, error.reason, str(error))
                if self._roster.holder(name) is None:  # a seat that was bound under an earlier `to:` stays so
                    await self._leases.adopt(resource.name, ids, name, self._now())
                    await self._leases.bind(name, sandbox.pod, "", sandbox.id)
            raise

    async def _account_of(self, to: Audience, pod: PodRef) -> str | None:
        return await self._account(pod) if needs_account(to) else None

    async def _bind(
        self, name: str, resource: Resource, ids: tuple[str, ...], sandbox: Sandbox, container: str, *, running: bool
    ) -> None:
        """Give the slot to the pod of `sandbox`. Unless its container runs already, it gets a fresh directory."""
        for _, slot in self._roster.others(ids, sandbox.pod):
            self._roster.vacate(slot)
        if self._roster.holder(name) is None:
            if not running:
                self._slots.discard(self._slots.set_aside(name))
            await self._leases.adopt(resource.name, ids, name, self._now())
        self._seen_s[name] = self._now()
        await self._leases.bind(name, sandbox.pod, container, sandbox.id)
        self.refusals.pop(name, None)
        await self._occupy(name, resource, ids, sandbox, container)

    async def _occupy(
        self, name: str, resource: Resource, ids: tuple[str, ...], sandbox: Sandbox, container: str
    ) -> None:
        directory = self._slots.ensure(name)
        before = self._slots.read(name)
        document = slot_rules.document(name, resource, ids, "bound", before.made_ns if before else self._now_ns())
        services = {*document.services, *(before.services if before else ())}
        kind = self._kind(sandbox)
        await self._roster.occupy(name, resource.name, ids, directory, container, sandbox.pod, kind, services)
        self._slots.write(document)

    async def rebind(self) -> None:
        """After a start of the daemon: serve every slot that was bound before. Adds; never drops."""
        for slot in sorted({x.slot for x in self._leases.leases if x.pod is not None}):
            leases = [x for x in self._leases.leases if x.slot == slot]
            pod, resource = leases[0].pod, self.resources.get(leases[0].resource)
            document = self._slots.read(slot)
            if pod is None or resource is None or document is None or not leases[0].container:
                continue  # nobody, not known yet, rebooted since, or refused
            sandbox = Sandbox(id=leases[0].sandbox_id, pod=pod, ready=True)
            try:
                async with self._lock:
                    await self._occupy(slot, resource, tuple(x.device_id for x in leases), sandbox, leases[0].container)
            except (AgentError, OSError) as error:
                log.error("the seat of pod %s cannot be rebound now: %s", pod, error)

    def _kind(self, sandbox: Sandbox) -> SandboxKind:
        return kind_of(sandbox.handler, self.config.cri.handlers)

    def _now_ns(self) -> int:
        return int(self._now() * 1e9)

    def measure(self) -> None:
        """Set the gauges of refused pods."""
        for resource in self.resources:
            since = [r.since_s for r in self.refusals.values() if r.resource == resource]
            self._metrics.refused_holding.labels(resource).set(self._now() - min(since) if since else 0)

    def held(self, device_id: str) -> bool:
        """Whether somebody holds the device, so that it stays listed while it is unplugged."""
        return any(x.device_id == device_id for x in self._leases.leases)

    def held_of(self, resource: str) -> tuple[str, ...]:
        """The ids that are held under a resource."""
        return tuple(x.device_id for x in self._leases.leases if x.resource == resource)

    def offers(self, resource: str, ids: tuple[str, ...]) -> list[Offer]:
        """What is offered right now of `ids`."""
        found = self.resources.get(resource)
        return [found.offers[i] for i in ids if i in found.offers] if found else []


def _holding(holdings: tuple[Holding, ...], resource: str, ids: tuple[str, ...]) -> Holding | None:
    """Who holds `ids`: the container with exactly these, else one that has them among others (init containers reuse)."""
    wanted = set(ids)
    among = [h for h in holdings if h.resource == resource and wanted <= set(h.ids)]
    return next((h for h in among if set(h.ids) == wanted), among[0] if among else None)


def _mounted_sources(view: CriView) -> set[str]:
    """Every path of the host that a running container has mounted."""
    return {source for c in view.containers for source in c.mounts.values()}


def _newest_ready(view: CriView, namespace: str, name: str) -> Sandbox | None:
    ready = [s for s in view.sandboxes if s.ready and s.pod.namespace == namespace and s.pod.name == name]
    return max(ready, key=lambda s: s.created_ns, default=None)
