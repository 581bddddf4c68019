"""One life of the daemon's parts, put together as daemon.py does, in a process that ends by itself or is killed."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from nodeagent.devices.cdi import CdiFiles
from nodeagent.devices.identity import TwinMemory
from nodeagent.devices.leases import Leases
from nodeagent.devices.slots import Slots
from nodeagent.metrics import Metrics
from nodeagent.model import DeviceNode, PodRef
from nodeagent.offers import Offers
from nodeagent.seats.binding import Binding
from nodeagent.seats.clean_ups import CleanUps
from nodeagent.seats.comparison import Comparison
from nodeagent.seats.node_carriage import NodeCarriage
from nodeagent.seats.refusals import Refusals
from nodeagent.seats.roster import Roster
from nodeagent.seats.seat import Surroundings
from tests.histories import edges
from tests.histories.clockwork import Clockwork, Points
from tests.histories.kubelet import FakeKubelet
from tests.histories.model import Book, Place
from tests.histories.script import KINDS, LABELS, ON_RUNC, Script
from tests.histories.world import WALL_S, Pod, World

KEY = bytes(range(32))
DEBOUNCE_S = 0.1
SETTLE_S = 12.0
FORGET_S = 135.0
"""Longer than comparison.UNSEEN_S."""


class Stopped(Exception):
    """The daemon was asked to stop."""


@dataclass
class Progress:
    """What is handed from life to life."""

    world: World
    book: Book
    script: Script
    at: int = 0
    """The step that comes next."""
    lives: int = 0
    points: int = 0


class Story(logging.Handler):
    """What the daemon logs is part of the story."""

    def __init__(self, world: World) -> None:
        super().__init__(logging.INFO)
        self._world = world

    def emit(self, record: logging.LogRecord) -> None:
        self._world.tell(f"daemon: {record.getMessage()}")


class Life:
    """The parts, and the hands that carry out the script."""

    def __init__(self, progress: Progress, loop: Clockwork, points: Points, chance: random.Random) -> None:
        self.progress, self.world, self.book = progress, progress.world, progress.book
        self._loop, self._points = loop, points
        self._pause = edges.Pauses(chance)
        self._leases: Leases | None = None
        self._roster: Roster | None = None
        self._seen: tuple[object, object] = (None, None)
        self._stop = asyncio.Event()
        self._places: list[tuple[Place, Path]] = []

    # ---- the daemon

    async def run(self) -> None:
        """From the start of the daemon until it is asked to stop or the script is over."""
        world, directory = self.world, self.world.directory
        async with Leases(directory / "state/state.db", world.config.seats) as leases:
            self._leases = leases
            self._loop.after_step = self._observe
            slots = Slots(directory / "run")
            slots.prepare()
            try:
                async with asyncio.TaskGroup() as tasks, asyncio.TaskGroup() as hands:
                    await self._be_active(leases, slots, tasks, hands)
            except* Stopped:
                pass
            finally:
                if self._roster is not None:
                    self._roster.close()

    async def _be_active(
        self, leases: Leases, slots: Slots, tasks: asyncio.TaskGroup, hands: asyncio.TaskGroup
    ) -> None:
        world, pause, metrics = self.world, self._pause, Metrics()
        config, host, events = world.config, edges.FakeHost(world), edges.FakeEvents(world)
        cri, pod_resources = cast(Any, edges.FakeCri(world, pause)), cast(Any, edges.FakePodResources(world, pause))
        zygote, spool = edges.FakeZygote(pause), cast(Any, edges.FakeSpool(pause))
        around = Surroundings(
            zygote=cast(Any, zygote),
            spool=spool,
            metrics=metrics,
            config=config,
            printing=lambda seat: offers.printing(seat),
        )
        clock, now = self._loop.time, lambda: WALL_S + self._loop.time()
        roster = self._roster = Roster(
            config=config, leases=leases, slots=slots, cgroups=cast(Any, edges.FakeCgroups(pause)), spool=spool,
            around=around, metrics=metrics, tasks=tasks, now=now, clock=clock,
        )  # fmt: skip
        clean_ups = CleanUps(
            leases=leases, roster=roster, hook=edges.FakeHook(world, self.book, pause), metrics=metrics, tasks=tasks
        )
        binding = Binding(
            config=config, leases=leases, slots=slots, roster=roster, cri=cri, pod_resources=pod_resources,
            clean_ups=clean_ups, account=_no_account,
            refusals=Refusals(report=events, metrics=metrics, now=now, monotonic=clock), now=now, clock=clock,
        )  # fmt: skip
        carriage = NodeCarriage(
            roster=roster,
            slots=slots,
            offers=binding.offers,
            carry=edges.FakeCarrier(world),
            report=events,
            metrics=metrics,
        )
        bus = edges.FakeBus(world, host, config.devices, KEY, TwinMemory(world.directory / "state"))
        comparison = Comparison(
            binding=binding, host=host, leases=leases, slots=slots, roster=roster, cri=cri, pod_resources=pod_resources,
            clean_ups=clean_ups, carriage=carriage, report=events, metrics=metrics, on_release=bus.settle, now=now, clock=clock,
        )  # fmt: skip
        compare = comparison.compare

        async def compared() -> None:
            gone = frozenset(self.book.gone)
            await compare()
            self._observe()
            if not comparison.cri_error:
                self.book.on_compared(gone, frozenset(binding.resources), binding.lock.locked())

        cast(Any, comparison).compare = compared
        registrar = edges.FakeRegistrar(world, binding, metrics, pause, tasks, self._on_list)
        offers = Offers(
            config=config, inventory=bus, binding=binding, registrar=cast(Any, registrar), roster=roster, cups=cast(Any, None),
            cdi=CdiFiles(Path(config.devices.cdi_dir)), claims=cast(Any, edges.FakeClaims()),
            metrics=metrics, wake=comparison.wake,
        )  # fmt: skip
        binding.on_leases, binding.tell_leases = offers.on_leases, offers.tell_leases
        kubelet = FakeKubelet(world, self.book, registrar, pause, hands, self._nodes)
        async with bus:
            await bus.own(binding.held)
            offers.apply()
            bus.subscribe(offers.on_change)
            await binding.rebind()
            await binding.rebuild()
            tasks.create_task(comparison.run(), name="comparison")
            registrar.start()
            world.tell("daemon: active")
            kubelet.resume()
            hand = Hand(self.world, self.book, kubelet, registrar, bus, offers, zygote, pause, hands, self._points)
            hands.create_task(hand.end_sandboxes())
            await self._perform(hand, tasks)
            self.book.stopping = True
            raise Stopped

    async def _perform(self, hand: Hand, tasks: asyncio.TaskGroup) -> None:
        progress = self.progress
        while progress.at < len(progress.script):
            step = progress.script[progress.at]
            await asyncio.sleep(step.after_s)
            progress.at += 1
            self.world.tell(f"* {step}")
            if step.words[0] == "restart-daemon":
                return
            await hand.do(step.words)
        self._points.set(-1)
        await self._finish(hand)

    async def _finish(self, hand: Hand) -> None:
        """Everything is well again for a while, then everybody leaves: nothing may be left."""
        world, book = self.world, self.book
        self.world.tell("* finally: everything answers")
        await hand.do(("runtime", "back"))
        await hand.do(("api", "back"))
        await asyncio.sleep(SETTLE_S)
        self._check_reachable()
        self._check_listed()
        for pod in tuple(world.pods.values()):
            await hand.do(("delete", pod.name, "0"))
        await asyncio.sleep(SETTLE_S)
        for uid in sorted({s.pod.uid for s in world.sandboxes if s.ready}):
            world.end_sandbox(uid)
            book.on_sandbox_end(uid)
        await asyncio.sleep(SETTLE_S)
        assert self._leases is not None and self._roster is not None
        if self._roster.seats:
            world.violated(f"seats of nobody: {sorted(self._roster.seats)}")
        if self._leases.clean_ups:
            world.violated(f"clean-ups that never ran: {self._leases.clean_ups}")
        if self._leases.leases:
            await asyncio.sleep(FORGET_S)
        if left := [x.device_id for x in self._leases.leases]:
            world.violated(f"lost release: {', '.join(left)} is leased and nobody is there")
        await asyncio.sleep(1)
        for resource, devices in world.lists.items():
            if sick := [i for i, healthy in devices.items() if not healthy]:
                world.violated(f"{', '.join(sick)} of {resource} is nobody's and stays Unhealthy")
        for stay_of, stay in book.ended.items():
            if not stay.cleaned:
                world.violated(f"generation {stay_of[1]} of {stay_of[0]} ended and was never cleaned up")

    # ---- what is looked at

    def _observe(self) -> None:
        leases, roster = self._leases, self._roster
        if leases is None or self.book.stopping:
            return
        state = (leases.leases, leases.clean_ups)
        if state[0] is not self._seen[0] or state[1] is not self._seen[1]:
            self._seen = state
            self.book.on_state(*state)
        if roster is None:
            return
        places = [
            (Place(seat.pod.uid, slot.name, slot.resource, slot.ids), slot.directory)
            for seat in roster.seats.values()
            for slot in seat.slots.values()
        ]
        if places != self._places:
            self._places = places
            self.book.on_places(frozenset(p for p, _ in places), dict(places))

    def _on_list(self, resource: str, first: bool) -> None:
        """The kubelet has read a list."""
        if not first:
            return
        listed = self.world.lists[resource]
        for lease in self.book.leases.values():
            if lease.resource == resource and lease.device_id not in listed:
                self.world.violated(f"the first list of {resource} does not have {lease.device_id}, which is leased")

    def _check_listed(self) -> None:
        for lease in self.book.leases.values():
            listed = self.world.lists.get(lease.resource)
            if listed is not None and lease.device_id not in listed:
                self.world.violated(f"{lease.device_id} is leased and {lease.resource} does not list it")

    def _check_reachable(self) -> None:
        """What a container was let start with is the directory that its seat serves now."""
        assert self._roster is not None
        served = {s.name: (seat.pod.uid, s) for seat in self._roster.seats.values() for s in seat.slots.values()}
        for container in self.world.containers:
            sandbox = next(s for s in self.world.sandboxes if s.id == container.sandbox_id)
            for inside, path in container.mounts.items():
                uid, slot = served.get(Path(path).name, ("", None))
                if (
                    slot is None
                    or uid != sandbox.pod.uid
                    or not container.asked
                    or container.name not in slot.container
                ):
                    continue
                if not slot.directory.exists() or slot.directory.stat().st_ino != container.inodes[inside]:
                    self.world.violated(f"{sandbox.pod.name}/{container.name} has a dead directory at {inside}")

    def _nodes(self) -> dict[str, DeviceNode]:
        return {n.path: n for usb in self.world.plugged.values() for n in usb.nodes}


class Hand:
    """Carries out the steps of a script. A step that makes no sense now does nothing."""

    def __init__(
        self, world: World, book: Book, kubelet: FakeKubelet, registrar: edges.FakeRegistrar, bus: edges.FakeBus,
        offers: Offers, zygote: edges.FakeZygote, pause: edges.Pauses, tasks: asyncio.TaskGroup, points: Points,
    ) -> None:  # fmt: skip
        self._world, self._book, self._kubelet, self._registrar = world, book, kubelet, registrar
        self._bus, self._offers, self._zygote, self._pause, self._tasks = bus, offers, zygote, pause, tasks
        self._points = points

    async def do(self, words: tuple[str, ...]) -> None:
        match words:
            case ("wait",):
                pass
            case ("crash", ahead):
                self._points.set(int(ahead))
            case ("plug", unit, port):
                if unit not in self._world.plugged and not self._world.unit_at(port):
                    self._world.plug(unit, port)
                    self._look_soon()
            case ("unplug", unit):
                if self._world.plugged.pop(unit, None) is not None:
                    self._look_soon()
            case ("rules", rules):
                self._world.rules = rules
                config = self._world.config
                self._bus.reconfigure(config.devices)
                self._offers.on_config(config)
            case ("runtime", where):
                self._world.cri_away = where == "away"
            case ("api", where):
                self._world.api_away = where == "away"
                self._world.lists_pods = self._world.lists_pods or where == "back"
            case ("restart-kubelet",):
                self._world.lists_pods = not self._world.api_away
                self._registrar.kubelet_restarted()
            case ("worker-dies",):
                for worker in self._zygote.workers[-1:]:
                    worker.kill()
            case _:
                self._do_pod(words)

    def _do_pod(self, words: tuple[str, ...]) -> None:
        world = self._world
        match words:
            case ("pod", name, kind, handler):
                self._run(name, kind, handler)
            case ("delete", name, linger_s):
                self._delete(name, float(linger_s))
            case ("replace", old, new, linger_s):
                before = world.pod(old)
                if before is not None:
                    self._delete(old, float(linger_s))
                    kind = next(
                        k for k, wants in KINDS.items() if wants == before.wants and LABELS.get(k, {}) == before.labels
                    )
                    self._tasks.create_task(self._replace(new, kind, before.handler or "runc"))
            case ("restart-container", name):
                pod = world.pod(name)
                if pod is not None and pod.phase == "running":
                    self._tasks.create_task(self._restart(pod))
            case ("sandbox-fails", name):
                pod = world.pod(name)
                if pod is not None and pod.phase == "running":
                    world.end_sandbox(pod.uid)
                    self._book.broken.add(pod.uid)
                    pod.phase, pod.started = "starting", []
                    self._tasks.create_task(self._kubelet._start(pod))
            case _:
                raise ValueError(f"no such step: {' '.join(words)}")

    def _look_soon(self) -> None:
        self._tasks.create_task(self._look())

    async def _look(self) -> None:
        await asyncio.sleep(DEBOUNCE_S)
        await self._bus.rescan()

    def _run(self, name: str, kind: str, handler: str) -> None:
        if self._world.pod(name) is None:
            handler = "" if handler == "runc" or kind in ON_RUNC else handler
            wants = {c: dict(w) for c, w in KINDS[kind].items()}
            init = "prepare" if "prepare" in wants else ""
            self._kubelet.run(Pod(name, self._world.uid(name), handler, dict(LABELS.get(kind, {})), wants, init))

    async def _replace(self, name: str, kind: str, handler: str) -> None:
        await asyncio.sleep(0.1)
        self._run(name, kind, handler)

    async def _restart(self, pod: Pod) -> None:
        container = next(c for c in pod.in_order if c != pod.init)
        sandbox = self._world.sandbox(pod.uid)
        self._world.containers = [
            c for c in self._world.containers if sandbox is None or (c.sandbox_id, c.name) != (sandbox.id, container)
        ]
        pod.started.remove(container)
        pod.phase = "starting"
        await self._kubelet._start(pod)

    def _delete(self, name: str, linger_s: float) -> None:
        """The kubelet's book is clear at once; containers end then or with the sandbox, which stays for a while."""
        world = self._world
        pod = world.pod(name)
        if pod is None:
            return
        world.forget(pod.uid)
        if self._pause.chance.random() < 0.7:
            ids = {s.id for s in world.sandboxes if s.pod.uid == pod.uid}
            world.containers = [c for c in world.containers if c.sandbox_id not in ids]
        world.endings.append((world.now_s + linger_s, pod.uid))

    async def end_sandboxes(self) -> None:
        """The runtime takes down sandboxes of deleted pods when their time has come."""
        world = self._world
        while True:
            for at, uid in [e for e in world.endings if e[0] <= world.now_s]:
                world.endings.remove((at, uid))
                world.end_sandbox(uid)
                self._book.on_sandbox_end(uid)
            for sandbox in [s for s in world.sandboxes if not s.ready]:
                if self._pause.chance.random() < 0.1:
                    world.sandboxes.remove(sandbox)
            await asyncio.sleep(0.1)


async def _no_account(pod: PodRef) -> str | None:
    return None


def live(progress: Progress, seed: str, kill: Callable[[], None]) -> None:
    """One life, in this process. `kill` is called at the point where a crash was set; it must not return."""
    world, book = progress.world, progress.book
    progress.lives += 1
    book.begin_life()
    digest = hashlib.sha256(f"{seed} {progress.lives}".encode()).digest()
    chance = random.Random(digest)
    points = Points(kill)
    points.watch(str(world.directory))
    loop = Clockwork(world.now_s, points, chance)

    def on_time(now_s: float) -> None:
        world.now_s = now_s

    loop.on_time = on_time
    loop.set_exception_handler(
        lambda _, context: world.violated(f"unhandled: {context.get('exception') or context['message']!r}")
    )
    story = Story(world)
    logging.getLogger("nodeagent").addHandler(story)
    logging.getLogger("nodeagent").setLevel(logging.INFO)
    asyncio.set_event_loop(loop)
    life = Life(progress, loop, points, chance)
    try:
        loop.run_until_complete(life.run())
    except BaseExceptionGroup as group:
        world.violated(f"the daemon ended: {[repr(e) for e in _leaves(group)]}")
    except BaseException as error:
        world.violated(f"the daemon ended: {error!r}")
    progress.points += points.passed


def _leaves(group: BaseExceptionGroup[BaseException]) -> list[BaseException]:
    return [x for e in group.exceptions for x in (_leaves(e) if isinstance(e, BaseExceptionGroup) else [e])]
