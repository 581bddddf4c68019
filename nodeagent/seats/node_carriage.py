"""Device nodes follow a replug into containers that run.

A device that comes back has other numbers, and the numbers it had may be another device's next. So the nodes of a device that is
gone are taken from its containers, permission and all, and the new ones are given when it is back. What a container has
is written in its slot's document, so that a restarted daemon goes on where its predecessor was. What was changed is asked for
again every half minute: `systemctl daemon-reload` and `runc update` put a container's permissions back as they were at its start.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from typing import Protocol

import msgspec

from nodeagent.devices import slots as slot_rules
from nodeagent.devices.cri import CriView
from nodeagent.devices.slots import SlotDocument, Slots
from nodeagent.errors import AgentError, Reason
from nodeagent.host import HostRoot
from nodeagent.metrics import Metrics
from nodeagent.model import Container, DeviceNode, Offer, PodRef
from nodeagent.sandboxes import nodes
from nodeagent.seats.refusals import Reporter
from nodeagent.seats.roster import Roster

log = logging.getLogger(__name__)


AGAIN_S = 30.0
MAX_TAKEN = 32


class Carrier(Protocol):
    """Changes the nodes of one running container. Blocks; raises AgentError or OSError, and is asked again then."""

    def __call__(self, container: Container, gone: Sequence[DeviceNode], come: Sequence[DeviceNode], /) -> None: ...


def carry(host: HostRoot, container: Container, gone: Sequence[DeviceNode], come: Sequence[DeviceNode]) -> None:
    """The carrier of runc containers. Blocks; raises AgentError. One that has ended meanwhile needs nothing."""
    try:
        if gone:
            nodes.revoke(host, container, gone)
        if come:
            nodes.grant(host, container, come)
    except AgentError as error:
        if error.reason is not Reason.NOT_RUNNING:
            raise


class NodeCarriage:
    """`follow` makes the nodes of every bound container what they should be."""

    def __init__(
        self, *, roster: Roster, slots: Slots, offers: Callable[[str, tuple[str, ...]], list[Offer]], carry: Carrier,
        report: Reporter, metrics: Metrics, clock: Callable[[], float] = time.monotonic,
    ) -> None:  # fmt: skip
        self._roster, self._slots, self._offers, self._carry = roster, slots, offers, carry
        self._report, self._metrics, self._clock = report, metrics, clock
        self._told: dict[str, str] = {}  # slot -> the failure that was said
        self._again_at = 0.0

    async def follow(self, view: CriView) -> None:
        """Compare and mend. A failure is said once and tried again with the next comparison."""
        again = self._clock() >= self._again_at
        if again:
            self._again_at = self._clock() + AGAIN_S
        for seat in tuple(self._roster.seats.values()):
            for slot in tuple(seat.slots.values()) if seat.kind == "runc" else ():
                document = self._slots.read(slot.name)
                if document is None:
                    continue
                wanted = slot_rules.nodes_of(self._offers(slot.resource, slot.ids))
                changed = set(document.nodes) != set(wanted)
                if changed or (again and document.taken):
                    path = str(self._slots.path(slot.name))
                    containers = [c for c in view.containers if c.running and path in c.mounts.values()]
                    await self._change(seat.pod, document, wanted, containers, said=changed)

    async def _change(
        self, pod: PodRef, document: SlotDocument, wanted: tuple[DeviceNode, ...], containers: Sequence[Container],
        *, said: bool,
    ) -> None:  # fmt: skip
        """Take what is gone, and what was gone before; give what is wanted, unless it was there from the start."""
        gone = tuple(n for n in (*document.taken, *document.nodes) if n not in wanted)[-MAX_TAKEN:]
        come = [n for n in wanted if n not in document.nodes or document.taken]
        try:
            for container in containers:
                await asyncio.to_thread(self._carry, container, gone, come)
        except (AgentError, OSError) as error:
            if self._told.get(document.slot) != str(error):
                self._told[document.slot] = str(error)
                log.error("the device nodes of pod %s did not follow: %s", pod, error)
                reason = error.reason if isinstance(error, AgentError) else Reason.INTERNAL
                self._report.pod_event(
                    pod, reason, f"its device was plugged in anew and could not be brought in: {error}"
                )
            self._metrics.node_changes.labels("failed").inc()
            return
        self._told.pop(document.slot, None)
        if said:
            self._slots.write(msgspec.structs.replace(document, nodes=wanted, taken=gone))
            self._metrics.node_changes.labels("ok").inc()
            log.info("pod %s: %d device nodes taken, %d given", pod, len(gone), len(come))
