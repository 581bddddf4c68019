"""Device nodes of a container that runs already: `revoke` when a device is unplugged, `grant` when it is back.

A device that comes back has other numbers (a USB device always: /dev/bus/usb/001/005 is 006 then), and the number that it had
is given to the next device that comes. So what a container was given at its start becomes useless at a replug, and dangerous:
c 189:4 may be a stranger's device. hidraw, lp, sg and ttyUSB numbers are given out again lowest first, at once; those of USB
devices after 127 others of the same bus.

For runc and its like; both functions block for some milliseconds (a thread's work), and both may be asked again at any time,
which costs a few reads when nothing is missing. They are asked again because permissions do not stay as they are set
(device_cgroup.py). A descriptor that a process has open is not taken away by `revoke`: unplugging does that.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

import msgspec

from nodeagent.errors import AgentError, Reason
from nodeagent.host import HostRoot
from nodeagent.model import Container, DeviceNode
from nodeagent.sandboxes import device_cgroup
from nodeagent.sandboxes.container_dev import (
    MAX_MOUNTINFO_BYTES,
    ContainerDev,
    HostNode,
    container_dev,
    host_node,
    words,
)
from nodeagent.sandboxes.device_cgroup import DeviceCgroups
from nodeagent.sandboxes.device_program import START_ANEW, DeviceNumbers, Rule

T = TypeVar("T")
U = TypeVar("U")

log = logging.getLogger(__name__)

MAX_NODES = 64
"""Of one call; a device with many interfaces has about ten."""


def numbers_of(node: DeviceNode) -> DeviceNumbers:
    """What a device cgroup knows of a node."""
    return DeviceNumbers(node.kind, node.major, node.minor)


def revoke(host: HostRoot, container: Container, nodes: Sequence[DeviceNode]) -> None:
    """Take devices away from a running container: first the permission, then the node at its path if it still is this device.

    Nothing happens to a container that has ended. A node that cannot be removed (mounted from the host, moved by the tenant)
    is left: without the permission it opens nothing. Raises AgentError when the permission could not be taken, and then the
    container must not go on: NOT_SUPPORTED (a kernel that does not let programs be exchanged, no cgroup named after the
    container), MALFORMED, TOO_MANY.
    """
    _check(nodes)
    with contextlib.suppress(FileNotFoundError, ProcessLookupError), _opened(host, container) as process:
        device_cgroup.change(process.cgroups, [Rule(numbers_of(node), allowed=False) for node in nodes])
        if process.user_namespace != _user_namespace():
            return  # its nodes are mounts of the host's; to look at a tree that a user namespace mounted is to wait for it
        try:
            with container_dev(host, process.root_fd, process.mountinfo) as dev:
                _, failures = _each(nodes, lambda node: dev.remove(node.path, numbers_of(node)))
        except AgentError as error:
            failures = [error]
        for failure in failures:
            log.info("container %s keeps a node that it cannot open: %s", container.id[:12], failure.message)


def grant(host: HostRoot, container: Container, nodes: Sequence[DeviceNode]) -> None:
    """Give devices to a running container: permission to read and write, and a node at the path that the host has it at, with
    the host's owner and mode. Whole or not at all for each node; those that can be given are, also when others fail.

    Raises AgentError with the reason of the first that failed: NOT_RUNNING (the container has ended), DEVICE_UNPLUGGED (the
    host's node is another device or gone), NOT_SUPPORTED (a user namespace of its own, a /dev that takes no nodes, another
    file at the path, a cgroup or a kernel that refuses), MALFORMED, TOO_MANY.
    """
    _check(nodes)
    try:
        with _opened(host, container) as process:
            if process.user_namespace != _user_namespace():
                raise AgentError(
                    Reason.NOT_SUPPORTED,
                    f"container {container.id[:12]} is in a user namespace (hostUsers: false): nodes made in it open nothing",
                    hint=f"give the device as a service, or {START_ANEW}",
                )
            with container_dev(host, process.root_fd, process.mountinfo) as dev:
                failures = _grant(host, process.cgroups, dev, nodes)
    except (FileNotFoundError, ProcessLookupError) as error:
        raise AgentError(Reason.NOT_RUNNING, f"container {container.id[:12]} has ended") from error
    if failures:
        raise AgentError(failures[0].reason, "; ".join(f.message for f in failures), hint=failures[0].hint)


def _grant(host: HostRoot, cgroups: DeviceCgroups, dev: ContainerDev, nodes: Sequence[DeviceNode]) -> list[AgentError]:
    found, failures = _each(nodes, lambda node: host_node(host, node.path, numbers_of(node)))
    held, obstacles = _each(found, lambda node: (node, dev.holds(node)))
    missing = [node for node, there in held if not there]
    try:
        # The permission first: a program that waits for the node opens it as soon as it is there.
        device_cgroup.change(cgroups, [Rule(node.numbers, allowed=True) for node, _ in held])
    except AgentError:
        with contextlib.suppress(AgentError):
            device_cgroup.change(cgroups, [Rule(node.numbers, allowed=False) for node in missing])
        raise
    made, refusals = _each(missing, lambda node: _made(dev, node))
    without = {node.numbers for node in missing} - {n.numbers for n in made}
    with_node = {node.numbers for node, there in held if there} | {n.numbers for n in made}
    device_cgroup.change(cgroups, [Rule(numbers, allowed=False) for numbers in sorted(without - with_node)])
    return [*failures, *obstacles, *refusals]


def _made(dev: ContainerDev, node: HostNode) -> HostNode:
    dev.make(node)
    return node


def _each(values: Sequence[T], act: Callable[[T], U]) -> tuple[list[U], list[AgentError]]:
    """What `act` says of each value, and the refusals."""
    results, failures = [], []
    for value in values:
        try:
            results.append(act(value))
        except AgentError as error:
            failures.append(error)
    return results, failures


def _check(nodes: Sequence[DeviceNode]) -> None:
    if len(nodes) > MAX_NODES:
        raise AgentError(Reason.TOO_MANY, f"{len(nodes)} device nodes at once, at most {MAX_NODES}")
    for node in nodes:
        words(node.path)


class _Process(msgspec.Struct, frozen=True):
    """The first process of a container, looked at through one descriptor of its /proc directory: that never means another
    process which has got its number."""

    root_fd: int
    cgroups: DeviceCgroups
    mountinfo: bytes
    user_namespace: str


@contextlib.contextmanager
def _opened(host: HostRoot, container: Container) -> Iterator[_Process]:
    """Raises FileNotFoundError or ProcessLookupError when the process has ended, AgentError when it cannot be told."""
    if not container.pid:
        raise AgentError(
            Reason.NOT_SUPPORTED,
            f"the runtime does not tell the process of container {container.id[:12]}",
            hint=START_ANEW,
        )
    with contextlib.ExitStack() as stack:
        proc_fd = os.open(host.path(f"/proc/{container.pid}"), os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        stack.callback(os.close, proc_fd)
        root_fd = os.open("root", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=proc_fd)  # a zombie has none
        stack.callback(os.close, root_fd)
        # The id in the cgroup's name also tells that the number was not another process's from the start.
        cgroups = device_cgroup.find(host, container.id, _read(proc_fd, "cgroup").decode(errors="replace"))
        yield _Process(root_fd, cgroups, _read(proc_fd, "mountinfo"), os.readlink("ns/user", dir_fd=proc_fd))


def _read(proc_fd: int, name: str) -> bytes:
    with open(os.open(name, os.O_RDONLY | os.O_CLOEXEC, dir_fd=proc_fd), "rb") as file:
        return file.read(MAX_MOUNTINFO_BYTES + 1)


def _user_namespace() -> str:
    """Our own, which must be the first one for mknod(2) anyway, as /proc shows it: `user:[4026531837]`."""
    return str(Path("/proc/self/ns/user").readlink())
