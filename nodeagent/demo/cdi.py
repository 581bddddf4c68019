"""CDI for the stand-in runtime: specification files, read as strictly as containerd 2.x reads them.

After the Container Device Interface 1.1.0 (cncf-tags/container-device-interface: SPEC.md, pkg/cdi): a file with an unknown field,
a version that is too low for what it uses, or a bad name does not exist for the runtime; a device that no file has fails the
creation of the container. `intelRdt` and `netDevices` are left out.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
import yaml
from msgspec import Meta

from nodeagent.demo import oci
from nodeagent.errors import AgentError, Reason

SPEC_DIRS = ("/etc/cdi", "/var/run/cdi")
"""Static and dynamic, of a higher priority than the one before it (containerd's cdi_spec_dirs)."""
VERSIONS = ("0.3.0", "0.4.0", "0.5.0", "0.6.0", "0.7.0", "0.8.0", "1.0.0", "1.1.0")
KIND = re.compile(r"[A-Za-z][A-Za-z0-9_.-]*[A-Za-z0-9]/[A-Za-z]([A-Za-z0-9_-]*[A-Za-z0-9])?\Z")
NAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9_.:-]*[A-Za-z0-9])?\Z")
VARIABLE = re.compile(r"[^=]+=")
HOOK_NAMES = ("prestart", "createRuntime", "createContainer", "startContainer", "poststart", "poststop")
MAX_FILE_BYTES = 1 << 20

Text = Annotated[str, Meta(min_length=1)]


class _Strict(msgspec.Struct, frozen=True, forbid_unknown_fields=True, rename="camel"):
    pass


class CdiNode(_Strict, frozen=True):
    """`hostPath` is `path` where it is not said; numbers, type and owner are the host's."""

    path: Text
    host_path: str = ""
    type: Literal["", "b", "c", "u", "p"] = ""
    major: int = 0
    minor: int = 0
    file_mode: int | None = None
    permissions: Annotated[str, Meta(pattern=r"^([rwm]{0,3}|none)$")] = ""
    uid: int | None = None
    gid: int | None = None


class CdiMount(_Strict, frozen=True):
    host_path: Text
    container_path: Text
    options: tuple[str, ...] = ()
    type: str = ""


class CdiHook(_Strict, frozen=True):
    hook_name: Literal["prestart", "createRuntime", "createContainer", "startContainer", "poststart", "poststop"]
    path: Text
    args: tuple[str, ...] = ()
    env: tuple[str, ...] = ()
    timeout: int | None = None


class CdiEdits(_Strict, frozen=True):
    """`containerEdits`: what a device adds to a container."""

    env: tuple[str, ...] = ()
    device_nodes: tuple[CdiNode, ...] = ()
    mounts: tuple[CdiMount, ...] = ()
    hooks: tuple[CdiHook, ...] = ()
    additional_gids: tuple[int, ...] = ()


class CdiDevice(_Strict, frozen=True):
    name: str
    container_edits: CdiEdits
    annotations: dict[str, str] = {}


class CdiSpec(_Strict, frozen=True):
    """One file."""

    cdi_version: str
    kind: str
    devices: Annotated[tuple[CdiDevice, ...], Meta(min_length=1)]
    container_edits: CdiEdits = CdiEdits()
    annotations: dict[str, str] = {}


def take_spec(untrusted_text: str, name: str) -> CdiSpec:
    """A specification from the text of the file `name` (.json or .yaml); raises AgentError(MALFORMED) with the reason."""
    try:
        if name.endswith(".json"):
            spec = msgspec.json.decode(untrusted_text, type=CdiSpec)
        else:  # msgspec.yaml takes libyaml's C loader, which a deep nesting ends with a segmentation fault
            spec = msgspec.convert(yaml.load(untrusted_text, yaml.SafeLoader), CdiSpec)
    except (msgspec.MsgspecError, yaml.YAMLError, ValueError, RecursionError) as error:
        raise _bad(name, str(error)) from error
    if spec.cdi_version not in VERSIONS:
        raise _bad(name, f"unknown version {spec.cdi_version!r}")
    if not KIND.match(spec.kind):
        raise _bad(name, f"bad kind {spec.kind!r}")
    names = [d.name for d in spec.devices]
    if wrong := [n for n in names if not NAME.match(n)]:
        raise _bad(name, f"bad device name {wrong[0]!r}")
    if len(set(names)) != len(names):
        raise _bad(name, "two devices of one name")
    edits = [spec.container_edits, *(d.container_edits for d in spec.devices)]
    if wrong := [v for e in edits for v in e.env if not VARIABLE.match(v)]:
        raise _bad(name, f"bad variable {wrong[0]!r}")
    if any(d.container_edits == CdiEdits() for d in spec.devices):
        raise _bad(name, "a device without edits")
    needed = _needed(spec, edits)
    if VERSIONS.index(spec.cdi_version) < VERSIONS.index(needed):
        raise _bad(name, f"the spec version must be at least v{needed}")
    return spec


def resolve(names: Sequence[str], directories: Iterable[Path]) -> tuple[CdiEdits, ...]:
    """The edits for these devices in their order, those of a whole file before those of its first device.

    Raises AgentError(DEVICE_UNKNOWN) with containerd's words where a name is in no usable file, or in two of one directory.
    Blocking.
    """
    found: dict[str, tuple[CdiSpec, CdiDevice] | None] = {}
    for directory in directories:
        here: dict[str, tuple[CdiSpec, CdiDevice] | None] = {}
        for spec in _specs(directory):
            for device in spec.devices:
                full = f"{spec.kind}={device.name}"
                here[full] = None if full in here else (spec, device)
        found.update(here)
    if missing := [n for n in names if found.get(n) is None]:
        raise AgentError(
            Reason.DEVICE_UNKNOWN, f"CDI device injection failed: unresolvable CDI devices {', '.join(missing)}"
        )
    edits: list[CdiEdits] = []
    seen: list[CdiSpec] = []
    for name in names:
        if (entry := found[name]) is not None:
            spec, device = entry
            if not any(s is spec for s in seen):
                seen.append(spec)
                edits.append(spec.container_edits)
            edits.append(device.container_edits)
    return tuple(edits)


def inject(document: Mapping[str, Any], edits: Sequence[CdiEdits], nodes: Sequence[oci.Node]) -> dict[str, Any]:
    """The OCI spec with the edits made; `nodes` are those of the edits with the numbers that the host has, in their order.

    What CDI brings replaces what is there: a variable of the same name, a mount or node at the same path.
    """
    process, linux = dict(document["process"]), dict(document["linux"])
    fresh = [v for e in edits for v in e.env]
    names = {v.partition("=")[0] for v in fresh}
    process["env"] = [v for v in process["env"] if v.partition("=")[0] not in names] + fresh
    if gids := sorted({g for e in edits for g in e.additional_gids if g}):
        process["user"] = {**process["user"], "additionalGids": gids}
    paths = {n.path for n in nodes}
    linux["devices"] = [d for d in linux["devices"] if d["path"] not in paths] + [oci.device(n) for n in nodes]
    rules = [oci.device_rule(n) for n in nodes if n.permissions]
    linux["resources"] = {**linux["resources"], "devices": [*linux["resources"]["devices"], *rules]}
    mounts = [m for e in edits for m in e.mounts]
    places = {m.container_path for m in mounts}
    table = [m for m in document["mounts"] if m["destination"] not in places] + [_mount(m) for m in mounts]
    hooks = {
        name: [_hook(h) for e in edits for h in e.hooks if h.hook_name == name]
        for name in HOOK_NAMES
        if any(h.hook_name == name for e in edits for h in e.hooks)
    }
    return {
        **document,
        "process": process,
        "linux": linux,
        "mounts": oci.by_depth(table),
        **({"hooks": hooks} if hooks else {}),
    }


def _specs(directory: Path) -> Iterable[CdiSpec]:
    if not directory.is_dir():
        return
    for path in sorted(directory.iterdir()):
        if path.suffix not in (".json", ".yaml") or not path.is_file() or path.stat().st_size > MAX_FILE_BYTES:
            continue
        try:
            yield take_spec(path.read_text(errors="replace"), path.name)
        except AgentError:
            continue  # containerd notes it in its log; its devices are unknown


def _needed(spec: CdiSpec, edits: Sequence[CdiEdits]) -> str:
    """The lowest version that has everything the file uses (pkg/cdi/version.go, requiredVersion)."""
    if any(e.additional_gids for e in edits):
        return "0.7.0"
    if spec.annotations or any(d.annotations for d in spec.devices) or "." in spec.kind.partition("/")[2]:
        return "0.6.0"
    if any(n.host_path for e in edits for n in e.device_nodes) or any(d.name[0].isdigit() for d in spec.devices):
        return "0.5.0"
    if any(m.type for e in edits for m in e.mounts):
        return "0.4.0"
    return "0.3.0"


def _bad(name: str, why: str) -> AgentError:
    return AgentError(Reason.MALFORMED, f"{name} is no CDI specification: {why}")


def _mount(mount: CdiMount) -> dict[str, Any]:
    made: dict[str, Any] = {
        "destination": mount.container_path,
        "source": mount.host_path,
        "options": list(mount.options),
    }
    return {**made, "type": mount.type} if mount.type else made


def _hook(hook: CdiHook) -> dict[str, Any]:
    made: dict[str, Any] = {"path": hook.path, "args": list(hook.args), "env": list(hook.env)}
    return made if hook.timeout is None else {**made, "timeout": hook.timeout}
