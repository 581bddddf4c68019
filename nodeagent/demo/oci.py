"""OCI runtime specs for the demo and the tests, shaped as containerd's CRI shapes them.

Pure: frozen structs in, a JSON-able document out. What a hand-made bundle gets wrong and this gets right, because a kubelet
and containerd do it so:

- the kubelet's mounts are `rbind,rprivate,ro`: what is mounted on the host later is not seen inside;
- of two mounts with one destination, or two variables with one name, the first is kept;
- a mount of the kubelet replaces a default mount at the same place; all mounts are ordered by depth, else as given;
- no capability, no new privileges, a read-only root, the masked and read-only paths of the kubelet.

Unlike a cluster there is no image: the root is the machine's own, so the places where a machine keeps its secrets and its
sockets are covered by empty directories (`Desktop.hidden`), and the network namespace has no interface but a loopback.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import PurePosixPath
from typing import Any, Literal, TypeVar

import msgspec

from nodeagent.model import PodRef

T = TypeVar("T")

DESKTOP_UID = 1000

BASE_ENV = (
    ("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"),
    ("HOME", "/tmp"),  # noqa: S108 (the only place inside that the desktop can write)
    ("LANG", "C.UTF-8"),
)

MASKED = (
    "/proc/asound",
    "/proc/acpi",
    "/proc/kcore",
    "/proc/keys",
    "/proc/latency_stats",
    "/proc/timer_list",
    "/proc/timer_stats",
    "/proc/sched_debug",
    "/proc/scsi",
    "/sys/firmware",
    "/sys/devices/virtual/powercap",
)
"""ProcMount Default of the kubelet (pkg/securitycontext); containerd takes them from there."""

READONLY = ("/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger")

DEFAULT_DEVICES = ((1, 3), (1, 8), (1, 7), (5, 0), (1, 5), (1, 9), (5, 1), (136, None), (5, 2))
"""null random full tty zero urandom console pts/* ptmx: what every container may open (containerd oci/spec_opts)."""


class Mount(msgspec.Struct, frozen=True, kw_only=True):
    """A bind mount as the kubelet asks for it; `source` is a path of the host."""

    destination: str
    source: str
    readonly: bool = True


class Node(msgspec.Struct, frozen=True, kw_only=True):
    """A device node inside, by number. `permissions` are letters of the device cgroup (`rwm`)."""

    path: str
    major: int
    minor: int
    kind: Literal["c", "b"] = "c"
    permissions: str = "rwm"
    mode: int = 0o660
    uid: int = 0
    gid: int = 0


class Desktop(msgspec.Struct, frozen=True, kw_only=True):
    """One container of a desktop pod. `root` is the path of the root file system as the runtime sees it.

    `kind` is the word of io.kubernetes.cri.container-type: runsc starts a sandbox of its own for a `sandbox` and looks for
    one that runs already for a `container`.
    """

    pod: PodRef
    sandbox_id: str
    name: str
    args: tuple[str, ...]
    root: str
    cgroup: str
    kind: Literal["sandbox", "container"] = "container"
    env: tuple[tuple[str, str], ...] = ()
    mounts: tuple[Mount, ...] = ()
    nodes: tuple[Node, ...] = ()
    hidden: tuple[str, ...] = ()
    """Directories of the host's root that are empty inside."""
    uid: int = DESKTOP_UID
    gid: int = DESKTOP_UID


def spec(desktop: Desktop) -> dict[str, Any]:
    """The config.json of an OCI bundle (runtime-spec 1.0.2)."""
    nodes = first_by((n.path, n) for n in desktop.nodes)
    return {
        "ociVersion": "1.0.2",
        "hostname": desktop.pod.name,
        "root": {"path": desktop.root, "readonly": True},
        "process": {
            "terminal": False,
            "user": {"uid": desktop.uid, "gid": desktop.gid},
            "args": list(desktop.args),
            "cwd": "/tmp",  # noqa: S108
            "env": [f"{k}={v}" for k, v in environment(desktop)],
            "capabilities": {s: [] for s in ("bounding", "effective", "permitted", "inheritable", "ambient")},
            "noNewPrivileges": True,
        },
        "mounts": _mounts(desktop),
        "annotations": _annotations(desktop),
        "linux": {
            "cgroupsPath": desktop.cgroup,
            "namespaces": [{"type": t} for t in ("pid", "ipc", "uts", "mount", "network")],
            "devices": [device(n) for n in nodes],
            "resources": {"devices": _device_rules(nodes)},
            "maskedPaths": list(MASKED),
            "readonlyPaths": list(READONLY),
        },
    }


def environment(desktop: Desktop) -> list[tuple[str, str]]:
    """The variables inside, each name once: the first given wins, and all of them win over the image's."""
    return first_by((pair[0], pair) for pair in (*desktop.env, ("HOSTNAME", desktop.pod.name), *BASE_ENV))


def bind_mounts(desktop: Desktop) -> list[Mount]:
    """The kubelet's mounts that are really made: of two with one destination the first."""
    return first_by((str(PurePosixPath(m.destination)), m) for m in desktop.mounts)


def first_by(pairs: Iterable[tuple[str, T]]) -> list[T]:
    """The values in their order, only the first of each key."""
    kept: dict[str, T] = {}
    for key, value in pairs:
        kept.setdefault(key, value)
    return list(kept.values())


def _mounts(desktop: Desktop) -> list[dict[str, Any]]:
    binds = bind_mounts(desktop)
    taken = {str(PurePosixPath(m.destination)) for m in binds}
    table = [m for m in _defaults(desktop) if m["destination"] not in taken] + [
        {
            "destination": m.destination,
            "type": "bind",
            "source": m.source,
            "options": ["rbind", "rprivate", "ro" if m.readonly else "rw"],
        }
        for m in binds
    ]
    return by_depth(table)


def by_depth(table: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Mounts in an order in which none covers another, else as given."""
    return sorted(table, key=lambda m: len(PurePosixPath(m["destination"]).parts))


def _defaults(desktop: Desktop) -> list[dict[str, Any]]:
    table = [
        _mount("/proc", "proc", "nosuid", "noexec", "nodev"),
        _mount("/dev", "tmpfs", "nosuid", "strictatime", "mode=755", "size=65536k"),
        _mount("/dev/pts", "devpts", "nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"),
        _mount("/dev/mqueue", "mqueue", "nosuid", "noexec", "nodev"),
        _mount("/dev/shm", "tmpfs", "nosuid", "noexec", "nodev", "mode=1777", "size=65536k"),  # noqa: S108
        _mount("/sys", "sysfs", "nosuid", "noexec", "nodev", "ro"),
        _mount("/sys/fs/cgroup", "cgroup", "nosuid", "noexec", "nodev", "relatime", "ro"),
        _mount("/tmp", "tmpfs", "nosuid", "nodev", "mode=1777", "size=262144k"),  # noqa: S108
        _mount("/run", "tmpfs", "nosuid", "nodev", "mode=755", "size=65536k"),
    ]
    covered = [PurePosixPath(m["destination"]) for m in table]
    for path in sorted({PurePosixPath(h) for h in desktop.hidden}):
        if not any(path == c or c in path.parents for c in covered):
            covered.append(path)
            table.append(_mount(str(path), "tmpfs", "nosuid", "noexec", "nodev", "mode=555", "size=4k"))
    return table


def _mount(destination: str, kind: str, *options: str) -> dict[str, Any]:
    return {"destination": destination, "type": kind, "source": kind, "options": list(options)}


def _annotations(desktop: Desktop) -> dict[str, str]:
    cri = "io.kubernetes.cri"
    return {
        f"{cri}.container-type": desktop.kind,
        f"{cri}.sandbox-id": desktop.sandbox_id,
        f"{cri}.sandbox-name": desktop.pod.name,
        f"{cri}.sandbox-namespace": desktop.pod.namespace,
        f"{cri}.sandbox-uid": desktop.pod.uid,
        f"{cri}.container-name": desktop.name,
    }


def device(node: Node) -> dict[str, Any]:
    """`linux.devices[]` of the runtime-spec."""
    return {
        "path": node.path,
        "type": node.kind,
        "major": node.major,
        "minor": node.minor,
        "fileMode": node.mode,
        "uid": node.uid,
        "gid": node.gid,
    }


def _device_rules(nodes: Iterable[Node]) -> list[dict[str, Any]]:
    rules: list[dict[str, Any]] = [{"allow": False, "access": "rwm"}]
    for major, minor in DEFAULT_DEVICES:
        rule = {"allow": True, "type": "c", "major": major, "access": "rwm"}
        rules.append(rule if minor is None else rule | {"minor": minor})
    return [*rules, *(device_rule(n) for n in nodes)]


def device_rule(node: Node) -> dict[str, Any]:
    """`linux.resources.devices[]`: the node may be used."""
    return {"allow": True, "type": node.kind, "major": node.major, "minor": node.minor, "access": node.permissions}
