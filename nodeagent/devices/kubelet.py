"""Keeping every resource registered with the kubelet, whatever happens to it, to its sockets or to ours.

The kubelet never calls back by itself. It forgets a resource when it is restarted (its socket is then a new inode, and it has
deleted every other socket beside it) and when our ListAndWatch stream ends; only a new Register helps. One life of a resource
is: serve on a new socket, dial it ourselves, Register, see the stream and the devices arrive, watch until it is lost.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
import socket
import stat
import time
from collections.abc import Callable, Iterable, Mapping
from enum import StrEnum
from pathlib import Path
from random import SystemRandom

import grpc
import grpc.aio
import msgspec

from nodeagent import rpc
from nodeagent.devices.peer import words_of
from nodeagent.devices.plugin import Allocator, PluginServer, options
from nodeagent.devices.podresources import PodResources
from nodeagent.errors import AgentError, Reason
from nodeagent.metrics import Metrics
from nodeagent.model import Resource
from nodeagent.wire.pb.deviceplugin.v1beta1 import api_pb2 as pb

log = logging.getLogger(__name__)

VERSION = "v1beta1"
KUBELET_SOCKET = "kubelet.sock"
DIAL_TIMEOUT_S = 2.0
VERIFY_PAUSES_S = (0.0, 0.05, 0.1, 0.2, 0.4, 0.8, 1.6)
OURS = re.compile(r"nodeagent-[a-z0-9.-]+-[0-9a-f]{8}\.sock\Z")


class Pace(msgspec.Struct, frozen=True, kw_only=True):
    """How long things may take, in seconds."""

    look: float = 0.5
    """Between two looks at the directory, a few stat calls each: a restart of the kubelet is noticed within this."""
    register: float = 10.0
    """For the kubelet to answer Register, inside which it dials us and asks for our options."""
    stream: float = 5.0
    """From the kubelet's answer to its ListAndWatch; it opens the stream right after."""
    unwatched: float = 3.0
    """Without a stream for so long under the same kubelet, a resource counts as lost."""
    race: float = 1.2
    """Between closing a server and registering the same resource with the same kubelet. A kubelet that sees the old stream
    end after the new registration disconnects the new one (k8s#127803, fixed by #135437); it needs about a second."""
    back_off: tuple[float, ...] = (0.5, 1.0, 2.0, 4.0, 8.0, 15.0)
    """After the first failure, the second, ...; the last one for all that follow. Each times 0.5 to 1.5."""


class RegistrationState(StrEnum):
    WAITING = "waiting"
    """There is no kubelet.sock."""
    REGISTERING = "registering"
    REGISTERED = "registered"
    """The kubelet answered Register, reads our list, and shows its devices as allocatable (where it can be asked)."""
    FAILING = "failing"
    """The last attempt failed; another follows."""


class Registration(msgspec.Struct, frozen=True):
    """Where one resource stands; `detail` is a sentence for people, empty when all is well."""

    resource: str
    state: RegistrationState
    detail: str = ""
    since_s: float = 0.0
    """When it entered `state`, Unix seconds."""


DEFAULT_PACE = Pace()
JITTER = SystemRandom().random


class KubeletId(msgspec.Struct, frozen=True):
    """Which life of the kubelet it is: device, inode and ctime of its socket (a tmpfs reuses inode numbers)."""

    device: int
    inode: int
    changed_ns: int


class _Keeper:
    """One resource that is to be registered."""

    def __init__(self, resource: Resource, predecessor: asyncio.Task[None] | None) -> None:
        self.resource = resource
        self.predecessor = predecessor
        """The same resource was given up a moment ago; its server may still be closing."""
        self.state = RegistrationState.WAITING
        self.detail = ""
        self.since_s = 0.0
        self.server: PluginServer | None = None
        self.task: asyncio.Task[None] | None = None


class Registrar:
    """Keeps resources registered while `run()` lives. `set_resources` may be called at any time, also before.

    Nothing the kubelet does ends `run()`: a kubelet that is away, hangs or talks nonsense is tried again with back-off, at
    once when its socket is made anew. `pod_resources` None skips the check that the devices arrived.
    """

    def __init__(
        self,
        directory: Path,
        allocator: Allocator,
        pod_resources: PodResources | None,
        metrics: Metrics,
        *,
        pace: Pace = DEFAULT_PACE,
        jitter: Callable[[], float] = JITTER,
    ) -> None:
        self.registered = asyncio.Event()
        """Set while every wanted resource is registered; never before the first `set_resources`."""
        self._directory = directory
        self._allocator = allocator
        self._pod_resources = pod_resources
        self._metrics = metrics
        self._pace = pace
        self._jitter = jitter
        self._wanted: dict[str, Resource] | None = None
        self._rewanted = asyncio.Event()
        self._keepers: dict[str, _Keeper] = {}
        self._leaving: dict[str, asyncio.Task[None]] = {}
        self._closed: dict[str, tuple[float, KubeletId]] = {}  # resource -> when we left which kubelet
        self._not_before_s = float("-inf")

    def set_resources(self, resources: Mapping[str, Resource], event_s: float | None = None) -> None:
        """What is offered from now on. Changed lists reach the kubelet at once; new names are registered, others end.

        `event_s` is when the kernel told of the change (loop clock), for the metric hotplug_to_kubelet.
        """
        self._wanted = dict(resources)
        for name, keeper in self._keepers.items():
            if name in resources:
                keeper.resource = resources[name]
                if keeper.server is not None:
                    keeper.server.update(resources[name], event_s)
        self._rewanted.set()
        self._summarize()

    async def told(self, resources: Iterable[str]) -> None:
        """Wait, for half a second at most, until the kubelet was sent the newest lists of these resources."""
        servers = [k.server for n in resources if (k := self._keepers.get(n)) is not None and k.server is not None]
        await asyncio.gather(*(server.told() for server in servers))

    def state(self, resource: str) -> RegistrationState:
        """Where a wanted resource stands; WAITING for one that is not known yet."""
        keeper = self._keepers.get(resource)
        return keeper.state if keeper else RegistrationState.WAITING

    @property
    def registrations(self) -> tuple[Registration, ...]:
        """Every wanted resource, by name."""
        return tuple(Registration(n, k.state, k.detail, k.since_s) for n, k in sorted(self._keepers.items()))

    async def run(self) -> None:
        """Until cancelled; then every server is closed and every socket of ours is gone, within a second."""
        if self._sweep():
            self._not_before_s = _now() + self._pace.race
        try:
            async with asyncio.TaskGroup() as group:
                while True:
                    self._reconcile(group)
                    self._rewanted.clear()
                    await self._rewanted.wait()
        finally:
            self._keepers.clear()
            self.registered.clear()

    def _reconcile(self, group: asyncio.TaskGroup) -> None:
        wanted = self._wanted or {}
        self._leaving = {name: task for name, task in self._leaving.items() if not task.done()}
        for name in self._keepers.keys() - wanted.keys():
            keeper = self._keepers.pop(name)
            if keeper.task is not None:
                keeper.task.cancel()
                self._leaving[name] = keeper.task
        for name in wanted.keys() - self._keepers.keys():
            keeper = self._keepers[name] = _Keeper(wanted[name], self._leaving.pop(name, None))
            keeper.task = group.create_task(self._keep(keeper), name=f"register {name}")
        self._summarize()

    def _enter(self, keeper: _Keeper, state: RegistrationState, detail: str = "") -> None:
        if (state, detail) != (keeper.state, keeper.detail):
            level = logging.WARNING if state is RegistrationState.FAILING else logging.INFO
            log.log(level, "%s: %s%s", keeper.resource.name, state, f": {detail}" if detail else "")
        if state is not keeper.state:
            keeper.since_s = time.time()
        keeper.state, keeper.detail = state, detail
        self._summarize()

    def _summarize(self) -> None:
        wanted = self._wanted
        if wanted is not None and all(self.state(n) is RegistrationState.REGISTERED for n in wanted):
            self.registered.set()
        else:
            self.registered.clear()

    # ---- one resource

    async def _keep(self, keeper: _Keeper) -> None:
        if keeper.predecessor is not None:
            await asyncio.wait({keeper.predecessor})
        failures = 0
        while True:
            kubelet = await self._kubelet(keeper)
            try:
                await self._life(keeper)
                failures = 0
            except AgentError as error:
                self._enter(keeper, RegistrationState.FAILING, str(error))
                await self._back_off(failures, kubelet)
                failures += 1

    async def _life(self, keeper: _Keeper) -> None:
        """One life: returns when the registration is lost, raises AgentError when it could not be made."""
        self._enter(keeper, RegistrationState.REGISTERING)
        name = keeper.resource.name
        kubelet: KubeletId | None = None
        await self._race_over(name)
        try:
            async with PluginServer(keeper.resource, self._allocator, self._directory, self._metrics) as server:
                keeper.server = server
                await _dial(server)
                kubelet = _look(self._directory)
                if kubelet is None:
                    return  # it has gone this moment
                await self._register(server)
                if await self._verify(server, kubelet):
                    self._enter(keeper, RegistrationState.REGISTERED)
                lost = await self._until_lost(server, kubelet)
        finally:
            keeper.server = None
            if kubelet is not None:
                self._closed[name] = (_now(), kubelet)
        log.info("%s: %s; registering again", name, lost)

    async def _kubelet(self, keeper: _Keeper) -> KubeletId:
        """Wait for a kubelet."""
        while (found := _look(self._directory)) is None:
            self._enter(keeper, RegistrationState.WAITING, f"there is no kubelet at {self._directory / KUBELET_SOCKET}")
            await asyncio.sleep(self._pace.look)
        return found

    async def _race_over(self, resource: str) -> None:
        """Wait until the kubelet has forgotten our last server; one with a new socket never knew it."""
        await asyncio.sleep(self._not_before_s - _now())
        closed_s, known = self._closed.pop(resource, (float("-inf"), None))
        while _look(self._directory) == known:
            left_s = closed_s + self._pace.race - _now()
            if left_s <= 0:
                return
            await asyncio.sleep(min(left_s, self._pace.look))

    async def _register(self, server: PluginServer) -> None:
        request = pb.RegisterRequest(
            version=VERSION, endpoint=server.endpoint, resource_name=server.resource.name, options=options()
        )
        async with rpc.channel(self._directory / KUBELET_SOCKET) as channel:
            try:
                await rpc.unary(channel, "/v1beta1.Registration/Register", pb.Empty)(
                    request, timeout=self._pace.register
                )
            except grpc.aio.AioRpcError as error:
                raise AgentError(
                    Reason.KUBELET_UNAVAILABLE,
                    f"the kubelet did not register {server.resource.name}: {words_of(error)}",
                    hint="is the kubelet running and answering?",
                ) from error
        self._metrics.registrations.labels(server.resource.name).inc()

    async def _verify(self, server: PluginServer, kubelet: KubeletId) -> bool:
        """See the kubelet open its stream and, where it answers, list our present devices as allocatable (KEP-2403).

        False when it was restarted meanwhile: the new one knows nothing of us.
        """
        asked_s = _now()
        while not server.watched.is_set():
            if _look(self._directory) not in (None, kubelet):
                return False
            if _now() - asked_s > self._pace.stream:
                raise AgentError(
                    Reason.KUBELET_UNAVAILABLE,
                    f"the kubelet registered {server.resource.name} but does not read its devices",
                )
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._pace.look):
                    await server.watched.wait()
        if self._pod_resources is None:
            return True
        missing: frozenset[str] = frozenset()
        for pause_s in VERIFY_PAUSES_S:
            await asyncio.sleep(pause_s)
            try:
                shown = (await self._pod_resources.allocatable()).get(server.resource.name, frozenset())
            except AgentError as error:
                log.debug("%s: not verified: %s", server.resource.name, error)
                return True
            missing = frozenset(i for i, o in server.resource.offers.items() if o.device.present) - shown
            if not missing:
                return True
            if _look(self._directory) not in (None, kubelet):
                return False
        raise AgentError(
            Reason.KUBELET_UNAVAILABLE,
            f"the kubelet registered {server.resource.name} but does not show {len(missing)} of its devices as allocatable",
            hint="is another device plugin registered under the same name?",
        )

    async def _until_lost(self, server: PluginServer, kubelet: KubeletId) -> str:
        """Watch a registration; returns why it has to be made again.

        Without any kubelet.sock there is nobody to register with, so an open stream is kept: the kubelet may still use it.
        """
        while True:
            now = _look(self._directory)
            if now is not None and now != kubelet:
                return "the kubelet has a new socket"
            if now is not None and not _is_socket(server.socket):
                return "our socket was removed"
            if server.unwatched_s > (self._pace.unwatched if now is not None else 0):
                return "the kubelet closed its stream"
            await asyncio.sleep(self._pace.look)

    async def _back_off(self, failures: int, kubelet: KubeletId) -> None:
        """Half to one and a half times the step; cut short when the kubelet has a new socket."""
        pause_s = self._pace.back_off[min(failures, len(self._pace.back_off) - 1)] * (0.5 + self._jitter())
        until_s = _now() + pause_s
        while (left_s := until_s - _now()) > 0:
            await asyncio.sleep(min(left_s, self._pace.look))
            if _look(self._directory) not in (None, kubelet):
                return

    def _sweep(self) -> bool:
        """Remove sockets of a predecessor that was killed; True when there were any, so that its streams only just ended."""
        found = False
        with contextlib.suppress(OSError):
            for path in self._directory.iterdir():
                if OURS.match(path.name) and _is_socket(path) and not _answers(path):
                    path.unlink(missing_ok=True)
                    found = True
        return found


def _now() -> float:
    return asyncio.get_running_loop().time()


def _is_socket(path: Path) -> bool:
    try:
        return stat.S_ISSOCK(path.stat().st_mode)
    except OSError:
        return False


def _look(directory: Path) -> KubeletId | None:
    """The kubelet that is there now; None without a socket of that name."""
    try:
        found = (directory / KUBELET_SOCKET).stat()
    except OSError:
        return None
    return KubeletId(found.st_dev, found.st_ino, found.st_ctime_ns) if stat.S_ISSOCK(found.st_mode) else None


async def _dial(server: PluginServer) -> None:
    """Ask our own server what the kubelet will ask first; raises AgentError when it does not answer."""
    async with rpc.channel(server.socket) as channel:
        call = rpc.unary(channel, "/v1beta1.DevicePlugin/GetDevicePluginOptions", pb.DevicePluginOptions)
        try:
            await call(pb.Empty(), timeout=DIAL_TIMEOUT_S)
        except grpc.aio.AioRpcError as error:
            raise AgentError(
                Reason.INTERNAL,
                f"our own server for {server.resource.name} does not answer on {server.socket}: {error.code().name.lower()}",
                hint="was the kubelet's device-plugin directory wiped this moment?",
            ) from error


def _answers(path: Path) -> bool:
    """Whether some process still listens on a socket (connect(2): ECONNREFUSED when none does)."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as probe:
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            return False
        except OSError:
            return True
    return True
