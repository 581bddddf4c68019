"""One device-plugin server (v1beta1): what the kubelet asks about one resource, on a Unix socket of its own.

The kubelet sets no deadline on Allocate and admits pods one after the other, so a plugin that hangs stalls its whole node
(k8s#117435): the deadlines here are ours. Allocate names no pod; what it answers is cached by the kubelet for the life of
the container, while PreStartContainer is called again at every restart of it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import secrets
from collections.abc import Awaitable, Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import NoReturn, Protocol, Self, TypeVar

import grpc
import grpc.aio
import msgspec

from nodeagent import rpc
from nodeagent.errors import AgentError, Reason
from nodeagent.metrics import Metrics
from nodeagent.model import DeviceNode, Health, Resource
from nodeagent.wire.pb.deviceplugin.v1beta1 import api_pb2 as pb

T = TypeVar("T")

log = logging.getLogger(__name__)

SERVICE = "v1beta1.DevicePlugin"
ALLOCATE_TIMEOUT_S = 2.0
PRESTART_TIMEOUT_S = 25.0
"""Below the kubelet's 30 s (KubeletPreStartContainerRPCTimeoutInSecs), so that it hears our sentence, not its own."""
STOP_GRACE_S = 0.5
TOLD_S = 0.5
"""How long an Allocate waits until the kubelet was told that siblings of its devices are taken."""
MAX_CONCURRENT_REQUESTS = 512
"""Of one resource, open streams included; the kubelet hears RESOURCE_EXHAUSTED beyond it. A node runs at most some 250 pods."""
MAX_IDS = 1024
MAX_ID_LENGTH = 63
MAX_SUN_PATH = 107
"""sun_path holds 108 bytes with the closing zero (unix(7))."""
MAX_DETAILS = 1500
"""Bytes of a refusal: gRPC carries it percent-encoded in a header (8 KiB), and the kubelet puts it into the pod's status."""
NODE_PERMISSIONS = "rw"

CODES: dict[Reason, grpc.StatusCode] = {
    Reason.NAMESPACE_NOT_ALLOWED: grpc.StatusCode.PERMISSION_DENIED,
    Reason.LABELS_DO_NOT_MATCH: grpc.StatusCode.PERMISSION_DENIED,
    Reason.SERVICE_ACCOUNT_NOT_ALLOWED: grpc.StatusCode.PERMISSION_DENIED,
    Reason.SANDBOX_NOT_ALLOWED: grpc.StatusCode.PERMISSION_DENIED,
    Reason.NOT_YOURS: grpc.StatusCode.PERMISSION_DENIED,
    Reason.IDENTITY_UNAVAILABLE: grpc.StatusCode.UNAVAILABLE,
    Reason.SERVICE_UNAVAILABLE: grpc.StatusCode.UNAVAILABLE,
    Reason.KUBELET_UNAVAILABLE: grpc.StatusCode.UNAVAILABLE,
    Reason.CRI_UNAVAILABLE: grpc.StatusCode.UNAVAILABLE,
    Reason.UPSTREAM_UNAVAILABLE: grpc.StatusCode.UNAVAILABLE,
    Reason.NOT_RUNNING: grpc.StatusCode.UNAVAILABLE,
    Reason.INIT_CONTAINER_ONLY: grpc.StatusCode.FAILED_PRECONDITION,
    Reason.DEVICE_UNPLUGGED: grpc.StatusCode.FAILED_PRECONDITION,
    Reason.LEASED_UNDER_OTHER_RESOURCE: grpc.StatusCode.FAILED_PRECONDITION,
    Reason.STALE_SLOT: grpc.StatusCode.FAILED_PRECONDITION,
    Reason.CONFIG_INVALID: grpc.StatusCode.FAILED_PRECONDITION,
    Reason.STATE_INVALID: grpc.StatusCode.FAILED_PRECONDITION,
    Reason.NO_RULE: grpc.StatusCode.NOT_FOUND,
    Reason.DEVICE_UNKNOWN: grpc.StatusCode.NOT_FOUND,
    Reason.DEADLINE: grpc.StatusCode.DEADLINE_EXCEEDED,
    Reason.TOO_SLOW: grpc.StatusCode.DEADLINE_EXCEEDED,
    Reason.MALFORMED: grpc.StatusCode.INVALID_ARGUMENT,
    Reason.TOO_LARGE: grpc.StatusCode.INVALID_ARGUMENT,
    Reason.TOO_MANY: grpc.StatusCode.RESOURCE_EXHAUSTED,
    Reason.NOT_SUPPORTED: grpc.StatusCode.UNIMPLEMENTED,
    Reason.INTERNAL: grpc.StatusCode.INTERNAL,
}
"""What a reason is called in gRPC. Every Reason has its line."""


class MountSpec(msgspec.Struct, frozen=True, kw_only=True):
    """A directory of the host for the container."""

    container_path: str
    host_path: str
    read_only: bool


class SlotAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """What a container that holds devices of one resource receives."""

    env: dict[str, str] = {}
    mounts: tuple[MountSpec, ...] = ()
    nodes: tuple[DeviceNode, ...] = ()
    annotations: dict[str, str] = {}
    cdi: tuple[str, ...] = ()
    """Qualified names of CDI devices (devices/cdi.py); kubelets before 1.28 do not pass them on."""


class Allocator(Protocol):
    """Who decides. `ids` are sorted and without repetition; AgentError refuses, its sentence reaches the pod's status."""

    async def allocate(self, resource: Resource, ids: tuple[str, ...]) -> SlotAnswer:
        """Called with present devices of `resource` only; cancelled after 2 s."""
        ...

    async def prestart(self, resource: Resource, ids: tuple[str, ...]) -> None:
        """Called before every start of a container, with ids the resource may not have any more; cancelled after 25 s."""
        ...


Context = grpc.aio.ServicerContext[object, object]


class PluginServer:
    """Serves one resource from `async with` to its end. `endpoint` is the socket's name, new with each server: the kubelet
    mixes up two lives of one socket (k8s#127803).

    Raises AgentError(CONFIG_INVALID) when `directory` is too long for a socket in it, KUBELET_UNAVAILABLE when it is not
    there. Calls of the kubelet never raise here: they end in a gRPC status.
    """

    def __init__(
        self,
        resource: Resource,
        allocator: Allocator,
        directory: Path,
        metrics: Metrics,
        *,
        allocate_timeout_s: float = ALLOCATE_TIMEOUT_S,
        prestart_timeout_s: float = PRESTART_TIMEOUT_S,
    ) -> None:
        self.endpoint = endpoint_name(directory, resource)
        self.socket = directory / self.endpoint
        self.watched = asyncio.Event()
        """Set while the kubelet has a ListAndWatch stream open."""
        self._allocator = allocator
        self._metrics = metrics
        self._allocate_timeout_s = allocate_timeout_s
        self._prestart_timeout_s = prestart_timeout_s
        self._unwatched_since_s = asyncio.get_running_loop().time()
        self._closing = False
        self._changed = asyncio.Event()
        self._sent: dict[object, pb.ListAndWatchResponse | None] = {}  # the last message of each open stream
        self._event_s: float | None = None
        self._resource = resource
        self._list = _device_list(resource)
        self._server: grpc.aio.Server | None = None

    @property
    def resource(self) -> Resource:
        return self._resource

    @property
    def unwatched_s(self) -> float:
        """For how long no ListAndWatch stream has been open; 0 while one is."""
        return 0.0 if self._sent else asyncio.get_running_loop().time() - self._unwatched_since_s

    def update(self, resource: Resource, event_s: float | None = None) -> None:
        """Push a new list to every open stream; several updates in quick succession become one message, an equal list none.

        `event_s` is when the kernel told of the change (loop clock); the time until the message is out is measured.
        """
        self._resource = resource
        fresh = _device_list(resource)
        if fresh == self._list:
            return
        self._list = fresh
        if self._event_s is None:
            self._event_s = event_s
        self._wake()

    async def told(self, timeout_s: float = TOLD_S) -> bool:
        """Whether every open stream has sent the newest list, waiting up to `timeout_s`. A kubelet that does not read is not
        waited for any longer: it learns of a held device from the refusal."""
        try:
            async with asyncio.timeout(timeout_s):
                while any(sent is not self._list for sent in self._sent.values()):
                    await self._changed.wait()
        except TimeoutError:
            return False
        return True

    async def __aenter__(self) -> Self:
        if not os.access(self.socket.parent, os.W_OK | os.X_OK):  # gRPC would complain on stderr in its own format
            raise self._cannot_listen()
        server = grpc.aio.server(options=rpc.OPTIONS, maximum_concurrent_rpcs=MAX_CONCURRENT_REQUESTS)
        server.add_generic_rpc_handlers(
            (
                rpc.service(
                    SERVICE,
                    {
                        "GetDevicePluginOptions": (pb.Empty, self._on_options),
                        "Allocate": (pb.AllocateRequest, self._on_allocate),
                        "PreStartContainer": (pb.PreStartContainerRequest, self._on_prestart),
                        "GetPreferredAllocation": (pb.PreferredAllocationRequest, self._on_preferred),
                    },
                    {"ListAndWatch": (pb.Empty, self._on_list_and_watch)},
                ),
            )
        )
        try:
            server.add_insecure_port(f"unix:{self.socket}")
            await server.start()
            self.socket.chmod(0o600)
        except (RuntimeError, OSError) as error:  # gRPC says RuntimeError when it cannot bind
            await server.stop(None)
            raise self._cannot_listen() from error
        self._server = server
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Ends streams at once, gives running requests half a second, and removes the socket."""
        self._closing = True
        self._wake()
        try:
            if self._server is not None:
                await self._server.stop(STOP_GRACE_S)
        finally:
            self._server = None
            with contextlib.suppress(OSError):
                self.socket.unlink()

    def _cannot_listen(self) -> AgentError:
        return AgentError(
            Reason.KUBELET_UNAVAILABLE,
            f"cannot listen on {self.socket} for {self._resource.name}",
            hint="is the kubelet's device-plugin directory there and writable?",
        )

    def _wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    # ---- the kubelet's calls

    async def _on_options(self, request: pb.Empty, context: Context) -> pb.DevicePluginOptions:
        return options()

    async def _on_list_and_watch(self, request: pb.Empty, context: Context) -> None:
        stream = object()
        self._sent[stream] = None
        self.watched.set()
        try:
            while not self._closing:
                changed, latest = self._changed, self._list
                if latest is self._sent[stream]:
                    await changed.wait()
                    continue
                event_s, self._event_s = self._event_s, None
                await context.write(latest)
                self._sent[stream] = latest
                self._wake()
                if event_s is not None:
                    self._metrics.hotplug_to_kubelet.observe(asyncio.get_running_loop().time() - event_s)
        finally:
            del self._sent[stream]
            self._wake()
            if not self._sent:
                self.watched.clear()
                self._unwatched_since_s = asyncio.get_running_loop().time()

    async def _on_allocate(self, request: pb.AllocateRequest, context: Context) -> pb.AllocateResponse:
        clock = asyncio.get_running_loop().time
        started_s = clock()
        result, failure = "cancelled", None
        answers: list[SlotAnswer] = []
        try:
            answers = await self._decide(self._allocate(request), self._allocate_timeout_s, "Allocate")
            result = "ok"
        except AgentError as error:
            result, failure = error.reason.value, error
        finally:
            self._metrics.allocations.labels(self._resource.name, result).inc()
            self._metrics.allocate_duration.observe(clock() - started_s)
        if failure is not None:
            log.warning("%s: Allocate refused: %s", self._resource.name, failure)
            await _abort(context, failure)
        return pb.AllocateResponse(container_responses=[_container_response(a) for a in answers])

    async def _on_prestart(
        self, request: pb.PreStartContainerRequest, context: Context
    ) -> pb.PreStartContainerResponse:
        try:
            ids = _checked_ids(request.devices_ids)
            work = self._allocator.prestart(self._resource, ids)
            await self._decide(work, self._prestart_timeout_s, "PreStartContainer")
        except AgentError as error:
            log.warning("%s: PreStartContainer refused: %s", self._resource.name, error)
            await _abort(context, error)
        return pb.PreStartContainerResponse()

    async def _on_preferred(
        self, request: pb.PreferredAllocationRequest, context: Context
    ) -> pb.PreferredAllocationResponse:
        """A hint; it never names a pod. A request that makes no sense gets an empty one, which the kubelet passes over."""
        resource = self._resource
        return pb.PreferredAllocationResponse(
            container_responses=[
                pb.ContainerPreferredAllocationResponse(
                    deviceIDs=preferred(
                        resource, one.available_deviceIDs, one.must_include_deviceIDs, one.allocation_size
                    )
                )
                for one in request.container_requests[:MAX_IDS]
            ]
        )

    async def _allocate(self, request: pb.AllocateRequest) -> list[SlotAnswer]:
        resource = self._resource
        return [
            await self._allocator.allocate(resource, _present_ids(resource, one.devices_ids))
            for one in request.container_requests
        ]

    async def _decide(self, work: Awaitable[T], timeout_s: float, method: str) -> T:
        """`work` within its deadline; whatever goes wrong becomes an AgentError."""
        try:
            async with asyncio.timeout(timeout_s):
                return await work
        except AgentError:
            raise
        except TimeoutError as error:
            raise AgentError(
                Reason.DEADLINE,
                f"{method} of {self._resource.name} was not decided within {timeout_s:g} s",
                hint="see the agent's log; the disk of state_dir or the container runtime may hang",
            ) from error
        except Exception as error:
            log.exception("%s: %s failed", self._resource.name, method)
            raise AgentError(
                Reason.INTERNAL,
                f"{method} of {self._resource.name} failed inside nodeagent ({type(error).__name__})",
                hint="the agent's log has the details",
            ) from error


def options() -> pb.DevicePluginOptions:
    """PreStartContainer is wanted: it is the first call after which PodResources names the pod."""
    return pb.DevicePluginOptions(pre_start_required=True, get_preferred_allocation_available=True)


def endpoint_name(directory: Path, resource: Resource) -> str:
    """`nodeagent-<leaf>-<8 hex digits>.sock`; the leaf is cut where the whole path would not fit into a socket's address."""
    end = f"-{secrets.token_hex(4)}.sock"
    room = MAX_SUN_PATH - len(os.fsencode(directory)) - len("/nodeagent-") - len(end)
    if room < 1:
        raise AgentError(
            Reason.CONFIG_INVALID,
            f"kubelet.device_plugin_dir: {directory} is too long, the path of a socket in it must fit into {MAX_SUN_PATH} bytes",
        )
    return f"nodeagent-{resource.leaf[:room]}{end}"


def _device_list(resource: Resource) -> pb.ListAndWatchResponse:
    return pb.ListAndWatchResponse(
        devices=[pb.Device(ID=i, health=resource.offers[i].health.value) for i in sorted(resource.offers)]
    )


def preferred(resource: Resource, available: Iterable[str], must: Iterable[str], size: int) -> list[str]:
    """`size` ids out of `available`, those of `must` first, then what is whole, what blocks no sibling, by id."""
    first = sorted(set(must))

    def rank(device_id: str) -> tuple[bool, int, str]:
        offer = resource.offers.get(device_id)
        return (offer is None or offer.health is not Health.HEALTHY, offer.siblings if offer else 0, device_id)

    rest = sorted(set(available) - set(first), key=rank)
    return (first + rest)[: max(0, size)]


def _checked_ids(untrusted_ids: Sequence[str]) -> tuple[str, ...]:
    if len(untrusted_ids) > MAX_IDS:
        raise AgentError(Reason.TOO_MANY, f"{len(untrusted_ids)} device ids in one request, at most {MAX_IDS}")
    ids = tuple(sorted(set(untrusted_ids)))
    if not ids or len(ids) != len(untrusted_ids):
        raise AgentError(Reason.MALFORMED, "a request must name device ids, each once")
    if any(not 0 < len(i) <= MAX_ID_LENGTH for i in ids):
        raise AgentError(Reason.MALFORMED, f"a device id has 1 to {MAX_ID_LENGTH} characters")
    return ids


def _present_ids(resource: Resource, untrusted_ids: Sequence[str]) -> tuple[str, ...]:
    ids = _checked_ids(untrusted_ids)
    for device_id in ids:
        offer = resource.offers.get(device_id)
        if offer is None:
            raise AgentError(
                Reason.DEVICE_UNKNOWN,
                f"{device_id} is no device of {resource.name}",
                hint="its rule may have changed; the kubelet has the new list already",
            )
        if not offer.device.present:
            raise AgentError(
                Reason.DEVICE_UNPLUGGED, f"{device_id} of {resource.name} is unplugged", hint="plug it in again"
            )
    return ids


def _container_response(answer: SlotAnswer) -> pb.ContainerAllocateResponse:
    return pb.ContainerAllocateResponse(
        envs=answer.env,
        mounts=[
            pb.Mount(container_path=m.container_path, host_path=m.host_path, read_only=m.read_only)
            for m in answer.mounts
        ],
        devices=[
            pb.DeviceSpec(container_path=n.path, host_path=n.path, permissions=NODE_PERMISSIONS) for n in answer.nodes
        ],
        annotations=answer.annotations,
        cdi_devices=[pb.CDIDevice(name=name) for name in answer.cdi],
    )


async def _abort(context: Context, error: AgentError) -> NoReturn:
    sentence = str(error).encode()[:MAX_DETAILS].decode(errors="ignore")
    await context.abort(CODES[error.reason], sentence)
    raise AssertionError("abort raises")
