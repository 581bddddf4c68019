"""Device nodes by CDI (Container Device Interface): the runtime reads a file of ours whenever it makes a container.

The kubelet repeats its first answer for as long as a container is restarted, so a DeviceSpec in it names a node that a replug
made void. A CDI name in it does not: the file says what the name stands for now. One file for each resource, of format 0.5.0,
the first with `hostPath` (CDI SPEC.md); a runtime refuses fields that its declared format does not have.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path

import msgspec

from nodeagent.model import DeviceNode, Offer, Resource

VERSION = "0.5.0"
OURS = re.compile(r"nodeagent-[a-z0-9.-]+\.json\Z")


class _Node(msgspec.Struct, frozen=True, omit_defaults=True, rename="camel"):
    path: str
    host_path: str
    type: str
    major: int
    minor: int
    permissions: str


class _Edits(msgspec.Struct, frozen=True, rename="camel"):
    device_nodes: tuple[_Node, ...]


class _Device(msgspec.Struct, frozen=True, rename="camel"):
    name: str
    container_edits: _Edits


class _Spec(msgspec.Struct, frozen=True, rename="camel"):
    cdi_version: str
    kind: str
    devices: tuple[_Device, ...]


def qualified(resource: Resource, device_id: str) -> str:
    """The name of a device in the kubelet's answer: `opencdi.io/ukey=ukey-...`."""
    return f"{resource.name}={device_id}"


def specification(resource: Resource) -> bytes | None:
    """The file of a resource: its present devices that come by CDI. None when there is none (CDI wants at least one)."""
    devices = tuple(
        _Device(i, _Edits(tuple(_node(n) for n in offer.nodes)))
        for i, offer in sorted(resource.offers.items())
        if _by_cdi(offer)
    )
    if not devices:
        return None
    spec = _Spec(VERSION, resource.name, devices)
    return msgspec.json.format(msgspec.json.encode(spec), indent=1) + b"\n"


def _by_cdi(offer: Offer) -> bool:
    return offer.cdi and offer.device.present and bool(offer.nodes)


def _node(node: DeviceNode) -> _Node:
    return _Node(node.path, node.path, node.kind, node.major, node.minor, "rw")


class CdiFiles:
    """Our files in a directory that runtimes watch (`/var/run/cdi`). A few operations on a tmpfs, which do not block."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._written: dict[str, bytes] = {}
        self._swept = False

    def write(self, resources: Mapping[str, Resource]) -> None:
        """Make the files say what `resources` say, each replaced in one step; at first remove what a predecessor left.

        Raises OSError when the directory refuses.
        """
        wanted = {_name(r): spec for r in resources.values() if (spec := specification(r)) is not None}
        if wanted:
            self._directory.mkdir(parents=True, exist_ok=True, mode=0o755)
        if not self._swept:
            self._written = dict.fromkeys(self._found(), b"")
            self._swept = True
        for name, spec in wanted.items():
            if self._written.get(name) != spec:
                self._replace(self._directory / name, spec)
        for name in self._written.keys() - wanted.keys():
            (self._directory / name).unlink(missing_ok=True)
        self._written = wanted

    def _replace(self, path: Path, spec: bytes) -> None:
        """In one step, under a name that no runtime reads until then. Not synced: /run is empty after a power cut anyway."""
        unfinished = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        unfinished.write_bytes(spec)
        unfinished.chmod(0o644)
        unfinished.replace(path)

    def _found(self) -> list[str]:
        try:
            return [name for name in os.listdir(self._directory) if OURS.match(name)]  # noqa: PTH208
        except OSError:
            return []


def _name(resource: Resource) -> str:
    return f"nodeagent-{resource.name.replace('/', '-')}.json"
