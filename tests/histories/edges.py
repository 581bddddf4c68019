"""The edges of the daemon, faked: runtime, kubelet's sockets, zygote and workers, cgroups, spool, bus, clean-up hook.

Each answers from the world after a delay that is drawn from the seed. What it says is true at some moment between the question
and the answer, as with the real ones.
"""

from __future__ import annotations

import asyncio
import os
import random
import re
import signal
import socket
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import grpc

from nodeagent.devices.cri import CriView
from nodeagent.devices.inventory import Inventory
from nodeagent.devices.plugin import PluginServer
from nodeagent.devices.podresources import Holding
from nodeagent.errors import AgentError, Reason
from nodeagent.host import HostRoot
from nodeagent.metrics import Metrics
from nodeagent.model import CleanUp, Container, DeviceNode, PodRef, Resource, Sandbox, UsbDevice
from nodeagent.seats.zygote import Exit
from nodeagent.transports.unix import recv, send
from nodeagent.wire import seat as wire
from nodeagent.wire.pb.deviceplugin.v1beta1 import api_pb2 as pb
from tests.histories.model import Book
from tests.histories.world import World

DELAYS_S = (0.0, 0.0, 0.001, 0.005, 0.03, 0.2)
HOOK_S = (0.0, 0.05, 0.5, 2.0, 5.0)
"""The last one is longer than a clean-up may take."""
OTHER = Holding("kube-system", "other", "other", "example.com/other", ("0",))
"""A device that is not ours: a kubelet that lists anything at all is not blind."""
MOUNTINFO = re.compile(r"/proc/([0-9]+)/mountinfo")


class Pauses:
    """Delays from a seed."""

    def __init__(self, chance: random.Random) -> None:
        self.chance = chance

    async def __call__(self, delays_s: Sequence[float] = DELAYS_S) -> None:
        await asyncio.sleep(self.chance.choice(delays_s))


class FakeCri:
    """The container runtime."""

    def __init__(self, world: World, pause: Pauses) -> None:
        self._world, self._pause = world, pause

    async def fresh(self) -> CriView:
        await self._pause()
        world = self._world
        if world.cri_away:
            raise AgentError(Reason.CRI_UNAVAILABLE, "the fake container runtime is away")
        view = CriView(
            tuple(
                Sandbox(
                    id=s.id, pod=s.pod, ready=s.ready, labels=dict(s.labels), handler=s.handler, created_ns=s.created_ns
                )
                for s in world.sandboxes
            ),
            tuple(
                Container(
                    id=c.id, sandbox_id=c.sandbox_id, name=c.name, running=True, created_ns=c.created_ns,
                    mounts=dict(c.mounts), pid=c.pid,
                )
                for c in world.containers
            ),
        )  # fmt: skip
        await self._pause()
        return view

    async def stop_container(self, container_id: str, timeout_s: int) -> None:
        await self._pause()
        self._world.containers = [c for c in self._world.containers if c.id != container_id]


class FakePodResources:
    """The kubelet's PodResources socket: app containers of the pods in its book."""

    def __init__(self, world: World, pause: Pauses) -> None:
        self._world, self._pause = world, pause

    async def list(self) -> tuple[Holding, ...]:
        await self._pause()
        world = self._world
        if not world.kubelet_up:
            raise AgentError(Reason.KUBELET_UNAVAILABLE, "the fake kubelet is away")
        found = [OTHER] if world.lists_pods else []
        for (uid, container, resource), allocation in world.allocations.items():
            pod = world.pods.get(uid)
            if world.lists_pods and pod is not None and container != pod.init:
                found.append(Holding("default", pod.name, container, resource, allocation.ids))
        await self._pause()
        return tuple(sorted(found))

    async def fresh(self) -> tuple[Holding, ...]:
        return await self.list()


class FakeHost(HostRoot):
    """/proc and the cgroups of the containers, as the kernel would show them at the moment they are looked at."""

    def __init__(self, world: World) -> None:
        super().__init__(world.directory / "host")
        self._world = world

    def path(self, absolute: str | Path) -> Path:
        text = str(absolute)
        if found := MOUNTINFO.fullmatch(text):
            self._write(int(found[1]))
        elif text == "/sys/fs/cgroup":
            self._make_cgroups()
        return super().path(absolute)

    def _write(self, pid: int) -> None:
        there = self._world.directories()
        lines = []
        for container in self._world.containers:
            if container.pid == pid:
                for inside, inode in container.inodes.items():
                    root = (
                        f"/slots/{there[inode]}"
                        if inode in there
                        else f"/slots/{Path(container.mounts[inside]).name}//deleted"
                    )
                    lines.append(f"9 8 0:24 {root} {inside} ro - tmpfs tmpfs rw\n")
        path = self.root / f"proc/{pid}/mountinfo"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(lines))

    def _make_cgroups(self) -> None:
        root = self.root / "sys/fs/cgroup/kubepods"
        root.mkdir(parents=True, exist_ok=True)
        wanted = {f"pod{s.pod.uid}" for s in self._world.sandboxes if s.ready} | {f"pod{'0' * 32}"}
        for path in root.iterdir():
            if path.name not in wanted:
                path.rmdir()
        for name in wanted:
            (root / name).mkdir(exist_ok=True)


class FakeBus(Inventory):
    """The real inventory over the world's ports."""

    def __init__(self, world: World, *rest: Any) -> None:
        super().__init__(*rest, open_hotplug=lambda _: None)
        self._world = world

    def _read(self, known: Mapping[str, UsbDevice], touched: object = None) -> tuple[UsbDevice, ...]:
        return tuple(sorted(self._world.plugged.values(), key=lambda usb: usb.port))


# ---- the kubelet's end of the plugin protocol


class Aborted(Exception):
    """The plugin answered with an error."""

    def __init__(self, code: grpc.StatusCode, details: str) -> None:
        super().__init__(f"{code.name}: {details}")


class FakeContext:
    """One call. `write` is the kubelet reading a message of ListAndWatch."""

    def __init__(self, write: Callable[[pb.ListAndWatchResponse], Any] | None = None) -> None:
        self._write = write

    async def write(self, message: pb.ListAndWatchResponse) -> None:
        assert self._write is not None
        await self._write(message)

    async def abort(self, code: grpc.StatusCode, details: str) -> NoReturn:
        raise Aborted(code, details)


class FakeRegistrar:
    """Serves every resource with the real plugin server, without gRPC, and is the kubelet that reads its lists.

    Registered means: the stream is open and the first list has been read.
    """

    def __init__(
        self, world: World, allocator: Any, metrics: Metrics, pause: Pauses, tasks: asyncio.TaskGroup,
        on_list: Callable[[str, bool], None],
    ) -> None:  # fmt: skip
        self.servers: dict[str, PluginServer] = {}
        self._world, self._allocator, self._metrics, self._pause = world, allocator, metrics, pause
        self._tasks, self._on_list = tasks, on_list
        self._wanted: dict[str, Resource] = {}
        self._streams: dict[str, asyncio.Task[None]] = {}
        self._running = False

    def set_resources(self, resources: Mapping[str, Resource], event_s: float | None = None) -> None:
        self._wanted = dict(resources)
        for name, server in self.servers.items():
            if name in resources:
                server.update(resources[name], event_s)
        if self._running:
            self._reconcile()

    async def told(self, resources: Iterable[str]) -> None:
        await asyncio.gather(*(self.servers[name].told() for name in resources if name in self.servers))

    def start(self) -> None:
        self._running = True
        self._reconcile()

    def kubelet_restarted(self) -> None:
        """Streams have ended; each resource is served and registered anew."""
        for name in tuple(self.servers):
            self._close(name)
        self._reconcile()

    def _reconcile(self) -> None:
        for name in self.servers.keys() - self._wanted.keys():
            self._close(name)
        for name in sorted(self._wanted.keys() - self._streams.keys()):
            self._streams[name] = self._tasks.create_task(self._serve(name))

    def _close(self, name: str) -> None:
        self.servers.pop(name, None)
        self._world.lists.pop(name, None)
        if (stream := self._streams.pop(name, None)) is not None:
            stream.cancel()

    async def _serve(self, name: str) -> None:
        await self._pause((0.01, 0.2, 1.3))
        while not self._world.kubelet_up:
            await asyncio.sleep(0.5)
        if name not in self._wanted:
            self._streams.pop(name, None)
            return
        server = PluginServer(self._wanted[name], self._allocator, Path("/nowhere"), self._metrics)
        self.servers[name] = server

        async def write(message: pb.ListAndWatchResponse) -> None:
            await self._pause()
            if self.servers.get(name) is server:
                first = name not in self._world.lists
                self._world.lists[name] = {d.ID: d.health == "Healthy" for d in message.devices}
                self._on_list(name, first)

        await server._on_list_and_watch(pb.Empty(), FakeContext(write))  # type: ignore[arg-type]


# ---- below the seats


class FakeClaims:
    """The host's udev, which is nobody's concern here."""

    def set(self, offers: object, devices: object) -> None:
        """Nothing is claimed."""


class FakeWorker:
    """A worker that listens to nobody: it says Ready and Pong, and ends when its channel does."""

    def __init__(self, control: socket.socket, pid: int) -> None:
        self.pid = pid
        self._control = control
        self._loop = asyncio.get_running_loop()
        self._exit: asyncio.Future[Exit] = self._loop.create_future()
        control.setblocking(False)
        self._loop.add_reader(control, self._on_message)

    def _on_message(self) -> None:
        try:
            data, fds = recv(self._control, wire.MAX_MESSAGE, wire.MAX_FDS)
        except BlockingIOError:
            return
        except (EOFError, OSError):
            self._end(0)
            return
        for fd in fds:
            os.close(fd)
        match wire.take_to_worker(data):
            case wire.Serve(service=service):
                self._say(wire.Ready(service=service))
            case wire.Ping():
                self._say(wire.Pong())
            case wire.Stop():
                self._end(0)

    def _say(self, message: wire.Message) -> None:
        try:
            send(self._control, wire.put_message(message))
        except OSError:
            self._end(1)

    def _end(self, code: int) -> None:
        if self._control.fileno() >= 0:
            self._loop.remove_reader(self._control)
            self._control.close()
        if not self._exit.done():
            self._exit.set_result(Exit(code))

    def kill(self, number: int = signal.SIGKILL) -> None:
        self._loop.call_later(0.001, self._end, -number)

    async def wait(self) -> Exit:
        return await asyncio.shield(self._exit)


class FakeZygote:
    def __init__(self, pause: Pauses) -> None:
        self.workers: list[FakeWorker] = []
        self._pause = pause

    async def spawn_worker(self, *, control: socket.socket, **_: Any) -> FakeWorker:
        own = control.dup()
        try:
            await self._pause()
        except BaseException:
            own.close()
            raise
        self.workers.append(FakeWorker(own, 1000 + len(self.workers)))
        return self.workers[-1]


class FakeCgroup:
    procs: tuple[Path, ...] = ()

    def __init__(self, pause: Pauses) -> None:
        self._pause = pause

    def oom_kills(self) -> int:
        return 0

    async def destroy(self) -> None:
        await self._pause()


class FakeCgroups:
    def __init__(self, pause: Pauses) -> None:
        self._pause = pause

    def create(self, name: str, limits: object) -> FakeCgroup:
        return FakeCgroup(self._pause)


class FakeSpool:
    """A spool without jobs."""

    def __init__(self, pause: Pauses) -> None:
        self._pause = pause

    async def seats(self) -> frozenset[str]:
        await self._pause()
        return frozenset()

    async def release(self, seat: str) -> None:
        await self._pause((0.0, 0.01, 0.5))

    def set_printers(self, seat: str, printers: object) -> None:
        pass

    def jobs(self, seat: str) -> tuple[wire.Job, ...]:
        return ()

    def forget_incoming(self, seat: str) -> None:
        pass


class FakeEvents:
    """Where Events about pods go: into the story."""

    def __init__(self, world: World) -> None:
        self._world = world

    def pod_event(self, pod: PodRef, reason: Reason | str, message: str, *, warning: bool = True) -> None:
        self._world.tell(f"event: {pod.name}: {reason}")


class FakeHook:
    """Cleans a device up: quick, slow, failing or hanging."""

    def __init__(self, world: World, book: Book, pause: Pauses) -> None:
        self._world, self._book, self._pause = world, book, pause

    async def __call__(self, due: CleanUp) -> str:
        self._world.tell(f"clean-up of {due.device_id} generation {due.generation} begins")
        self._book.on_clean_up(due)
        try:
            await self._pause(HOOK_S)
            if self._pause.chance.random() < 0.1:
                raise OSError("the fake device refuses")
            return "cleaned"
        finally:  # not run by a kill -9: then it is repeated
            self._book.on_cleaned(due)
            self._world.tell(f"clean-up of {due.device_id} generation {due.generation} ends")


class FakeCarrier:
    """Changes the device nodes of a container."""

    def __init__(self, world: World) -> None:
        self._world = world

    def __call__(self, container: Container, gone: Sequence[DeviceNode], come: Sequence[DeviceNode]) -> None:
        for record in self._world.containers:
            if record.id == container.id:
                record.nodes = (record.nodes - set(gone)) | set(come)
