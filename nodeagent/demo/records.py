"""What the stand-in runtime knows: sandboxes and containers, as CRI tells them."""

from __future__ import annotations

from collections.abc import Mapping
from enum import IntEnum
from typing import Any

import msgspec

from nodeagent.demo import oci
from nodeagent.model import PodRef


class State(IntEnum):
    """CRI's ContainerState, with its numbers."""

    CREATED = 0
    RUNNING = 1
    EXITED = 2


class SandboxRecord(msgspec.Struct, frozen=True, kw_only=True):
    id: str
    pod: PodRef
    labels: Mapping[str, str]
    handler: str
    ready: bool
    created_ns: int


class ContainerRecord(msgspec.Struct, frozen=True, kw_only=True):
    """A container now; times are Unix nanoseconds, 0 = not yet. `spec` is the OCI runtime spec it was made from."""

    id: str
    sandbox_id: str
    name: str
    attempt: int
    state: State
    created_ns: int
    mounts: tuple[oci.Mount, ...]
    spec: dict[str, Any]
    pid: int = 0
    started_ns: int = 0
    finished_ns: int = 0
    exit_code: int = 0
