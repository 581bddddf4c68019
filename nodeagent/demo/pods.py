"""Pods for the stand-in kubelet: what a cluster would have told a real one, as frozen values."""

from __future__ import annotations

import msgspec

from nodeagent.devices.plugin import MountSpec


class ContainerSpec(msgspec.Struct, frozen=True, kw_only=True):
    """`limits` asks for devices: resource name -> number. An `init` container ends before the next one starts, unless it is
    `restartable` (a sidecar): that one keeps its devices and lives as long as the pod."""

    name: str
    limits: dict[str, int] = {}
    init: bool = False
    restartable: bool = False
    args: tuple[str, ...] = ()
    env: dict[str, str] = {}


class PodSpec(msgspec.Struct, frozen=True, kw_only=True):
    """`handler` is the RuntimeClass's. A `static` pod is never scheduled: the kubelet takes it as it is."""

    namespace: str = "default"
    name: str
    uid: str
    labels: dict[str, str] = {}
    handler: str = ""
    containers: tuple[ContainerSpec, ...]
    static: bool = False

    @property
    def in_start_order(self) -> tuple[ContainerSpec, ...]:
        return (*(c for c in self.containers if c.init), *(c for c in self.containers if not c.init))

    def container(self, name: str) -> ContainerSpec:
        return next(c for c in self.containers if c.name == name)

    def request(self, resource: str) -> int:
        """What the scheduler counts: all that run side by side, or the largest init container beside the sidecars."""
        sidecars = sum(c.limits.get(resource, 0) for c in self.containers if c.restartable)
        apps = sum(c.limits.get(resource, 0) for c in self.containers if not c.init)
        return sidecars + max(
            [apps, *(c.limits.get(resource, 0) for c in self.containers if c.init and not c.restartable)]
        )


class NodeSpec(msgspec.Struct, frozen=True, kw_only=True):
    """A device node of the host for the container; `permissions` are letters of the device cgroup."""

    container_path: str
    host_path: str
    permissions: str


class RunOptions(msgspec.Struct, frozen=True, kw_only=True):
    """What the device plugins' answers come to for one container. `cdi` are qualified names of CDI devices, for the runtime."""

    env: dict[str, str] = {}
    mounts: tuple[MountSpec, ...] = ()
    nodes: tuple[NodeSpec, ...] = ()
    annotations: dict[str, str] = {}
    cdi: tuple[str, ...] = ()


class PodPending(Exception):
    """The scheduler finds no room; the pod waits. `Insufficient <resource>`."""


class PodRejected(Exception):
    """Admission failed for good: the pod's phase is Failed and nobody tries again."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(f"{reason}: {message}")
        self.reason = reason
        self.message = message


class ContainerNotStarted(Exception):
    """Creating the container failed; a kubelet tries again with back-off, the pod lives on."""
