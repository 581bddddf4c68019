"""What host and guest say to each other about the node in the guest: one request or one event a line, as JSON."""

from __future__ import annotations

import msgspec

from nodeagent.demo.pods import PodSpec, RunOptions

PORT = "node"
LOG = "daemon"
CONFIG = "/etc/nodeagent/config.yaml"


class Request(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Base of what the host asks for."""


class StartDaemon(Request, frozen=True):
    """`python3 -m nodeagent run`, with this configuration file at CONFIG."""

    config: str


class StopDaemon(Request, frozen=True):
    """TERM, or KILL; answered when it has ended."""

    kill: bool = False


class RunPod(Request, frozen=True):
    """Admit and start a pod; answered with what its first container received, or with why it was rejected."""

    pod: PodSpec


class EndPod(Request, frozen=True):
    pod: PodSpec


class Exec(Request, frozen=True):
    """One more program in a container of a pod, as the container's user."""

    pod: PodSpec
    container: str
    argv: tuple[str, ...]
    stdin: bytes = b""
    timeout_s: float = 60.0


class RestartKubelet(Request, frozen=True):
    api_away: bool = False


AnyRequest = StartDaemon | StopDaemon | RunPod | EndPod | Exec | RestartKubelet


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    """`error` is empty when all went well. `options` after RunPod; the rest after Exec."""

    error: str = ""
    options: RunOptions = RunOptions()
    held: dict[str, tuple[str, ...]] = {}
    """Resource -> the ids the kubelet chose."""
    code: int = 0
    stdout: str = ""
    stderr: str = ""


class Event(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Base of what the guest tells by itself. `at_s` is the guest's monotonic clock."""

    at_s: float


class Lists(Event, frozen=True):
    """What the kubelet knows from ListAndWatch: resource -> id -> healthy. Told after each change."""

    lists: dict[str, dict[str, bool]]
    connected: tuple[str, ...]


class Uevent(Event, frozen=True):
    """The kernel told of a device on a USB bus (the moment at which we had it from netlink)."""

    action: str
    path: str
    subsystem: str
    devtype: str = ""


class DaemonEnded(Event, frozen=True):
    code: int


AnyEvent = Lists | Uevent | DaemonEnded
