"""What the stand-in runtime puts on disk and which commands it runs: bundles, the two low-level runtimes, cgroups.

The root of every container is the machine's own. It is bound in a private mount namespace that only the runtime's process
and its container have: no mount of it is ever in the machine's mount table, and none outlives the container.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import stat
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import msgspec

from nodeagent.demo import cdi, oci
from nodeagent.demo.pods import NodeSpec
from nodeagent.errors import AgentError, Reason

CGROUP_RELEASE_S = 2.0
"""A cgroup stays busy for a moment after its last process has ended."""

PID_FILE = "pid"
"""In a bundle, once the runtime has made the container."""

SYSTEM_MOUNTS = ("/usr",)
"""Directories that some machines keep on a file system of their own; the root is bound without its submounts."""

PRIVATE_PLACES = (
    *("/root", "/home", "/srv", "/mnt", "/media", "/boot", "/lost+found"),
    *("/etc/nodeagent", "/etc/kubernetes", "/etc/containerd", "/etc/ssl/private", "/etc/ssh"),
    *("/var/lib/nodeagent", "/var/lib/kubelet", "/var/lib/containerd", "/var/lib/docker", "/var/lib/systemd"),
    *("/var/backups", "/var/cache", "/var/log", "/var/mail", "/var/spool", "/var/tmp"),  # noqa: S108
)
"""Directories of the machine that a desktop finds empty. With `--host-uds=open` a socket anywhere in its root could be
connected to; /run and /tmp are a tmpfs of its own in any case."""


class Binary(msgspec.Struct, frozen=True, kw_only=True):
    """A low-level runtime: its program, its global flags, and what it does when its own parent dies.

    `kind` is the CRI container type it is told. runsc kills its sandbox when it is killed itself; runc would leave the
    container alone then, but passes TERM on to it.
    """

    program: str
    flags: tuple[str, ...] = ()
    kind: Literal["sandbox", "container"] = "container"
    death_signal: str = "TERM"

    def argv(self, directory: Path, *words: str) -> list[str]:
        return [self.program, "--root", str(directory / self.program), *self.flags, *words]


RUNC = Binary(program="runc")
RUNSC = Binary(program="runsc", flags=("--network=none", "--host-uds=open"), kind="sandbox", death_signal="KILL")
"""`--host-uds=open` (runsc of October 2022 and later): sockets below bind mounts can be connected to, none is made on the
host. Each container is a sandbox of its own; told `container`, runsc would look for the sandbox of a pause container."""

HANDLERS: Mapping[str, Binary] = {"": RUNC, "runc": RUNC, "runsc": RUNSC}
"""RuntimeClass handler -> runtime; containerd's default is runc."""


def binary_of(handler: str) -> Binary:
    """The runtime of a handler. Raises AgentError when nobody knows the handler or its program is not installed."""
    if handler not in HANDLERS:
        raise AgentError(
            Reason.NOT_SUPPORTED,
            f"no runtime for handler {handler!r}",
            hint=f"known are {', '.join(filter(None, HANDLERS))}",
        )
    binary = HANDLERS[handler]
    for program in (binary.program, "unshare", "setpriv"):
        if shutil.which(program) is None:
            package = program if program == binary.program else "util-linux"
            raise AgentError(
                Reason.UPSTREAM_UNAVAILABLE, f"{program} is not installed", hint=f"apt-get install {package}"
            )
    return binary


def take_node(node: NodeSpec) -> oci.Node:
    """The numbers of a device node of the host; containerd copies mode and owner too. Raises AgentError when it is no node."""
    try:
        found = Path(node.host_path).stat()
    except OSError as error:
        raise AgentError(Reason.DEVICE_UNKNOWN, f"{node.host_path}: {error.strerror}") from error
    if not (stat.S_ISCHR(found.st_mode) or stat.S_ISBLK(found.st_mode)):
        raise AgentError(Reason.DEVICE_UNKNOWN, f"{node.host_path}: not a device node")
    return oci.Node(
        path=node.container_path,
        kind="c" if stat.S_ISCHR(found.st_mode) else "b",
        major=os.major(found.st_rdev),
        minor=os.minor(found.st_rdev),
        permissions=node.permissions,
        mode=stat.S_IMODE(found.st_mode),
        uid=found.st_uid,
        gid=found.st_gid,
    )


def take_cdi_node(node: cdi.CdiNode, desktop: oci.Desktop) -> oci.Node:
    """A device node of a CDI specification: what it does not say is asked of the host's node. A node without an owner is the
    container's user's, as containerd does it. Raises AgentError when the host has no such node."""
    spec = NodeSpec(container_path=node.path, host_path=node.host_path or node.path, permissions="")
    found = take_node(spec)
    return msgspec.structs.replace(
        found,
        kind=found.kind if node.type in ("", "u", "p") else node.type,
        major=node.major or found.major,
        minor=node.minor or found.minor,
        mode=found.mode if node.file_mode is None else node.file_mode,
        uid=desktop.uid if node.uid is None else node.uid,
        gid=desktop.gid if node.gid is None else node.gid,
        permissions="" if node.permissions == "none" else node.permissions or "rwm",
    )


def lay_out(
    bundle: Path,
    desktop: oci.Desktop,
    nodes: Sequence[NodeSpec],
    hidden: Sequence[str],
    edits: Sequence[cdi.CdiEdits] = (),
) -> tuple[oci.Desktop, dict[str, Any]]:
    """Write the bundle; the answer is `desktop` with what only the machine knows, and the OCI spec.

    Like containerd it makes a missing source of a mount, as an empty directory; not so for a mount of CDI.
    """
    for mount in desktop.mounts:
        if not os.path.lexists(mount.source):
            Path(mount.source).mkdir(mode=0o755, parents=True)
    system = (oci.Mount(destination=p, source=p) for p in SYSTEM_MOUNTS if os.path.ismount(p))
    desktop = msgspec.structs.replace(
        desktop,
        mounts=(*desktop.mounts, *system),
        nodes=tuple(take_node(n) for n in nodes),
        hidden=tuple(sorted({str(Path(h).resolve()) for h in hidden if Path(h).is_dir()})),
    )
    spec = oci.spec(desktop)
    if edits:
        spec = cdi.inject(spec, edits, [take_cdi_node(n, desktop) for e in edits for n in e.device_nodes])
    (bundle / "rootfs").mkdir(parents=True)
    (bundle / "config.json").write_text(json.dumps(spec, indent=1))
    return desktop, spec


def discard(bundle: Path) -> None:
    """Remove a bundle by name, piece by piece: `rootfs` must be an empty directory by now, and rmdir refuses if it is not."""
    for name in ("config.json", PID_FILE):
        (bundle / name).unlink(missing_ok=True)
    with contextlib.suppress(FileNotFoundError):
        (bundle / "rootfs").rmdir()
        bundle.rmdir()


def launch(binary: Binary, directory: Path, bundle: Path, container_id: str) -> list[str]:
    """The command that runs a container, attached, with the machine's root bound at the bundle's `rootfs`."""
    return [
        *("unshare", "--mount", "--propagation", "slave", "--"),
        *("setpriv", "--pdeathsig", binary.death_signal, "--"),
        *("sh", "-c", 'mount --bind / "$1" && shift && exec "$@"', "sh", str(bundle / "rootfs")),
        *binary.argv(directory, "run", "--bundle", str(bundle), "--pid-file", str(bundle / PID_FILE), container_id),
    ]


def cgroup_roots() -> list[Path]:
    """Where cgroup hierarchies are mounted: one in v2, one for each controller in v1 (proc(5), /proc/mounts)."""
    with open("/proc/self/mounts", encoding="utf-8", errors="replace") as table:
        rows = [line.split() for line in table]
    return [Path(row[1]) for row in rows if row[2] in ("cgroup", "cgroup2")]


def remove_cgroup(path: str) -> None:
    """Remove an empty cgroup and those below it, in every hierarchy; waits CGROUP_RELEASE_S for busy ones."""
    deadline = time.monotonic() + CGROUP_RELEASE_S
    for root in cgroup_roots():
        top = root / path.lstrip("/")
        for directory, _, _ in os.walk(top, topdown=False):
            while True:
                try:
                    Path(directory).rmdir()
                except FileNotFoundError:
                    pass
                except OSError:
                    if time.monotonic() < deadline:
                        time.sleep(0.02)
                        continue
                    raise
                break
