"""The configuration file: strict, frozen, and the only place that knows its shape.

`load()` reads YAML into `Config` or raises `ConfigError` whose message starts with the path of the key. Unknown keys,
wrong types and impossible values are all refused; nothing is guessed.
"""

from __future__ import annotations

import os
import socket
from fnmatch import translate
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
import yaml
from msgspec import Meta

from nodeagent import usbguard
from nodeagent.errors import ConfigError
from nodeagent.marks import take_label, take_taint
from nodeagent.model import Audience, DeviceClass, Give
from nodeagent.usbguard import SetText

DEFAULT_PATH = Path("/etc/nodeagent/config.yaml")
MAX_CONFIG_BYTES = 1 << 20

Positive = Annotated[int, Meta(ge=1)]
Seconds = Annotated[float, Meta(gt=0, le=86400)]
ResourceLeaf = Annotated[str, Meta(pattern=r"^[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?\Z|^[a-z0-9][-a-z0-9]{0,53}-\{id8\}\Z")]
"""The leaf of a resource name: an RFC 1123 label. With `-{id8}` at its end each device has a resource of its own, named by
the first 8 characters of its id."""
PageLanguage = Literal[
    "application/pdf",
    "application/postscript",
    "image/pwg-raster",
    "image/urf",
    "application/vnd.hp-pcl",
    "application/vnd.hp-pclxl",
    "image/jpeg",
    "application/octet-stream",
]
"""What device_plugins/printer.py can read from the device id of a printer."""
HexId = Annotated[str, Meta(pattern=r"^[0-9a-f]{4}\Z")]
Pattern = Annotated[str, Meta(min_length=1, max_length=255)]


class Section(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of every mapping in the file."""


class KubeletConfig(Section, frozen=True):
    root_dir: str = "/var/lib/kubelet"
    device_plugin_dir: str = "/var/lib/kubelet/device-plugins"
    """A constant of the kubelet: it does not follow the kubelet's --root-dir."""


class CriConfig(Section, frozen=True):
    socket: str = ""
    """Empty: the first of containerd, CRI-O and cri-dockerd that is there."""
    handlers: dict[str, Literal["runc", "gvisor", "kata", "kubevirt"]] = {}
    """RuntimeClass handler -> kind, for handlers whose name does not tell (see sandboxes/)."""


class TlsConfig(Section, frozen=True):
    cert: str = ""
    key: str = ""
    client_ca: str = ""


class HttpConfig(Section, frozen=True):
    listen: str = "127.0.0.1:9410"
    """host:port; an empty string serves no HTTP."""
    tls: TlsConfig = TlsConfig()
    auth: Literal["none", "token", "mtls"] = "none"


class KubernetesConfig(Section, frozen=True):
    api: Literal["auto", "off"] = "auto"
    """auto: the in-cluster service account where there is one; Events wait in the outbox while the API server is away."""
    startup_taint: str = ""
    """`key[=value]:Effect` that the node has while its devices are not offered; empty: none (marks.take_taint)."""
    ready_label: str = ""
    """`key=value` that the node has while they are; empty: none (marks.take_label)."""


class Match(Section, frozen=True):
    """All given attributes must fit. Hex ids are lower case without 0x; text attributes are fnmatch patterns; `id`,
    `with_interface` and `with_connect_type` are sets in USBGuard's language (usbguard.py)."""

    class_: str | None = msgspec.field(default=None, name="class")
    """What its descriptors say it is."""
    vendor: HexId | None = None
    product: HexId | None = None
    id: SetText | None = None
    serial: Pattern | None = None
    name: Pattern | None = None
    """Manufacturer and product as `nodeagent devices` shows them."""
    port: Pattern | None = None
    with_interface: SetText | None = None
    with_connect_type: SetText | None = None
    simulated: bool | None = None
    input: bool = False
    """Keyboards and mice: a raw device with one of them is matched by a rule that says `true` and by no other."""


SETS: dict[str, usbguard.Syntax] = {
    "id": usbguard.device_id,
    "with_interface": usbguard.interface,
    "with_connect_type": usbguard.word,
}
"""The attributes of a match that are sets, and how their values are written."""


class Rule(Section, frozen=True):
    name: Annotated[str, Meta(min_length=1, max_length=63)]
    match: Match
    as_: DeviceClass | None = msgspec.field(default=None, name="as")
    """What the whole device is taken for, whatever its descriptors say: a token that speaks only its vendor's protocol."""
    resource: ResourceLeaf | Annotated[tuple[ResourceLeaf, ...], Meta(min_length=1, max_length=8)] | None = None
    """The leaf below `domain`, or several; the default is the class (`usb-storage` for storage)."""
    give: Give = "service"
    sandbox: Literal["any", "runc", "gvisor", "kata", "kubevirt"] = "any"
    cdi: bool = False
    """Device nodes through a CDI specification, which a restarted container reads anew, in place of DeviceSpecs."""
    to: Audience = Audience()

    @property
    def leaves(self) -> tuple[str, ...]:
        """The leaves that the rule names; none where its devices' class does."""
        return self.resource if isinstance(self.resource, tuple) else (self.resource,) if self.resource else ()


class SimulatedDevice(Section, frozen=True):
    """A device that exists only in this agent. It enters the inventory by the same door as a real one."""

    model: Literal["printer", "smartcard", "audio", "stick"]
    serial: Annotated[str, Meta(min_length=1, max_length=40, pattern=r"^[A-Za-z0-9._-]+\Z")]
    formats: Annotated[tuple[PageLanguage, ...], Meta(min_length=1)] = ("application/postscript",)
    """Printers: the page languages it speaks, as MIME types; jobs in other formats are converted."""


class DevicesConfig(Section, frozen=True):
    domain: Annotated[str, Meta(pattern=r"^[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?\Z")] = "opencdi.io"
    rules: tuple[Rule, ...] = ()
    simulated: tuple[SimulatedDevice, ...] = ()
    debounce: Seconds = 0.1
    resync: Seconds = 300.0
    stale_slot: Literal["report", "restart"] = "report"
    """What happens to a container that started on a directory that is not its slot: an Event, or also a restart of it."""
    on_refusal: Literal["report", "evict"] = "report"
    """What happens to a pod that was refused three times and holds its device: a metric, or also its eviction."""
    clean_up: bool = True
    """Reset the port, or flush the disk, of a device given as nodes when its lease ends, before the next pod has it."""
    claim: bool = True
    """Keep the host's own programs off the devices that are offered, by rules for its udev."""
    cdi_dir: str = "/var/run/cdi"


class SeatsConfig(Section, frozen=True):
    uid_base: Annotated[int, Meta(ge=100_000, le=0xFFFF_0000)] = 0x7000_0000
    uid_count: Annotated[int, Meta(ge=16, le=1_000_000)] = 65536
    memory_limit_mib: Annotated[int, Meta(ge=32, le=65536)] = 384
    """Of one seat, with its worker and the print filters of its jobs."""
    pids_limit: Annotated[int, Meta(ge=8, le=4096)] = 64
    cpu_limit: Annotated[float, Meta(gt=0, le=128)] = 1.0
    """Cores."""
    connections: Annotated[int, Meta(ge=1, le=1024)] = 32
    """Concurrent connections of one seat to one service."""
    idle_timeout: Seconds = 60.0
    """A connection that moves no byte for so long is closed."""


class PrintingConfig(Section, frozen=True):
    max_document_mib: Annotated[int, Meta(ge=1, le=16384)] = 512
    jobs_per_seat: Annotated[int, Meta(ge=1, le=64)] = 32
    """Unfinished jobs a seat may have (wire.seat.MAX_JOBS)."""
    spool_per_seat_mib: Annotated[int, Meta(ge=1, le=65536)] = 1024
    filter_timeout: Seconds = 300.0
    server_bin: str = "/usr/lib/cups"
    """Where this system's CUPS keeps its filters and daemons."""


class Config(Section, frozen=True):
    node_name: str = ""
    host_root: str = "/"
    state_dir: str = "/var/lib/nodeagent"
    run_dir: str = "/run/nodeagent"
    log: Literal["text", "json", "auto"] = "auto"
    """auto: text on a terminal, JSON lines otherwise."""
    kubelet: KubeletConfig = KubeletConfig()
    cri: CriConfig = CriConfig()
    http: HttpConfig = HttpConfig()
    kubernetes: KubernetesConfig = KubernetesConfig()
    devices: DevicesConfig = DevicesConfig()
    seats: SeatsConfig = SeatsConfig()
    printing: PrintingConfig = PrintingConfig()

    @property
    def pod_resources_socket(self) -> Path:
        """The kubelet's PodResources socket follows its root directory (KEP-606)."""
        return Path(self.kubelet.root_dir) / "pod-resources" / "kubelet.sock"


DEFAULT_RESOURCE = {"ukey": "ukey", "printer": "printer", "audio": "audio", "storage": "usb-storage", "usb": "usb"}
"""Class -> leaf of its resource name, where the rule does not say."""


def resource_leaves(rule: Rule, device_class: str) -> tuple[str, ...]:
    """The leaves of a device of this class that the rule takes."""
    return rule.leaves or (DEFAULT_RESOURCE[device_class],)


def possible_leaves(rule: Rule) -> tuple[str, ...]:
    """Every leaf that the rule can offer a device under: what it names, else that of its class, else that of any."""
    device_class = rule.as_ or rule.match.class_
    classes = (device_class,) if device_class else tuple(DEFAULT_RESOURCE)
    return tuple(dict.fromkeys(leaf for c in classes for leaf in resource_leaves(rule, c)))


class _UniqueKeyLoader(yaml.SafeLoader):
    """YAML lets a mapping repeat a key and keeps the last; in a policy file that hides a rule."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str | int | float | bool | None):
                raise yaml.constructor.ConstructorError(None, None, "a key must be plain text", key_node.start_mark)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} appears twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


def parse(text: str) -> Config:
    """Decode and check one configuration text; raises ConfigError."""
    try:
        raw = yaml.load(text, _UniqueKeyLoader)  # noqa: S506 (a SafeLoader)
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise ConfigError(f"not valid YAML: {' '.join(str(error).split())}") from error
    if raw is None:
        raw = {}
    try:
        config = msgspec.convert(raw, Config)
    except msgspec.ValidationError as error:
        raise ConfigError(_with_path(str(error))) from error
    check(config)
    return config


def load(path: Path) -> Config:
    """Read and check the file; raises ConfigError, also when it cannot be read."""
    try:
        with path.open("rb") as file:
            data = file.read(MAX_CONFIG_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}", hint="name another file with --config") from error
    if len(data) > MAX_CONFIG_BYTES:
        raise ConfigError(f"{path}: larger than {MAX_CONFIG_BYTES} bytes")
    try:
        return parse(data.decode())
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 text (byte {error.start})") from error


def _with_path(message: str) -> str:
    """msgspec says `Expected ... - at `$.devices.rules[2].give``; people get `devices.rules[2].give: ...`."""
    text, _, where = message.partition(" - at `$")
    where = where.rstrip("`").lstrip(".")
    if text.startswith("Object contains unknown field `"):
        field = text.split("`")[1]
        where, text = f"{where}.{field}".lstrip("."), "unknown key"
    elif text.startswith("Object missing required field `"):
        field = text.split("`")[1]
        where, text = f"{where}.{field}".lstrip("."), "missing"
    return f"{where}: {text}" if where else text


def check(config: Config) -> None:
    """What types cannot say. Raises ConfigError with the path of the first impossible value."""
    for key in ("host_root", "state_dir", "run_dir"):
        if not Path(getattr(config, key)).is_absolute():
            raise ConfigError(f"{key}: must be an absolute path")
    if len(config.run_dir) > 60:
        raise ConfigError(
            "run_dir: longer than 60 characters; the paths of Unix sockets below it would not fit into 108"
        )
    _check_http(config.http)
    take_taint(config.kubernetes.startup_taint, "kubernetes.startup_taint")
    take_label(config.kubernetes.ready_label, "kubernetes.ready_label")
    names: set[str] = set()
    audiences: dict[str, tuple[int, Audience]] = {}
    for index, rule in enumerate(config.devices.rules):
        where = f"devices.rules[{index}]"
        if rule.name in names:
            raise ConfigError(f"{where}.name: {rule.name!r} is used twice")
        names.add(rule.name)
        if rule.match.class_ is not None and rule.match.class_ not in DEFAULT_RESOURCE:
            raise ConfigError(f"{where}.match.class: {rule.match.class_!r} is none of {', '.join(DEFAULT_RESOURCE)}")
        if rule.give not in ("service", "node"):
            raise ConfigError(f"{where}.give: {rule.give!r} is not supported by this version", hint="service or node")
        if rule.give == "node" and rule.sandbox not in ("any", "runc", "kubevirt"):
            raise ConfigError(f"{where}.sandbox: device nodes work under runc and in KubeVirt only, not {rule.sandbox}")
        if rule.cdi and rule.give != "node":
            raise ConfigError(f"{where}.cdi: only device nodes (`give: node`) come by CDI")
        if len(set(rule.leaves)) != len(rule.leaves):
            raise ConfigError(f"{where}.resource: a name stands twice")
        _check_sets(where, rule.match)
        _check_audience(where, rule.to)
        for leaf in sorted(possible_leaves(rule)):
            first, audience = audiences.setdefault(leaf, (index, rule.to))
            if audience != rule.to:
                raise ConfigError(
                    f"{where}.to: differs from devices.rules[{first}].to, but both offer {config.devices.domain}/{leaf}",
                    hint="the kubelet picks any device of a resource; give one of the rules a resource of its own",
                )
    serials: set[str] = set()
    for index, simulated in enumerate(config.devices.simulated):
        if simulated.serial in serials:
            raise ConfigError(f"devices.simulated[{index}].serial: {simulated.serial!r} is used twice")
        serials.add(simulated.serial)


def _check_sets(where: str, match: Match) -> None:
    for key, syntax in SETS.items():
        text = getattr(match, key)
        if text is not None:
            try:
                usbguard.take_set(text, syntax)
            except ValueError as error:
                raise ConfigError(
                    f"{where}.match.{key}: {error}", hint="as in USBGuard's rules: `one-of { 0b:*:* 03:00:* }`"
                ) from error


def _check_audience(where: str, to: Audience) -> None:
    for key in ("namespaces", "service_accounts"):
        patterns = getattr(to, key)
        if not patterns:
            raise ConfigError(f"{where}.to.{key}: an empty list lets nobody in", hint='["*"] lets everybody in')
        for pattern in patterns:
            translate(pattern)


def _check_http(http: HttpConfig) -> None:
    if http.listen:
        host, _, port = http.listen.rpartition(":")
        if not host or not port.isdigit() or int(port) > 65535:
            raise ConfigError(f"http.listen: {http.listen!r} is not host:port")
    if bool(http.tls.cert) != bool(http.tls.key):
        raise ConfigError("http.tls: cert and key go together")
    if http.auth == "token":
        raise ConfigError("http.auth: 'token' is not supported by this version", hint="none or mtls")
    if http.auth == "mtls" and not (http.tls.cert and http.tls.client_ca):
        raise ConfigError("http.auth: mtls needs tls.cert, tls.key and tls.client_ca")


def run_dir_of(path: Path) -> str:
    """Where the daemon that was started with this file is reached, also when the file cannot be used any more.

    The daemon keeps what it had; whoever asks it why needs nothing else of the file. Never raises.
    """
    try:
        raw = yaml.load(path.read_bytes()[:MAX_CONFIG_BYTES].decode(errors="replace"), _UniqueKeyLoader)  # noqa: S506
        found = raw.get("run_dir") if isinstance(raw, dict) else None
    except (OSError, yaml.YAMLError, RecursionError, ValueError):
        found = None
    return found if isinstance(found, str) and Path(found).is_absolute() else Config.run_dir


def node_name(config: Config) -> str:
    """The node's name in Kubernetes: the file, else $NODE_NAME, else the host's name in lower case."""
    return config.node_name or os.environ.get("NODE_NAME") or socket.gethostname().lower()
