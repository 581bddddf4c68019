"""The roster: every seat of the node, which slot belongs to which, and how seats begin and end.

A seat leaves the roster at once and is taken down beside it (worker, jobs, cgroup, uid), so that nobody waits for a dying
desktop; `settled` is for those who must.
"""

from __future__ import annotations

import asyncio
import logging
import re
import socket
import time
from collections.abc import Callable, Collection, Iterable
from pathlib import Path

from nodeagent.config import Config
from nodeagent.devices.leases import Leases
from nodeagent.devices.slots import SERVICE_SOCKETS, Slots
from nodeagent.errors import AgentError, Reason
from nodeagent.metrics import Metrics
from nodeagent.model import PodRef, SandboxKind, SeatState
from nodeagent.seats.cgroups import CgroupLimits, SeatCgroup, SeatCgroups
from nodeagent.seats.seat import Seat, SlotBinding, Surroundings
from nodeagent.services.printing.filters import SeatContext
from nodeagent.services.printing.spool import Spool
from nodeagent.transports.unix import listen

log = logging.getLogger(__name__)

CLEAN_UP_S = 3.0
"""The clean-up of an ended seat gets so long."""
_PLAIN = re.compile(r"[A-Za-z0-9-]{1,64}\Z")


class Roster:
    """Owns the seats. Methods without `async` take effect before they return."""

    def __init__(
        self, *, config: Config, leases: Leases, slots: Slots, cgroups: SeatCgroups, spool: Spool, around: Surroundings,
        metrics: Metrics, tasks: asyncio.TaskGroup, now: Callable[[], float] = time.time,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:  # fmt: skip
        self.config = config
        self.seats: dict[str, Seat] = {}
        self._leases, self._slots, self._cgroups, self._spool = leases, slots, cgroups, spool
        self._around, self._metrics, self._tasks, self._now = around, metrics, tasks, now
        self._clock = clock
        self._began: dict[str, float] = {}
        self._lives: dict[str, asyncio.Task[None]] = {}
        self._endings: dict[str, asyncio.Task[None]] = {}  # device id -> the ending of the seat that held it

    def began_at(self, name: str) -> float:
        """The monotonic time at which a seat was made here."""
        return self._began[name]

    def holder(self, slot: str) -> Seat | None:
        """The seat that the slot belongs to."""
        return next((s for s in self.seats.values() if slot in s.slots), None)

    def seated(self, slot: str, pod: PodRef) -> bool:
        """Whether the slot belongs to the seat of this pod."""
        holder = self.holder(slot)
        return holder is not None and holder.pod == pod

    def others(self, ids: Iterable[str], pod: PodRef) -> list[tuple[Seat, str]]:
        """Seats of other pods that hold one of `ids`, with the slot by which they do."""
        wanted = set(ids)
        return [
            (seat, name)
            for seat in self.seats.values()
            if seat.pod != pod
            for name, binding in seat.slots.items()
            if wanted & set(binding.ids)
        ]

    @property
    def device_ids(self) -> frozenset[str]:
        """Every device that a seat has now."""
        return frozenset(i for seat in self.seats.values() for i in seat.device_ids)

    def moved(self, slot: str, directory: Path | None) -> None:
        """The slot's directory was set aside; its seat goes on serving it there."""
        seat = self.holder(slot)
        if seat is not None and directory is not None:
            seat.slots[slot].directory = directory

    async def occupy(
        self, slot: str, resource: str, ids: tuple[str, ...], directory: Path, container: str, pod: PodRef,
        kind: SandboxKind, services: Collection[str],
    ) -> Seat:  # fmt: skip
        """Make the slot part of the seat of `pod`, with a socket for each service, and make that seat if it is new."""
        name = seat_name(pod)
        seat = self.seats.get(name) or await self._begin(name, pod, kind)
        bound = seat.slots.get(slot)
        if bound is not None and bound.directory == directory and bound.listeners.keys() == set(services):
            bound.container = container
            return seat
        if bound is not None:
            seat.leave(slot)
        listeners: dict[str, socket.socket] = {s: listen(directory, SERVICE_SOCKETS[s][0]) for s in sorted(services)}
        seat.join(
            SlotBinding(
                name=slot, resource=resource, ids=ids, directory=directory, container=container, listeners=listeners
            )
        )
        return seat

    def vacate(self, slot: str) -> None:
        """Take the slot from its seat and delete its directory; a seat without slots ends."""
        seat = self.holder(slot)
        if seat is None:
            return
        binding = seat.leave(slot)
        if binding is not None:
            self._discard(binding)
        if not seat.slots:
            self.end(seat.name, binding.ids if binding else ())

    def end(self, name: str, ids: tuple[str, ...] = ()) -> None:
        """The seat's pod is gone: off the roster now, taken down beside it. `settled(ids)` waits for that."""
        seat = self.seats.pop(name, None)
        if seat is None:
            return
        del self._began[name]
        ids = (*ids, *seat.device_ids)
        for binding in tuple(seat.slots.values()):
            seat.leave(binding.name)
            self._discard(binding)
        ending = self._tasks.create_task(self._take_down(seat, self._lives.pop(name)), name=f"end {seat.pod}")
        for device_id in ids:
            self._endings[device_id] = ending
        ending.add_done_callback(self._forget)

    async def settled(self, ids: Iterable[str]) -> None:
        """Wait until no ended seat still has its hands on `ids`; at most CLEAN_UP_S and what a kill takes."""
        endings = {self._endings[i] for i in ids if i in self._endings}
        if endings:
            await asyncio.wait(endings, timeout=CLEAN_UP_S + 1)

    async def wait_live(self, slot: str, timeout_s: float) -> bool:
        """Whether the slot's worker listens, waiting up to `timeout_s`. Clients that connect earlier wait in the backlog."""
        seat = self.holder(slot)
        if seat is None or not seat.services:
            return seat is not None
        try:
            async with asyncio.timeout(timeout_s):
                await seat.live.wait()
        except TimeoutError:
            log.warning("the worker of seat %s does not listen after %.0f s", seat.pod, timeout_s)
            return False
        return True

    def push(self) -> None:
        """Printers may have changed: tell every worker."""
        for seat in self.seats.values():
            seat.push()

    def context(self, name: str) -> SeatContext:
        """Whose programs a seat's are. Raises AgentError while there is no such seat."""
        seat = self.seats.get(name)
        if seat is None:
            raise AgentError(Reason.NOT_RUNNING, "the desktop's seat is not there")
        return SeatContext(seat.uid, seat.cgroup.procs)

    def close(self) -> None:
        """The daemon ends: close what is left of every seat; their tasks are over."""
        for seat in self.seats.values():
            seat.close()

    def jobs_changed(self, name: str) -> None:
        """The spool has news of a seat's jobs."""
        if name in self.seats:
            self.seats[name].push_jobs()

    async def clear_spool(self, alive: Collection[str]) -> None:
        """Delete jobs of seats that ended while no daemon was there: neither on the roster nor among the uids of `alive` pods."""
        for name in await self._spool.seats():
            if name not in self.seats and name not in alive:
                await self._spool.release(name)

    def measure(self) -> None:
        """Set the gauge of seats."""
        for state in SeatState:
            self._metrics.seats.labels(state.value).set(sum(s.state == state for s in self.seats.values()))

    async def _begin(self, name: str, pod: PodRef, kind: SandboxKind) -> Seat:
        config = self.config.seats
        uid = await self._leases.seat_uid(name, self._now())
        limits = CgroupLimits(
            memory_bytes=config.memory_limit_mib << 20, pids=config.pids_limit, cpu_cores=config.cpu_limit
        )
        cgroup: SeatCgroup = self._cgroups.create(name, limits)
        seat = Seat(name, pod, uid, kind, cgroup, self._around, self._now())
        self.seats[name] = seat
        self._began[name] = self._clock()
        self._lives[name] = self._tasks.create_task(seat.run(), name=f"seat {pod}")
        log.info("seat of pod %s begins (%s, uid %d)", pod, kind, uid)
        return seat

    async def _take_down(self, seat: Seat, life: asyncio.Task[None]) -> None:
        life.cancel()
        await asyncio.wait({life})
        try:
            async with asyncio.timeout(CLEAN_UP_S):
                await self._spool.release(seat.name)
        except TimeoutError:
            log.warning("the clean-up of seat %s was cut off after %.0f s", seat.pod, CLEAN_UP_S)
        except (AgentError, OSError) as error:
            log.error("the print jobs of seat %s are not cleared away: %s", seat.pod, error)
        try:  # a process that cannot be killed, a full disk: this seat's trouble, not that of the others
            await seat.cgroup.destroy()
            await self._leases.free_uid(seat.name, self._now())
        except (AgentError, OSError) as error:
            log.error("seat of pod %s is not cleared away, its uid stays taken: %s", seat.pod, error)
        else:
            log.info("seat of pod %s ended", seat.pod)

    def _forget(self, done: asyncio.Task[None]) -> None:
        self._endings = {i: t for i, t in self._endings.items() if t is not done}

    def _discard(self, binding: SlotBinding) -> None:
        if binding.directory == self._slots.path(binding.name):
            self._slots.discard(self._slots.set_aside(binding.name))
        else:
            self._slots.discard(binding.directory)


def seat_name(pod: PodRef) -> str:
    """The pod's uid: unique for ever and safe as a file name (Kubernetes makes UUIDs; static pods have hex digests)."""
    if not _PLAIN.match(pod.uid):
        raise AgentError(Reason.IDENTITY_UNAVAILABLE, f"pod {pod} has a uid that is none: {pod.uid!r}")
    return pod.uid
