"""Binding: who holds a slot. Allocate makes it and names no pod; PreStartContainer and the comparison bind it to one.

PreStartContainer is only the fast path, and the place to refuse early: a kubelet that lost its plugin starts containers without
it. What is true in any case is found by the comparison (comparison.py), which uses the same steps.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Mapping

import msgspec

from nodeagent.config import Config
from nodeagent.devices import slots as slot_rules
from nodeagent.devices.cri import Cri, CriView
from nodeagent.devices.exclusive import Key, physical
from nodeagent.devices.identity import DEVICE_ID
from nodeagent.devices.leases import Leases
from nodeagent.devices.plugin import SlotAnswer
from nodeagent.devices.podresources import Holding, PodResources
from nodeagent.devices.slots import Slots
from nodeagent.errors import AgentError, Reason
from nodeagent.model import Audience, Lease, Offer, PodRef, Resource, Sandbox, SandboxKind
from nodeagent.sandboxes import kind_of
from nodeagent.seats.admission import admit, needs_account
from nodeagent.seats.clean_ups import CleanUps
from nodeagent.seats.refusals import Refusals
from nodeagent.seats.roster import Roster

log = logging.getLogger(__name__)

LIVE_S = 5.0
"""How long a binding waits for its worker to listen; the kubelet gives PreStartContainer 30 s."""
REBUILD_S = 1.0
"""What the start waits for a kubelet to say who holds what; one that does not answer is compared with later."""


AccountLookup = Callable[[PodRef], Awaitable[str | None]]


class Binding:
    """The one writer of leases and seats. All changes to one slot happen under one lock.

    Methods that say so are called with `lock` held.
    """

    def __init__(
        self,
        *,
        config: Config,
        leases: Leases,
        slots: Slots,
        roster: Roster,
        cri: Cri,
        pod_resources: PodResources,
        clean_ups: CleanUps,
        account: AccountLookup,
        refusals: Refusals,
        now: Callable[[], float] = time.time,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.config = config
        self.lock = asyncio.Lock()
        self.resources: Mapping[str, Resource] = {}
        self.siblings: Mapping[Key, tuple[Key, ...]] = {}
        self.refusals = refusals
        self.on_leases: Callable[[], object] = lambda: None
        """Told when leases came or went."""
        self.tell_leases: Callable[[], Awaitable[None]] = _nobody
        """Told the same, and awaited before the kubelet has its answer."""
        self._leases, self._slots, self._roster, self._clean_ups = leases, slots, roster, clean_ups
        self._cri, self._pod_resources, self._account = cri, pod_resources, account
        self._now, self._clock = now, clock
        self._seen_at: dict[str, float] = {}  # slot -> monotonic time at which its pod was last seen to want it

    # ---- the kubelet's calls (devices.plugin.Allocator)

    async def allocate(self, resource: Resource, ids: tuple[str, ...]) -> SlotAnswer:
        """Lease `ids` and make their slot. Raises AgentError when another resource holds one of them, or a part of it.

        The directory is always a fresh one: whoever mounted the last one was a holder before this. The kubelet hears that
        siblings are taken before it has this answer.
        """
        name = slot_rules.slot_name(resource.name, ids)
        async with self.lock:
            self._check_siblings(resource, ids)
            await self._leases.allocate(resource.name, ids, name, self._now())
            aside = self._slots.set_aside(name)
            if self._roster.holder(name) is None:
                self._slots.discard(aside)
            else:
                self._roster.moved(name, aside)
            self.refusals.clear(name)
            path = self._slots.ensure(name)
            answer = slot_rules.answer(resource, ids, path)
            nodes = slot_rules.nodes_of(resource.offers[i] for i in ids)
            self._slots.write(slot_rules.document(name, resource, ids, "allocated", self._now_ns(), nodes))
        await self.tell_leases()
        return answer

    def _check_siblings(self, resource: Resource, ids: tuple[str, ...]) -> None:
        held = {(x.resource, x.device_id): x for x in self._leases.leases}
        for i in ids:
            for sibling in self.siblings.get((resource.name, i), ()):
                if (lease := held.get(sibling)) is not None and sibling[1] not in ids:
                    raise AgentError(
                        Reason.LEASED_UNDER_OTHER_RESOURCE,
                        f"{i} and {lease.device_id}, which is held as {lease.resource}"
                        + (f" by pod {lease.pod}" if lease.pod else "")
                        + ", are parts of one device that cannot be given apart",
                        hint="wait until that pod has ended",
                    )

    async def prestart(self, resource: Resource, ids: tuple[str, ...]) -> None:
        """Bind the slot to the pod that is about to start a container with `ids`, or raise AgentError to refuse it."""
        leased = self.generations(ids)
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
        account = await self.account_of(resource.to, sandbox.pod)
        async with self.lock:
            self.check_still(leased, ids, sandbox.pod)
            await self.admit(name, resource, ids, sandbox, account, attempt=True)
            self.vacate_others(ids, sandbox.pod)
        await self.settled(ids, sandbox.pod)
        async with self.lock:
            self.check_still(leased, ids, sandbox.pod)
            await self.bind(name, resource, ids, sandbox, holding.container, running=False)
        self.on_leases()
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

    # ---- the steps of both paths

    async def settled(self, ids: tuple[str, ...], pod: PodRef) -> None:
        """Wait until no earlier seat has its hands on `ids` and what it left behind is cleaned up; a few seconds at most.

        So too for the other parts of the same devices: a clean-up may reset a whole device.
        """
        devices = {physical(i) for i in ids}
        others = (x.device_id for x in self._leases.clean_ups if physical(x.device_id) in devices)
        related = {*ids, *others, *(k[1] for of, keys in self.siblings.items() if of[1] in ids for k in keys)}
        await self._roster.settled(related)
        await self._clean_ups.before(related, pod)

    async def admit(
        self, name: str, resource: Resource, ids: tuple[str, ...], sandbox: Sandbox, account: str | None,
        *, attempt: bool, note: bool = True,
    ) -> None:  # fmt: skip
        """Raise AgentError unless the pod may have the slot. A refused pod is noted as its holder, with no container;
        not so (`note`) one that still ends while the slot is another pod's already: the lease is that pod's. `attempt`:
        the kubelet asks, to start a container. Under the lock."""
        self._seen_at[name] = self._clock()
        offers = [resource.offers[i] for i in ids if i in resource.offers]
        try:
            admit(resource.to, offers, sandbox, self.kind(sandbox), account)
        except AgentError as error:
            rules = [o.rule for o in offers]
            news = note and self.refusals.note(name, resource.name, rules, sandbox.pod, error, attempt=attempt)
            if news and self._roster.holder(name) is None:  # a seat that was bound under an earlier `to:` stays so
                await self._leases.adopt(resource.name, ids, name, self._now())
                await self._leases.bind(name, sandbox.pod, "", sandbox.id)
            raise

    async def account_of(self, to: Audience, pod: PodRef) -> str | None:
        return await self._account(pod) if needs_account(to) else None

    def generations(self, ids: tuple[str, ...]) -> dict[str, int]:
        """The generations of the leases of `ids`, for `check_still`."""
        return {x.device_id: x.generation for x in self._leases.leases if x.device_id in ids}

    def check_still(self, leased: Mapping[str, int], ids: tuple[str, ...], pod: PodRef) -> None:
        """Raise AgentError when `ids` were allocated again since they had these generations: the kubelet gives devices of a pod
        that is deleted to the next one while the first may still be starting."""
        if self.generations(ids) != leased:
            raise AgentError(
                Reason.IDENTITY_UNAVAILABLE,
                f"the kubelet has allocated {', '.join(ids)} anew while pod {pod} was starting",
                hint="the kubelet tries again by itself, if the pod is still wanted",
            )

    def vacate_others(self, ids: tuple[str, ...], pod: PodRef) -> None:
        """Take slots with one of `ids` from the seats of other pods."""
        for _, slot in self._roster.others(ids, pod):
            self._roster.vacate(slot)

    async def bind(
        self, name: str, resource: Resource, ids: tuple[str, ...], sandbox: Sandbox, container: str, *, running: bool
    ) -> None:
        """Give the slot to the pod of `sandbox`. Unless its container runs already, it gets a fresh directory. Under the lock."""
        self.vacate_others(ids, sandbox.pod)
        if self._roster.holder(name) is None:
            before = self._slots.read(name)
            if not running:
                self._slots.discard(self._slots.set_aside(name))
                if before is not None:  # what its container was given by Allocate stays what it has
                    self._slots.ensure(name)
                    self._slots.write(msgspec.structs.replace(before, made_ns=self._now_ns()))
            await self._leases.adopt(resource.name, ids, name, self._now())
        self._seen_at[name] = self._clock()
        await self._leases.bind(name, sandbox.pod, container, sandbox.id)
        self.refusals.clear(name)
        await self._occupy(name, resource, ids, sandbox, container)

    async def _occupy(
        self, name: str, resource: Resource, ids: tuple[str, ...], sandbox: Sandbox, container: str
    ) -> None:
        directory = self._slots.ensure(name)
        before = self._slots.read(name)
        made_ns, nodes = (before.made_ns, before.nodes) if before else (self._now_ns(), ())
        document = slot_rules.document(name, resource, ids, "bound", made_ns, nodes)
        if before is not None:
            document = msgspec.structs.replace(document, taken=before.taken)
        services = {*document.services, *(before.services if before else ())}
        kind = self.kind(sandbox)
        await self._roster.occupy(name, resource.name, ids, directory, container, sandbox.pod, kind, services)
        self._slots.write(document)

    async def release(self, lease: Lease, why: str) -> None:
        """End the leases of a slot, and its seat where it is still that pod's. Under the lock."""
        holder = self._roster.holder(lease.slot)
        await self._leases.release(lease.slot)
        self._seen_at.pop(lease.slot, None)
        self.refusals.clear(lease.slot)
        if holder is None or holder.pod == lease.pod:
            self._roster.vacate(lease.slot)
            self._slots.discard(self._slots.set_aside(lease.slot))
        log.info("released %s of %s: %s", lease.device_id, lease.resource, why)
        self.on_leases()

    def seen_since(self, slot: str, asked_at: float) -> bool:
        """Whether a pod was seen to want the slot at or after a monotonic time: an older answer says nothing about it."""
        return self._seen_at.get(slot, float("-inf")) >= asked_at

    # ---- after a start of the daemon

    async def rebuild(self) -> None:
        """Before the first list: lease what the kubelet says is held and the database does not know (it was damaged, or this
        node had another state directory). Who holds it is found by the comparison."""
        try:
            async with asyncio.timeout(REBUILD_S):
                holdings = await self._pod_resources.list()
        except (AgentError, TimeoutError) as error:
            log.info("who holds what is not asked of the kubelet now: %s", error or "it does not answer")
            return
        for holding in holdings:
            known = {x.device_id for x in self._leases.leases}
            ids = tuple(i for i in holding.ids if i not in known)
            if holding.resource not in self.resources or not ids or not all(DEVICE_ID.fullmatch(i) for i in ids):
                continue
            slot = slot_rules.slot_name(holding.resource, holding.ids)
            async with self.lock:
                await self._leases.adopt(holding.resource, ids, slot, self._now())
            log.info("pod %s/%s holds %s: leased again", holding.namespace, holding.pod, ", ".join(ids))
        self.on_leases()

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
                async with self.lock:
                    await self._occupy(slot, resource, tuple(x.device_id for x in leases), sandbox, leases[0].container)
            except (AgentError, OSError) as error:
                log.error("the seat of pod %s cannot be rebound now: %s", pod, error)

    def describe(self) -> None:
        """Devices changed: what slots say of theirs (`slot.json`) is brought up to date."""
        for seat in self._roster.seats.values():
            for slot in seat.slots.values():
                resource, before = self.resources.get(slot.resource), self._slots.read(slot.name)
                if resource is None or before is None:
                    continue
                now = slot_rules.document(slot.name, resource, slot.ids, before.state, before.made_ns, before.nodes)
                if now.devices != before.devices:
                    self._slots.write(msgspec.structs.replace(before, devices=now.devices))

    # ---- who asks what is held

    def kind(self, sandbox: Sandbox) -> SandboxKind:
        return kind_of(sandbox, self.config.cri.handlers)

    def _now_ns(self) -> int:
        return int(self._now() * 1e9)

    def measure(self) -> None:
        """Set the gauges of refused pods."""
        self.refusals.measure(self.resources)

    @property
    def leases(self) -> tuple[Lease, ...]:
        return self._leases.leases

    def held(self, device_id: str) -> bool:
        """Whether somebody holds the device, so that it stays listed while it is unplugged."""
        return any(x.device_id == device_id for x in self._leases.leases)

    def offers(self, resource: str, ids: tuple[str, ...]) -> list[Offer]:
        """What is offered right now of `ids`."""
        found = self.resources.get(resource)
        return [found.offers[i] for i in ids if i in found.offers] if found else []


async def _nobody() -> None:
    """Nobody is told."""


def _holding(holdings: tuple[Holding, ...], resource: str, ids: tuple[str, ...]) -> Holding | None:
    """Who holds `ids`: the container with exactly these, else one that has them among others (init containers reuse)."""
    wanted = set(ids)
    among = [h for h in holdings if h.resource == resource and wanted <= set(h.ids)]
    return next((h for h in among if set(h.ids) == wanted), among[0] if among else None)


def _newest_ready(view: CriView, namespace: str, name: str) -> Sandbox | None:
    ready = [s for s in view.sandboxes if s.ready and s.pod.namespace == namespace and s.pod.name == name]
    return max(ready, key=lambda s: s.created_ns, default=None)
