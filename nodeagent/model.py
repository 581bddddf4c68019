"""The nouns of the house. Read this first.

    UsbDevice -> Device -> Resource -> Lease + Slot -> Seat

Everything here is a frozen value without behaviour that touches the outside world.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Literal

import msgspec


class DeviceClass(StrEnum):
    UKEY = "ukey"
    PRINTER = "printer"
    AUDIO = "audio"
    STORAGE = "storage"
    USB = "usb"


class Health(StrEnum):
    """The two words of the kubelet's device-plugin protocol (v1beta1 constants.go)."""

    HEALTHY = "Healthy"
    UNHEALTHY = "Unhealthy"


Give = Literal["service", "node", "usb", "files", "block"]
SandboxKind = Literal["runc", "gvisor", "kata", "kubevirt"]
ServiceName = Literal["ipp"]
"""A service socket that a slot can hold. One file in `services/` each."""


class Interface(msgspec.Struct, frozen=True, order=True):
    """One USB interface: number and class triple, each 0..255 (USB 2.0 section 9.6.5), of the setting that is in use.

    `alternates` are the triples of all its settings, in the device's order, where it has several: a driver may switch it to
    any of them. `hid_usages` are the top-level collections of its HID report descriptor, usage page << 16 | usage
    (HID 1.11, 6.2.2.6).
    """

    number: int
    cls: int
    subclass: int
    protocol: int
    hid_usages: tuple[int, ...] = ()
    alternates: tuple[str, ...] = ()

    @property
    def triple(self) -> str:
        """USBGuard's spelling, `07:01:02`."""
        return f"{self.cls:02x}:{self.subclass:02x}:{self.protocol:02x}"

    @property
    def types(self) -> tuple[str, ...]:
        """Everything that it can be: the triple of each of its settings."""
        return self.alternates or (self.triple,)


class DeviceNode(msgspec.Struct, frozen=True):
    """A node in /dev that belongs to the device, with the subsystem that made it and the number of its USB interface.

    `interface` is -1 for a node of the whole device (`/dev/bus/usb/...`).
    """

    path: str
    subsystem: str
    major: int
    minor: int
    interface: int = -1

    @property
    def kind(self) -> Literal["b", "c"]:
        """Nodes of the block subsystem are block devices, all others are character devices (kernel, devtmpfs)."""
        return "b" if self.subsystem == "block" else "c"


class UsbDevice(msgspec.Struct, frozen=True, kw_only=True):
    """What the bus says about a device, before anyone has decided what it is.

    `port` is the kernel's bus path (`1-1.4`) or `sim-<name>`; `serial` and the texts come from the device and
    are cleaned of control characters at the edge. `serial` never leaves the node.

    `interfaces` are those in use now, one each; `interface_types` names every alternate setting of the configuration in the
    order of its descriptors, as USBGuard counts them (empty where the descriptors could not be read).
    `connect_type` is the kernel's word for the port: `hotplug`, `hardwired`, `not used`, `unknown` or nothing.
    """

    port: str
    vendor: int
    product: int
    serial: str = ""
    manufacturer: str = ""
    name: str = ""
    interfaces: tuple[Interface, ...] = ()
    interface_types: tuple[str, ...] = ()
    nodes: tuple[DeviceNode, ...] = ()
    ieee1284_id: str = ""
    connect_type: str = ""
    sysfs: str = ""
    simulated: bool = False

    @property
    def types(self) -> tuple[str, ...]:
        """`07:01:02` of every alternate setting, else of every interface in use."""
        return self.interface_types or tuple(i.triple for i in self.interfaces)

    @property
    def title(self) -> str:
        """Manufacturer and product, as people are shown them."""
        return " ".join(part for part in (self.manufacturer, self.name) if part)

    @property
    def bus_node(self) -> DeviceNode | None:
        """The usbfs node, `/dev/bus/usb/BBB/DDD`, which is the whole device and new with each stay on the bus."""
        return next((n for n in self.nodes if n.interface < 0 and n.subsystem == "usb"), None)


class Part(msgspec.Struct, frozen=True):
    """What one class takes of a device: the numbers of its interfaces, sorted."""

    cls: DeviceClass
    interfaces: tuple[int, ...]


class Device(msgspec.Struct, frozen=True, kw_only=True):
    """One part of a USB device with a class and a stable id (`printer-` + 20 base32 characters; devices/identity).

    `interfaces` are the numbers of its USB interfaces, empty for all of them. `natural` is the class that its descriptors
    say, where a rule gave it another one (`as:`).
    """

    id: str
    cls: DeviceClass
    usb: UsbDevice
    interfaces: tuple[int, ...] = ()
    natural: DeviceClass | None = None
    present: bool = True

    @property
    def parts(self) -> frozenset[int]:
        """The numbers of its interfaces, spelled out."""
        return frozenset(self.interfaces or (i.number for i in self.usb.interfaces))

    def has(self, node: DeviceNode) -> bool:
        """Whether a node belongs to its interfaces; one of the whole device does not."""
        return node.interface in self.interfaces if self.interfaces else node.interface >= 0


class InventoryChange(msgspec.Struct, frozen=True):
    """The inventory after a change: what came, what went, what is there now (by id).

    A vanished device that somebody holds stays in `devices` with `present=False`; when nobody holds it any more it is
    `dropped`. `event_s` is the monotonic time of the first event behind the change, None where a look without one found it.
    """

    appeared: tuple[Device, ...]
    changed: tuple[Device, ...]
    vanished: tuple[Device, ...]
    devices: dict[str, Device]
    dropped: tuple[Device, ...] = ()
    event_s: float | None = None


class Grant(msgspec.Struct, frozen=True):
    """What holding a device means: the service sockets it adds to a seat and the nodes it needs under runc."""

    services: tuple[ServiceName, ...] = ()
    nodes: tuple[DeviceNode, ...] = ()


class Audience(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`to:` of a rule: who may hold the devices of one resource. Namespaces and accounts are fnmatch patterns."""

    namespaces: tuple[str, ...] = ("*",)
    labels: dict[str, str] = {}
    service_accounts: tuple[str, ...] = ("*",)


class Offer(msgspec.Struct, frozen=True, kw_only=True):
    """One device inside a resource: which rule took it and what it grants.

    `siblings` counts the other offers, of this or another resource, that cannot be held at the same time
    (devices/exclusive.py); `held_as` is the resource of the one that is held now, empty when none is.
    """

    device: Device
    rule: str
    grant: Grant
    give: Give = "service"
    sandbox: Literal["any", "runc", "gvisor", "kata", "kubevirt"] = "any"
    cdi: bool = False
    siblings: int = 0
    held_as: str = ""

    @property
    def nodes(self) -> tuple[DeviceNode, ...]:
        """The device nodes that a container receives."""
        return self.grant.nodes if self.give == "node" else ()

    @property
    def health(self) -> Health:
        """What the kubelet is told."""
        return Health.HEALTHY if self.device.present and not self.held_as else Health.UNHEALTHY

    @property
    def ailment(self) -> str:
        """Why it is unhealthy, a word of errors.Reason; empty when it is not."""
        if not self.device.present:
            return "device_unplugged"
        return "leased_under_other_resource" if self.held_as else ""


class Resource(msgspec.Struct, frozen=True, kw_only=True):
    """What the kubelet is told: a name such as `opencdi.io/printer`, its devices by id, and who may have them."""

    name: str
    to: Audience
    offers: dict[str, Offer]

    @property
    def leaf(self) -> str:
        """The part after the domain: `printer`."""
        return self.name.partition("/")[2]


class PodRef(msgspec.Struct, frozen=True, order=True):
    namespace: str
    name: str
    uid: str

    def __str__(self) -> str:
        return f"{self.namespace}/{self.name}"


class Sandbox(msgspec.Struct, frozen=True, kw_only=True):
    """A pod sandbox as CRI tells it. `labels` are the pod's own, without the io.kubernetes.* ones."""

    id: str
    pod: PodRef
    ready: bool
    labels: dict[str, str] = {}
    handler: str = ""
    created_ns: int = 0


class Container(msgspec.Struct, frozen=True, kw_only=True):
    """A container as CRI tells it. `mounts` maps container path to host path; `pid` is 0 where CRI does not say."""

    id: str
    sandbox_id: str
    name: str
    running: bool
    created_ns: int = 0
    mounts: dict[str, str] = {}
    pid: int = 0


class Lease(msgspec.Struct, frozen=True, kw_only=True):
    """One device id held under one resource. `pod` is None until someone is seen to hold it.

    Each Allocate of an id makes a new generation; times are Unix seconds.
    """

    device_id: str
    resource: str
    slot: str
    generation: int
    created_s: float
    pod: PodRef | None = None
    container: str = ""
    sandbox_id: str = ""


class CleanUp(msgspec.Struct, frozen=True, order=True):
    """What has to happen to a device before its next holder has it: the lease of `pod_uid` on it, of this generation, ended."""

    device_id: str
    generation: int
    resource: str
    pod_uid: str


class SeatState(StrEnum):
    REQUESTED = "requested"
    BOUND = "bound"
    LIVE = "live"
    BROKEN = "broken"
    CLOSED = "closed"
