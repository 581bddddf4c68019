"""The public JSON of the agent: one frozen struct per verb.

The daemon fills them in, the control socket, `/api/v1/<verb>` and `-o json` carry them unchanged, the tables of the
command line are made from them. Adding a field is free; renaming one is a breaking change. Fields ending in `_s` are
Unix seconds, except `uptime_s` and `oldest_s`, which are durations. Serial numbers never appear, only whether there is one.
"""

from __future__ import annotations

import os
import platform
from typing import Literal, Protocol

import msgspec

from nodeagent import __version__
from nodeagent.config import Config
from nodeagent.errors import AgentError, Reason
from nodeagent.model import Device, DeviceClass, PodRef, SandboxKind, SeatState


class Document(msgspec.Struct, frozen=True, kw_only=True):
    """Base of every document; each names its `schema`, `nodeagent.<verb>/v1`."""


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """Base of what documents are made of."""


class Problem(Row, frozen=True, kw_only=True):
    """Something a person should know: what happened to what, and what to do about it."""

    message: str
    hint: str = ""
    reason: Reason | None = None

    @classmethod
    def of(cls, error: AgentError) -> Problem:
        return cls(message=error.message, hint=error.hint, reason=error.reason)


# ---- status


class Registration(Row, frozen=True, kw_only=True):
    """One resource and the kubelet."""

    resource: str
    registered: bool
    devices: int = 0
    healthy: int = 0
    since_s: float = 0
    """When the kubelet last answered Register; 0 = never."""
    message: str = ""


class Peer(Row, frozen=True, kw_only=True):
    """A program the agent depends on: the container runtime, the API server, a server it runs itself."""

    name: str
    state: Literal["connected", "unreachable", "starting", "off"]
    """off: not configured, and nothing is missing for it."""
    since_s: float = 0
    restarts: int = 0
    pid: int = 0
    message: str = ""


class DeviceCounts(Row, frozen=True, kw_only=True):
    known: int = 0
    present: int = 0
    offered: int = 0
    leased: int = 0
    simulated: int = 0


class ConfigState(Row, frozen=True, kw_only=True):
    path: str
    """Empty: no file, the defaults are used."""
    loaded_s: float
    last_error: str = ""
    """Why the newest version of the file is not in use; empty when it is."""


class OutboxState(Row, frozen=True, kw_only=True):
    """Reports that wait for the API server. `problem` says why they would not survive a restart, if so."""

    length: int = 0
    oldest_s: float = 0
    dropped: int = 0
    problem: str = ""


class StatusDocument(Document, frozen=True, kw_only=True):
    schema: str = "nodeagent.status/v1"
    node: str
    version: str
    pid: int
    uptime_s: float
    role: Literal["active", "standby"]
    """standby: another daemon of this node holds the state; this one takes over when that one ends."""
    ready: bool
    not_ready: tuple[str, ...] = ()
    """What it waits for; empty when ready."""
    kubelet: tuple[Registration, ...] = ()
    devices: DeviceCounts = DeviceCounts()
    seats: dict[SeatState, int] = {}
    leases: int = 0
    cri: Peer
    api: Peer
    upstreams: tuple[Peer, ...] = ()
    outbox: OutboxState = OutboxState()
    config: ConfigState
    problems: tuple[Problem, ...] = ()


# ---- devices


class Holder(Row, frozen=True, kw_only=True):
    """Who has a device. `pod` is None from Allocate until somebody is seen to hold it."""

    pod: PodRef | None = None
    container: str = ""
    slot: str = ""
    since_s: float = 0


class DeviceRow(Row, frozen=True, kw_only=True):
    id: str
    """Empty: not known, because ids need the node's key and the reader has none."""
    class_: DeviceClass = msgspec.field(name="class")
    name: str
    vendor: str
    product: str
    """Four hex digits each, lower case."""
    port: str
    has_serial: bool
    simulated: bool
    present: bool
    healthy: bool = True
    reason: Reason | None = None
    """Why it is not healthy: unplugged, or held under another name."""
    resource: str = ""
    """Empty: not offered, and `unoffered` says why. Several names are joined with a comma."""
    rule: str = ""
    services: tuple[str, ...] = ()
    unoffered: str = ""
    held_by: Holder | None = None


class DevicesDocument(Document, frozen=True, kw_only=True):
    schema: str = "nodeagent.devices/v1"
    node: str
    source: Literal["daemon", "direct"] = "daemon"
    """direct: no daemon was asked; the facts were read from the system, so nothing is known about holders."""
    devices: tuple[DeviceRow, ...] = ()
    problems: tuple[Problem, ...] = ()


def device_row(
    device: Device,
    *,
    resource: str = "",
    rule: str = "",
    services: tuple[str, ...] = (),
    unoffered: str = "",
    ailment: str = "",
    held_by: Holder | None = None,
) -> DeviceRow:
    """The public side of a device: everything but its serial number."""
    usb = device.usb
    return DeviceRow(
        id=device.id,
        class_=device.cls,
        name=usb.title,
        vendor=f"{usb.vendor:04x}",
        product=f"{usb.product:04x}",
        port=usb.port,
        has_serial=bool(usb.serial),
        simulated=usb.simulated,
        present=device.present,
        healthy=device.present and not ailment,
        reason=Reason(ailment) if ailment else None if device.present else Reason.DEVICE_UNPLUGGED,
        resource=resource,
        rule=rule,
        services=services,
        unoffered=unoffered,
        held_by=held_by,
    )


# ---- seats


class SeatDevice(Row, frozen=True, kw_only=True):
    id: str
    resource: str
    present: bool
    simulated: bool


class WorkerState(Row, frozen=True, kw_only=True):
    pid: int
    """0: none runs now."""
    uid: int
    restarts: int = 0


class JobCounts(Row, frozen=True, kw_only=True):
    """Print jobs of the seat that are still known. `open` ones will still print."""

    open: int = 0
    done: int = 0
    cancelled: int = 0
    failed: int = 0


class SeatRow(Row, frozen=True, kw_only=True):
    pod: PodRef
    state: SeatState
    since_s: float
    """When it entered `state`."""
    message: str = ""
    """Why it is not live, as a sentence."""
    hint: str = ""
    sandbox: SandboxKind | None = None
    containers: tuple[str, ...] = ()
    resources: tuple[str, ...] = ()
    devices: tuple[SeatDevice, ...] = ()
    services: tuple[str, ...] = ()
    worker: WorkerState | None = None
    jobs: JobCounts = JobCounts()
    bytes_in: int = 0
    bytes_out: int = 0
    denied: dict[Reason, int] = {}
    """Refused attempts of this seat by reason."""


class SeatsDocument(Document, frozen=True, kw_only=True):
    schema: str = "nodeagent.seats/v1"
    node: str
    seats: tuple[SeatRow, ...] = ()


# ---- config


class ConfigDocument(Document, frozen=True, kw_only=True):
    """The effective configuration: the file with every default filled in."""

    schema: str = "nodeagent.config/v1"
    source: Literal["file", "defaults", "daemon"]
    path: str
    config: Config


class RuleVerdict(Row, frozen=True, kw_only=True):
    """What one rule says to one device; `why` is empty for the rule that took it."""

    rule: str
    taken: bool
    why: str = ""


class DeviceExplanation(Row, frozen=True, kw_only=True):
    device: DeviceRow
    rules: tuple[RuleVerdict, ...]


class ConfigCheckDocument(Document, frozen=True, kw_only=True):
    schema: str = "nodeagent.config-check/v1"
    path: str
    ok: bool
    error: Problem | None = None
    devices: tuple[DeviceExplanation, ...] = ()
    """For each device of this node, which rule took it and why the others did not."""


class ReloadDocument(Document, frozen=True, kw_only=True):
    schema: str = "nodeagent.reload/v1"
    path: str
    changed: bool
    """False: the file says what was already in use."""


# ---- version


class VersionDocument(Document, frozen=True, kw_only=True):
    """What runs here."""

    schema: str = "nodeagent.version/v1"
    version: str
    python: str
    system: str
    """Kernel and machine, as uname(2) says."""

    @classmethod
    def here(cls) -> VersionDocument:
        """Of this process."""
        uname = os.uname()
        system = f"{uname.sysname} {uname.release} {uname.machine}"
        return cls(version=__version__, python=platform.python_version(), system=system)


class Documents(Protocol):
    """Who answers questions about a running daemon: the command line's through `control`, the browser's through `web`."""

    def document(self, verb: str) -> Document:
        """The document of `status`, `devices`, `seats`, `config` or `version`. Raises KeyError for any other verb."""
        ...

    async def reload(self) -> ReloadDocument:
        """Read the configuration file again. Raises ConfigError when it cannot be used; the old one then stays."""
        ...
