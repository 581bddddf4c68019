"""The world around the daemon as it goes on while daemons come and go: USB ports, the kubelet's book, sandboxes, containers.

All of it is plain data that can be pickled, since it is handed from one life of the daemon to the next.
"""

from __future__ import annotations

import hashlib
import os
import uuid
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from nodeagent.config import Config, parse
from nodeagent.model import DeviceNode, Interface, PodRef, UsbDevice

DOMAIN = "opencdi.io"
WALL_S = 1_763_000_000.0
"""The wall clock at virtual second 0."""

PRINTING, DISK, CARD = (7, 1, 2), (8, 6, 0x50), (0x0B, 0, 0)
UNITS: dict[str, tuple[str, int, tuple[tuple[int, int, int], ...]]] = {
    "p1": ("P1", 0x0101, (PRINTING,)),
    "p2": ("P2", 0x0101, (PRINTING,)),
    "p1-twin": ("P1", 0x0101, (PRINTING,)),
    "multi": ("M1", 0x0202, (PRINTING, DISK)),
    "key": ("", 0x0303, (CARD,)),
}
"""Physical devices: serial number, product, interfaces. The key has no serial number; the twin has that of p1."""
BY_PORT = frozenset({"key", "p1", "p1-twin"})
PORTS = ("1-1", "1-2", "1-3", "1-4")

_PRINTERS = {"name": "printers", "match": {"class": "printer"}}
_DISKS = {"name": "disks", "match": {"class": "storage"}, "give": "node"}
_KEYS = {"name": "keys", "match": {"class": "ukey"}, "give": "node"}
_MULTI = {"product": "0202"}
RULES: dict[str, list[dict[str, Any]]] = {
    "plain": [_PRINTERS, _DISKS, _KEYS],
    "two-names": [{**_PRINTERS, "resource": ["printer", "print-any"]}, _DISKS, {**_KEYS, "resource": ["ukey", "key"]}],
    "whole-printer": [  # the printer part of the multifunction device comes with its usbfs node, so with its disk
        {"name": "whole", "match": {"class": "printer", **_MULTI}, "give": "node", "resource": "whole", "sandbox": "kubevirt"},
        _PRINTERS, _DISKS, _KEYS,
    ],
    "raw": [{"name": "raw", "match": {"class": "printer", **_MULTI}, "as": "usb", "give": "node"}, _PRINTERS, _DISKS, _KEYS],
    "nurses": [{**_PRINTERS, "to": {"labels": {"role": "nurse"}}}, _DISKS, _KEYS],
    "elsewhere": [{**_PRINTERS, "to": {"namespaces": ["elsewhere"]}}, _DISKS, {**_KEYS, "to": {"namespaces": ["elsewhere"]}}],
    "no-printers": [_DISKS, _KEYS],
}  # fmt: skip
"""The configurations a history changes between."""


@dataclass
class Pod:
    """A pod in the kubelet's book. `wants` is what each of its containers asks for, resource leaf -> number."""

    name: str
    uid: str
    handler: str
    labels: dict[str, str]
    wants: dict[str, dict[str, int]]
    init: str = ""
    """The name of the container that only initialises it."""
    phase: str = "admitting"  # starting, running
    started: list[str] = field(default_factory=list)

    @property
    def ref(self) -> PodRef:
        return PodRef("default", self.name, self.uid)

    @property
    def in_order(self) -> list[str]:
        return sorted(self.wants, key=lambda c: c != self.init)


@dataclass
class Allocation:
    """A line of the kubelet's checkpoint."""

    ids: tuple[str, ...]
    mounts: dict[str, str]
    nodes: tuple[DeviceNode, ...]


@dataclass
class SandboxRecord:
    id: str
    pod: PodRef
    labels: dict[str, str]
    handler: str
    created_ns: int
    ready: bool = True


@dataclass
class ContainerRecord:
    """`inodes` are the directories that it really mounted; `asked` whether the daemon let it start (PreStartContainer)."""

    id: str
    sandbox_id: str
    name: str
    created_ns: int
    pid: int
    mounts: dict[str, str]
    inodes: dict[str, int]
    nodes: set[DeviceNode]
    asked: bool


@dataclass
class World:
    """`now_s` is the virtual time; `lines` tell what happened, newest last; `violations` what must not happen."""

    directory: Path
    rules: str = "plain"
    now_s: float = 0.0
    plugged: dict[str, UsbDevice] = field(default_factory=dict)
    plugs: int = 0
    made: int = 0
    cri_away: bool = False
    api_away: bool = False
    lists_pods: bool = True
    """False: the kubelet was restarted while its API server was away and lists nobody."""
    kubelet_up: bool = True
    pods: dict[str, Pod] = field(default_factory=dict)
    allocations: dict[tuple[str, str, str], Allocation] = field(default_factory=dict)
    lists: dict[str, dict[str, bool]] = field(default_factory=dict)
    """Resource -> id -> healthy, of the plugins whose stream is open."""
    sandboxes: list[SandboxRecord] = field(default_factory=list)
    containers: list[ContainerRecord] = field(default_factory=list)
    endings: list[tuple[float, str]] = field(default_factory=list)
    """When the sandbox of a deleted pod ends."""
    lines: list[str] = field(default_factory=list)
    violations: list[str] = field(default_factory=list)

    # ---- devices

    @property
    def config(self) -> Config:
        return config_of(self.rules, str(self.directory))

    def plug(self, unit: str, port: str) -> None:
        """A device enters a port; its nodes get new numbers."""
        serial, product, triples = UNITS[unit]
        self.plugs += 1
        number = self.plugs
        nodes = [DeviceNode(f"/dev/bus/usb/001/{number:03d}", "usb", 189, number - 1)]
        for index, triple in enumerate(triples):
            if triple == PRINTING:
                nodes.append(DeviceNode(f"/dev/usb/lp{number}", "usbmisc", 180, number, index))
            if triple == DISK:
                nodes.append(DeviceNode(f"/dev/sd{chr(97 + number % 26)}", "block", 8, 16 * number, index))
        self.plugged[unit] = UsbDevice(
            port=port, vendor=0x1209, product=product, serial=serial, manufacturer="Test", name=unit, nodes=tuple(nodes),
            interfaces=tuple(Interface(i, *triple) for i, triple in enumerate(triples)),
        )  # fmt: skip

    def unit_at(self, port: str) -> str:
        """The physical device in a port, empty when there is none."""
        return next((unit for unit, usb in self.plugged.items() if usb.port == port), "")

    # ---- pods

    def uid(self, name: str) -> str:
        self.made += 1
        return str(uuid.UUID(hashlib.md5(f"{name}{self.made}".encode()).hexdigest()))

    def pod(self, name: str) -> Pod | None:
        """The pod of that name in the kubelet's book."""
        return next((p for p in self.pods.values() if p.name == name), None)

    def sandbox(self, uid: str) -> SandboxRecord | None:
        """The ready sandbox of a pod."""
        return next((s for s in self.sandboxes if s.pod.uid == uid and s.ready), None)

    def end_sandbox(self, uid: str) -> None:
        """Its containers are gone, the sandbox is not ready any more."""
        for sandbox in self.sandboxes:
            if sandbox.pod.uid == uid and sandbox.ready:
                sandbox.ready = False
                self.tell(f"runtime: the sandbox of {sandbox.pod.name} is not ready any more")
                self.containers = [c for c in self.containers if c.sandbox_id != sandbox.id]

    def forget(self, uid: str) -> None:
        """The kubelet strikes a pod from its book and its devices are free for the next one."""
        self.pods.pop(uid, None)
        self.allocations = {k: a for k, a in self.allocations.items() if k[0] != uid}

    def daemon_died(self) -> None:
        """What a kubelet makes of it: streams end, a call that was under way has failed."""
        self.lists.clear()
        for pod in [p for p in self.pods.values() if p.phase == "admitting"]:
            self.tell(f"kubelet: {pod.name} is rejected, Allocate failed")
            self.forget(pod.uid)

    # ---- what was mounted

    def directories(self) -> dict[int, str]:
        """Inode -> name of every directory among the slots now."""
        root = self.directory / "run" / "slots"
        try:
            with os.scandir(root) as entries:
                return {e.inode(): e.name for e in entries}
        except FileNotFoundError:
            return {}

    def inode(self, path: str) -> int:
        """The directory that a container mounts, made when it is not there."""
        os.makedirs(path, exist_ok=True)
        return os.stat(path).st_ino

    def tell(self, line: str) -> None:
        self.lines.append(f"{self.now_s:9.3f}  {line}")

    def violated(self, what: str) -> None:
        """Note what must never happen; the first time counts."""
        if not any(v.endswith(what) for v in self.violations):
            self.violations.append(f"{self.now_s:9.3f}  {what}")
            self.tell(f"VIOLATION: {what}")


_configs: dict[tuple[str, str], Config] = {}


def config_of(rules: str, directory: str) -> Config:
    """The daemon's configuration with these rules, parsed as from a file."""
    known = _configs.get((rules, directory))
    if known is None:
        raw = {
            "node_name": "node-1", "host_root": f"{directory}/host", "state_dir": f"{directory}/state",
            "run_dir": f"{directory}/run", "kubernetes": {"api": "off"},
            "devices": {"rules": RULES[rules], "cdi_dir": f"{directory}/cdi", "stale_slot": "report"},
        }  # fmt: skip
        known = _configs[rules, directory] = parse(msgspec.json.encode(raw).decode())
    return known
