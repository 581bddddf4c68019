"""What a kubelet remembers of devices over restarts and reboots: who holds which ids, and what the plugin answered then.

The file is the kubelet's own `kubelet_internal_checkpoint` (pkg/kubelet/cm/devicemanager/checkpoint), except for its checksum,
which is computed over the printed form of Go structs there and is a CRC of the JSON here. A kubelet writes it at every change,
this one when it ends.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable
from pathlib import Path

import msgspec
from google.protobuf.message import DecodeError

from nodeagent.wire.pb.deviceplugin.v1beta1 import api_pb2 as pb

FILE = "kubelet_internal_checkpoint"
NO_NUMA_NODE = "-1"


class Holder(msgspec.Struct, frozen=True, order=True):
    """A container that holds devices of one resource."""

    pod_uid: str
    container: str
    resource: str


class Allocation(msgspec.Struct, frozen=True):
    """What one Allocate came to."""

    ids: tuple[str, ...]
    answer: pb.ContainerAllocateResponse


class _Entry(msgspec.Struct, frozen=True, rename="pascal"):
    pod_uid: str = msgspec.field(name="PodUID")
    container_name: str
    resource_name: str
    device_ids: dict[str, tuple[str, ...]] = msgspec.field(name="DeviceIDs")
    alloc_resp: bytes


class _Data(msgspec.Struct, frozen=True, rename="pascal"):
    pod_device_entries: tuple[_Entry, ...] = ()
    registered_devices: dict[str, tuple[str, ...]] = {}


class _File(msgspec.Struct, frozen=True, rename="pascal"):
    data: _Data
    checksum: int


class Checkpoint(msgspec.Struct, frozen=True):
    """The allocations, and the resources that were registered."""

    allocations: dict[Holder, Allocation] = {}
    resources: tuple[str, ...] = ()


def put_checkpoint(checkpoint: Checkpoint, registered: Iterable[tuple[str, Iterable[str]]]) -> bytes:
    """The file's content; `registered` are the healthy ids of each known resource."""
    data = _Data(
        tuple(
            _Entry(h.pod_uid, h.container, h.resource, {NO_NUMA_NODE: a.ids}, a.answer.SerializeToString())
            for h, a in sorted(checkpoint.allocations.items())
        ),
        {resource: tuple(sorted(ids)) for resource, ids in registered},
    )
    return msgspec.json.encode(_File(data, zlib.crc32(msgspec.json.encode(data))))


def take_checkpoint(untrusted_json: bytes) -> Checkpoint:
    """Nothing at all where the file is damaged: a kubelet says so in its log and goes on without."""
    try:
        file = msgspec.json.decode(untrusted_json, type=_File)
        if file.checksum != zlib.crc32(msgspec.json.encode(file.data)):
            return Checkpoint()
        allocations = {
            Holder(e.pod_uid, e.container_name, e.resource_name): Allocation(
                tuple(i for ids in e.device_ids.values() for i in ids),
                pb.ContainerAllocateResponse.FromString(e.alloc_resp),
            )
            for e in file.data.pod_device_entries
        }
    except (msgspec.DecodeError, UnicodeError, DecodeError):
        return Checkpoint()
    return Checkpoint(allocations, tuple(file.data.registered_devices))


def read_checkpoint(directory: Path) -> Checkpoint:
    """Of the device-plugin directory; empty where there is none. Blocking."""
    try:
        return take_checkpoint((directory / FILE).read_bytes())
    except FileNotFoundError:
        return Checkpoint()


def write_checkpoint(directory: Path, content: bytes) -> None:
    """Replace the file. Blocking."""
    fresh = directory / f".{FILE}"
    fresh.write_bytes(content)
    fresh.replace(directory / FILE)
