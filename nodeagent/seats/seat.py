"""One seat: the devices of one pod, served by one unprivileged worker for as long as the pod lives.

The seat owns the listening sockets of its slots, so a crash of the worker never removes a socket: a client that connects
while the worker is being made anew waits in the backlog. What the worker asks for is checked here and done by the spool.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import os
import signal
import socket
from collections.abc import Callable
from pathlib import Path

import msgspec

from nodeagent.config import Config
from nodeagent.errors import AgentError, Reason
from nodeagent.metrics import Metrics
from nodeagent.model import Offer, PodRef, SandboxKind, SeatState
from nodeagent.seats.cgroups import SeatCgroup
from nodeagent.seats.zygote import Child, Zygote
from nodeagent.services.printing.printers import for_desktop, for_spool
from nodeagent.services.printing.spool import Spool
from nodeagent.transports.unix import Channel
from nodeagent.wire import seat as wire
from nodeagent.wire.zygote import Limits

log = logging.getLogger(__name__)

RESTART_DELAYS_S = (0.0, 0.5, 1.0, 2.0, 5.0, 10.0)
"""Before the nth restart of a worker that keeps dying; a minute of life starts the row again."""
STEADY_S = 60.0
MESSAGES_PER_S = 500
"""What a worker may say: an honest one needs three messages a job. Beyond it the daemon reads more slowly."""
STOP_S = 1.0
PING_S = 10.0
HUNG_S = 40.0
"""A worker that has said nothing for so long, asked every PING_S, is replaced. A slow disk may hold one up for a while."""
MAX_FILES = 1024
"""Descriptors of a worker: listeners, connections, spool files."""


class SlotBinding(msgspec.Struct, kw_only=True):
    """A slot of this seat: its directory as it was when bound, and the listening sockets in it by service."""

    name: str
    resource: str
    ids: tuple[str, ...]
    directory: Path
    container: str
    listeners: dict[str, socket.socket]


class Surroundings(msgspec.Struct, kw_only=True):
    """What a seat needs from the house."""

    zygote: Zygote
    spool: Spool
    metrics: Metrics
    config: Config
    printing: Callable[[Seat], list[Offer]]
    """The printers of a seat right now."""


class Seat:
    """Life: `Requested` (no worker yet) -> `Bound` (worker started) -> `Live` (it listens) -> `Closed`; `Broken` between a
    worker's death and its successor."""

    def __init__(
        self,
        name: str,
        pod: PodRef,
        uid: int,
        kind: SandboxKind,
        cgroup: SeatCgroup,
        around: Surroundings,
        since_s: float,
    ) -> None:
        self.name = name
        self.pod = pod
        self.uid = uid
        self.kind = kind
        self.cgroup = cgroup
        self.since_s = since_s
        self.state = SeatState.REQUESTED
        self.slots: dict[str, SlotBinding] = {}
        self.restarts = 0
        self.denied: dict[Reason, int] = {}
        self.moved_bytes = (0, 0)
        """From the desktop and to it."""
        self.live = asyncio.Event()
        self._around = around
        self._worker: Child | None = None
        self._channel: Channel | None = None
        self._counters: dict[str, wire.Counters] = {}
        self._heard_s = 0.0

    @property
    def worker_pid(self) -> int:
        return self._worker.pid if self._worker else 0

    @property
    def services(self) -> tuple[str, ...]:
        return tuple(sorted({s for b in self.slots.values() for s in b.listeners}))

    @property
    def device_ids(self) -> tuple[str, ...]:
        return tuple(sorted({i for b in self.slots.values() for i in b.ids}))

    def join(self, binding: SlotBinding) -> None:
        """Add a slot; a running worker starts to serve its sockets at once."""
        self.slots[binding.name] = binding
        self.push()
        for service, listener in binding.listeners.items():
            self._serve(service, [listener])

    def leave(self, slot: str) -> SlotBinding | None:
        """Take a slot out. Its sockets are closed; the worker is made anew if other slots remain, since it holds duplicates."""
        binding = self.slots.pop(slot, None)
        if binding is None:
            return None
        for listener in binding.listeners.values():
            listener.close()
        if self.slots and self._worker is not None:
            self._worker.kill(signal.SIGKILL)
        return binding

    def push(self) -> None:
        """Tell the spool and the worker what is true now: printers and jobs of the seat."""
        offers = self._around.printing(self)[: wire.MAX_PRINTERS]
        self._around.spool.set_printers(self.name, tuple(for_spool(o) for o in offers))
        self._send(wire.Printers(printers=tuple(for_desktop(o) for o in offers)))
        self.push_jobs()

    def push_jobs(self) -> None:
        self._send(wire.Jobs(jobs=self._around.spool.jobs(self.name)))

    async def run(self) -> None:
        """Keep a worker alive until cancelled; then end it."""
        clock = asyncio.get_running_loop().time
        failures = 0
        try:
            while True:
                began = clock()
                reason = await self._run_once()
                self.live.clear()
                self.state = SeatState.BROKEN
                self.restarts += 1
                self._around.metrics.seat_worker_restarts.labels(reason).inc()
                failures = 0 if clock() - began > STEADY_S else failures + 1
                delay = RESTART_DELAYS_S[min(failures, len(RESTART_DELAYS_S)) - 1] if failures else 0.0
                log.warning("worker of seat %s died (%s); the next one starts in %.1f s", self.pod, reason, delay)
                await asyncio.sleep(delay)
        finally:
            self.close()

    def close(self) -> None:
        """Leave every slot; also for a seat whose `run` never began."""
        self.state = SeatState.CLOSED
        self.live.clear()
        for name in tuple(self.slots):
            self.leave(name)

    async def _run_once(self) -> str:
        """One life of the worker; returns why it ended."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.setblocking(False)
        oom_before = self.cgroup.oom_kills()
        try:
            with theirs:
                limits = Limits(files=MAX_FILES, file_bytes=self._around.config.printing.max_document_mib << 20)
                worker = await self._around.zygote.spawn_worker(
                    uid=self.uid, cgroup_procs=self.cgroup.procs, control=theirs, name=self.name, limits=limits
                )
        except (AgentError, OSError) as error:
            ours.close()
            log.error("no worker for seat %s: %s", self.pod, error)
            return "spawn"
        except BaseException:
            ours.close()
            raise
        self._worker, self._channel, self._counters = worker, Channel(ours), {}
        try:
            self.state = SeatState.BOUND
            listeners: dict[str, list[socket.socket]] = {}
            for binding in self.slots.values():
                for service, listener in binding.listeners.items():
                    listeners.setdefault(service, []).append(listener)
            self.push()  # first: who waits in the backlog must not find a seat without printers
            for service, sockets in listeners.items():
                self._serve(service, sockets)
            reason = await self._until_hung(self._channel)
        except asyncio.CancelledError:
            self._send(wire.Stop())
            with contextlib.suppress(TimeoutError):  # what has been received already still gets its answers
                async with asyncio.timeout(STOP_S):
                    await self._converse(self._channel)
            raise
        finally:
            channel, self._channel, self._worker = self._channel, None, None
            channel.close()
            await self._end(worker)
            self._around.spool.forget_incoming(self.name)
        return "oom" if self.cgroup.oom_kills() > oom_before else reason

    async def _until_hung(self, channel: Channel) -> str:
        """Converse with the worker for as long as it answers."""
        clock = asyncio.get_running_loop().time
        conversation = asyncio.create_task(self._converse(channel), name=f"worker of {self.pod}")
        self._heard_s = clock()
        try:
            while True:
                done, _ = await asyncio.wait({conversation}, timeout=PING_S)
                if done:
                    return conversation.result()
                if clock() - self._heard_s > HUNG_S:
                    return "hung"
                self._send(wire.Ping())
        finally:
            conversation.cancel()
            await asyncio.wait({conversation})

    async def _converse(self, channel: Channel) -> str:
        """Answer the worker until it is gone or breaks the rules."""
        clock = asyncio.get_running_loop().time
        window, said = clock(), 0
        while True:
            try:
                untrusted_data, untrusted_fds = await channel.receive()
            except (EOFError, ConnectionError):
                return "exit"
            except ValueError:
                return "protocol"
            self._heard_s = math.inf  # whatever its answer takes is our time
            for fd in untrusted_fds:
                os.close(fd)  # a worker has no descriptor that the daemon would take
            try:
                message = wire.take_from_worker(untrusted_data)
            except msgspec.DecodeError as error:
                log.warning("worker of seat %s broke the protocol: %s", self.pod, error)
                return "protocol"
            await self._on_message(message)
            self._heard_s = clock()
            said += 1
            if said >= MESSAGES_PER_S:
                await asyncio.sleep(max(0.0, window + 1.0 - clock()))
                window, said = clock(), 0

    async def _on_message(self, message: wire.FromWorker) -> None:
        spool = self._around.spool
        match message:
            case wire.Ready():
                self.state = SeatState.LIVE
                self.live.set()
            case wire.Counters():
                self._count(message)
            case wire.Pong():
                pass
            case wire.DropDocument():
                await spool.drop(self.name, message.job, message.reason)
            case _:
                await self._answer(message)

    async def _answer(self, message: wire.CreateJob | wire.OpenDocument | wire.CloseDocument | wire.CancelJob) -> None:
        spool = self._around.spool
        answer: wire.Message = wire.Done(request=message.request)
        fds: list[int] = []
        try:
            match message:
                case wire.CreateJob():
                    if message.printer not in {o.device.id for o in self._around.printing(self)}:
                        raise AgentError(Reason.NOT_YOURS, f"seat {self.pod} has no printer {message.printer}")
                    answer = wire.JobCreated(request=message.request, job=await spool.create(self.name, message))
                case wire.OpenDocument():
                    fds = [await spool.open_document(self.name, message.job)]
                    answer = wire.DocumentOpened(request=message.request)
                case wire.CloseDocument():
                    await spool.close_document(self.name, message)
                case wire.CancelJob():
                    await spool.cancel(self.name, message.job)
        except AgentError as error:
            answer = wire.Refused(request=message.request, reason=error.reason, message=error.message[:255])
        try:
            self._send(answer, fds)
        finally:
            for fd in fds:
                os.close(fd)

    def _serve(self, service: str, listeners: list[socket.socket]) -> None:
        config = self._around.config.seats
        self._send(
            wire.Serve(
                service=service,
                desktop=str(self.pod),
                max_document_bytes=self._around.config.printing.max_document_mib << 20,
                max_connections=config.connections,
                idle_s=config.idle_timeout,
            ),
            [s.fileno() for s in listeners],
        )

    def _send(self, message: wire.Message, fds: list[int] | None = None) -> None:
        if self._channel is not None:
            try:
                self._channel.send(wire.put_message(message), fds or [])
            except ConnectionError:
                pass  # the reader sees the end of the channel and says why

    def _count(self, told: wire.Counters) -> None:
        """Add what the worker counted since it last said so. One that counts backwards adds nothing until it is past its mark."""
        if told.service not in self.services:
            return
        before = self._counters.get(told.service) or wire.Counters(service=told.service)
        now = self._counters[told.service] = wire.Counters(
            service=told.service,
            bytes_in=max(told.bytes_in, before.bytes_in),
            bytes_out=max(told.bytes_out, before.bytes_out),
            denied=before.denied | {r: max(n, before.denied.get(r, 0)) for r, n in told.denied.items()},
        )
        metrics = self._around.metrics
        moved_in, moved_out = now.bytes_in - before.bytes_in, now.bytes_out - before.bytes_out
        self.moved_bytes = (self.moved_bytes[0] + moved_in, self.moved_bytes[1] + moved_out)
        metrics.seat_bytes.labels(now.service, "in").inc(moved_in)
        metrics.seat_bytes.labels(now.service, "out").inc(moved_out)
        for reason, total in now.denied.items():
            more = total - before.denied.get(reason, 0)
            self.denied[reason] = self.denied.get(reason, 0) + more
            metrics.denied.labels(reason.value).inc(more)

    async def _end(self, worker: Child) -> None:
        """See the worker gone: it ends on EOF of its channel, or it is killed."""
        try:
            async with asyncio.timeout(STOP_S):
                await worker.wait()
        except TimeoutError:
            worker.kill(signal.SIGKILL)
            await worker.wait()
