"""Sandboxes: where the far end of a seat lives and what it accepts. One file per kind that this version reaches."""

from __future__ import annotations

from collections.abc import Mapping

from nodeagent.host import HostRoot
from nodeagent.model import Container, Sandbox, SandboxKind
from nodeagent.sandboxes import gvisor, runc

REACHED: tuple[SandboxKind, ...] = ("runc", "gvisor")
"""Kinds whose desktops can be given a slot by a bind mount."""


LAUNCHER = ("kubevirt.io", "virt-launcher")
"""The label of a pod that is a virtual machine of KubeVirt's; the pod itself runs under runc."""


def kind_of(sandbox: Sandbox, named: Mapping[str, SandboxKind]) -> SandboxKind:
    """Where the desktop of a pod runs: by its RuntimeClass handler what the configuration says, else KubeVirt by the label of
    its launcher, else what the handler's name tells, else runc.

    The empty handler is the runtime's default, which on every supported runtime is runc or crun.
    """
    handler, (label, launcher) = sandbox.handler, LAUNCHER
    if handler in named:
        return named[handler]
    if sandbox.labels.get(label) == launcher:
        return "kubevirt"
    word = handler.lower()
    if "runsc" in word or "gvisor" in word:
        return "gvisor"
    if "kata" in word:
        return "kata"
    return "runc"


def mounted(host: HostRoot, kind: SandboxKind, container: Container, destination: str) -> str | None:
    """What a running container has mounted at `destination`: the root field of its mountinfo (proc_pid_mountinfo(5)).

    It ends in the name of the directory, and in `//deleted` once that directory is gone. None: cannot be told.
    """
    if not container.pid:
        return None
    if kind == "gvisor":
        return gvisor.mounted(host, container.pid, destination)
    return runc.mounted(host, container.pid, destination)
