"""Slots: the directories that pods mount. Last step of flow A.

A slot is what one Allocate hands out: `<run_dir>/slots/<name>`, mounted read-only at `/run/opencdi/<resource>/`. Its name
is a function of what the kubelet repeats at PreStartContainer, because after a reboot the kubelet reuses its cached answer.
A directory that anybody may have mounted is never given to somebody else: it is set aside for a fresh one, and an old
mount goes on seeing the dead one.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path

import msgspec

from nodeagent.devices import cdi
from nodeagent.devices.plugin import MountSpec, SlotAnswer
from nodeagent.documents import Problem
from nodeagent.model import DeviceNode, Offer, Resource, UsbDevice
from nodeagent.transports.labels import Labels

MOUNT_ROOT = "/run/opencdi"
BUS_NODE = re.compile(r"/dev/bus/usb/([0-9]{3})/([0-9]{3})")

SERVICE_SOCKETS = {"ipp": ("ipp.sock", "CUPS_SERVER")}
"""Service -> its socket in a slot and the variable by which stock clients find it."""


class SlotDevice(msgspec.Struct, frozen=True, kw_only=True):
    id: str
    class_: str = msgspec.field(name="class")
    name: str
    simulated: bool
    health: str = "Healthy"
    reason: str = ""
    """Why it is not healthy, a word of errors.Reason."""


class SlotDocument(msgspec.Struct, frozen=True, kw_only=True):
    """`slot.json`, readable by the desktop (schema nodeagent.slot/v1)."""

    schema: str = "nodeagent.slot/v1"
    slot: str
    resource: str
    ids: tuple[str, ...]
    state: str
    devices: tuple[SlotDevice, ...] = ()
    services: dict[str, str] = {}
    """Service -> path of its socket inside the desktop."""
    made_ns: int = 0
    """When the directory was made, nanoseconds since the epoch."""
    nodes: tuple[DeviceNode, ...] = ()
    """The device nodes that its containers have now."""
    taken: tuple[DeviceNode, ...] = ()
    """Those that they had, and that were taken from them when their device was unplugged."""


def slot_name(resource: str, ids: Iterable[str]) -> str:
    """40 hexadecimal characters: a function of the resource and the set of ids."""
    return hashlib.sha256("\0".join((resource, *sorted(ids))).encode()).hexdigest()[:40]


def variable(resource: Resource) -> str:
    """`opencdi.io/usb-storage` -> `OPENCDI_USB_STORAGE`."""
    return "OPENCDI_" + "".join("_" if c in "-./" else c for c in resource.leaf).upper()


def answer(resource: Resource, ids: Iterable[str], path: Path) -> SlotAnswer:
    """What the kubelet is told to put into the container that holds `ids`: variables, the slot's mount, device nodes."""
    offers = [resource.offers[i] for i in ids]
    inside = f"{MOUNT_ROOT}/{resource.leaf}"
    env = {variable(resource): path.name}
    for service in services_of(offers):
        socket, name = SERVICE_SOCKETS[service]
        env[name] = f"{inside}/{socket}"
    if addresses := [address for o in offers if o.nodes and (address := usb_address(o.device.usb))]:
        env[kubevirt_variable(resource)] = ",".join(addresses)
    return SlotAnswer(
        env=env,
        mounts=(MountSpec(container_path=inside, host_path=str(path), read_only=True),),
        nodes=tuple(n for o in offers if not o.cdi for n in o.nodes),
        cdi=tuple(cdi.qualified(resource, o.device.id) for o in offers if o.cdi),
    )


def usb_address(usb: UsbDevice) -> str:
    """`bus:device` in decimal, as libvirt and KubeVirt write it; empty without a usbfs node."""
    found = BUS_NODE.fullmatch(usb.bus_node.path) if usb.bus_node else None
    return f"{int(found[1])}:{int(found[2])}" if found else ""


def kubevirt_variable(resource: Resource) -> str:
    """What virt-launcher looks for when a USB resource has an external provider: `USB_RESOURCE_OPENCDI_IO_UKEY`.

    KubeVirt replaces `/` and `.` and leaves `-` alone (pkg/util, ResourceNameToEnvVar).
    """
    return "USB_RESOURCE_" + resource.name.upper().replace("/", "_").replace(".", "_")


def services_of(offers: Iterable[Offer]) -> tuple[str, ...]:
    """The services that these offers add to a seat, sorted."""
    return tuple(sorted({s for o in offers if o.give == "service" for s in o.grant.services}))


class Slots:
    """The slot directories of this node. All calls are a few operations on a tmpfs and do not block."""

    def __init__(self, run_dir: Path, labels: Labels | None = None) -> None:
        self.root = run_dir / "slots"
        self.problems: tuple[Problem, ...] = ()
        """What keeps containers from their slots (SELinux)."""
        self._labels = labels

    def prepare(self) -> None:
        self.root.mkdir(parents=True, exist_ok=True)
        self.root.chmod(0o700)
        for leftover in self.root.glob(".dead-*"):
            shutil.rmtree(leftover, ignore_errors=True)
        if self._labels is not None and (problem := self._labels.probe(self.root)) is not None:
            self.problems = (problem,)

    def path(self, name: str) -> Path:
        return self.root / name

    def ensure(self, name: str) -> Path:
        """The slot's directory, made if it is not there. What is made in it has its SELinux type, as files do."""
        path = self.path(name)
        path.mkdir(exist_ok=True)
        path.chmod(0o755)
        if self._labels is not None and (problem := self._labels.apply(path)) is not None:
            self.problems = (problem,)
        return path

    def set_aside(self, name: str) -> Path | None:
        """Move the slot's directory out of the way, mounts of it included; returns where it is now, None if there was none.

        The sockets in it go on working until `discard`.
        """
        path = self.path(name)
        aside = self.root / f".dead-{name}-{os.urandom(4).hex()}"
        try:
            path.rename(aside)
        except FileNotFoundError:
            return None
        return aside

    def discard(self, path: Path | None) -> None:
        """Delete a directory that `set_aside` moved; a mount of it that still exists is left empty."""
        if path is not None:
            shutil.rmtree(path, ignore_errors=True)

    def names(self) -> frozenset[str]:
        return frozenset(p.name for p in self.root.iterdir() if not p.name.startswith("."))

    def write(self, document: SlotDocument) -> None:
        """Replace `slot.json` (0444) in the slot's directory."""
        path = self.path(document.slot)
        temporary = path / ".slot.json"
        temporary.write_bytes(msgspec.json.format(msgspec.json.encode(document), indent=1) + b"\n")
        temporary.chmod(0o444)
        temporary.replace(path / "slot.json")

    def read(self, name: str) -> SlotDocument | None:
        """The slot's document, or None when there is none that can be read. The directory is root's alone to write."""
        try:
            return msgspec.json.decode((self.path(name) / "slot.json").read_bytes(), type=SlotDocument)
        except (OSError, msgspec.DecodeError, UnicodeDecodeError):
            return None


def nodes_of(offers: Iterable[Offer]) -> tuple[DeviceNode, ...]:
    """The device nodes that a container with these offers has while their devices are plugged in."""
    return tuple(n for o in offers if o.device.present for n in o.nodes)


def document(
    slot: str, resource: Resource, ids: Iterable[str], state: str, made_ns: int, nodes: tuple[DeviceNode, ...] = ()
) -> SlotDocument:
    """The slot's public document for the devices that are offered right now."""
    ids = tuple(sorted(ids))
    offers: Mapping[str, Offer] = {i: resource.offers[i] for i in ids if i in resource.offers}
    inside = f"{MOUNT_ROOT}/{resource.leaf}"
    return SlotDocument(
        slot=slot,
        resource=resource.name,
        ids=ids,
        state=state,
        made_ns=made_ns,
        nodes=nodes,
        devices=tuple(
            SlotDevice(
                id=i,
                class_=o.device.cls.value,
                name=o.device.usb.name,
                simulated=o.device.usb.simulated,
                health=o.health.value,
                reason=o.ailment,
            )
            for i, o in offers.items()
        ),
        services={s: f"{inside}/{SERVICE_SOCKETS[s][0]}" for s in services_of(offers.values())},
    )
