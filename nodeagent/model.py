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
    """One USB interface: number and class triple, each 0..255 (USB 2.0 section 9.6.5).

    `hid_usages` are the top-level collections of its HID report descriptor, usage page << 16 | usage (HID 1.11, 6.2.2.6).
    """

    number: int
    cls: int
    subclass: int
    protocol: int
    hid_usages: tuple[int, ...] = ()

    @property
    def triple(self) -> str:
        """USBGuard's spelling, `07:01:02`."""
        return f"{self.cls:02x}:{self.subclass:02x}:{self.protocol:02x}"


class DeviceNode(msgspec.Struct, frozen=True):
    """A node in /dev that belongs to the device, with the subsystem that made it and the number of its USB interface.

    `interface` is -1 for a node of the whole device (`/dev/bus/usb/...`).
    """

    path: str
    subsystem: str
    major: int
    minor: int
    interface: int = -1


class UsbDevice(msgspec.Struct, frozen=True, kw_only=True):
    """What the bus says about a device, before anyone has decided what it is.

    `port` is the kernel's bus path (`1-1.4`) or `sim-<name>`; `serial` and the texts come from the device and
    are cleaned of control characters at the edge. `serial` never leaves the node.
    """

    port: str
    vendor: int
    product: int
    serial: str = ""
    manufacturer: str = ""
    name: str = ""
    interfaces: tuple[Interface, ...] = ()
    nodes: tuple[DeviceNode, ...] = ()
    ieee1284_id: str = ""
    sysfs: str = ""
    simulated: bool = False


class Device(msgspec.Struct, frozen=True, kw_only=True):
    """A device with a class and a stable id (`printer-` + 20 base32 characters; devices/identity)."""

    id: str
    cls: DeviceClass
    usb: UsbDevice
    present: bool = True

    @property
    def health(self) -> Health:
        return Health.HEALTHY if self.present else Health.UNHEALTHY


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
    """One device inside a resource: which rule took it and what it grants."""

    device: Device
    rule: str
    grant: Grant
    give: Give = "service"
    sandbox: Literal["any", "runc", "gvisor", "kata", "kubevirt"] = "any"


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


class SeatState(StrEnum):
    REQUESTED = "requested"
    BOUND = "bound"
    LIVE = "live"
    BROKEN = "broken"
    CLOSED = "closed"
