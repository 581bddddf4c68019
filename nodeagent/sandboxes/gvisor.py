"""gVisor: the sandbox's mounts live in the mount namespace of its gofer, a sibling of the sentry in the same cgroup.

Seen with runsc 20221219 and 20240729: the runtime's pid is the sentry, whose own namespace is empty; the gofer's mountinfo
shows the bind mounts of the specification at their destinations (below its chroot, which is `/` to itself).
"""

from __future__ import annotations

from nodeagent.host import HostRoot
from nodeagent.sandboxes import runc

MAX_MEMBERS = 256
"""Processes of one sandbox that are looked at: gofer, sentry and stubs; the gofer is among the oldest."""


def mounted(host: HostRoot, pid: int, destination: str) -> str | None:
    """The root field of the mount at `destination` as the gofer of sentry `pid` has it; None when it cannot be told."""
    for member in _members(host, pid):
        arguments = host.attribute(f"/proc/{member}/cmdline").split("\0", 1)
        if "gofer" in arguments[0]:
            found = runc.mounted(host, member, destination)
            if found is not None:
                return found
    return None


def _members(host: HostRoot, pid: int) -> list[int]:
    """The processes in the cgroup of `pid`, oldest first, from the first hierarchy that has it to itself."""
    for line in host.attribute(f"/proc/{pid}/cgroup").splitlines():
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if path == "/":
            continue
        mount = "/sys/fs/cgroup" + (f"/{controllers}" if controllers and not controllers.startswith("name=") else "")
        text = host.attribute(f"{mount}{path}/cgroup.procs")
        members = sorted(int(word) for word in text.split() if word.isdigit())
        if pid in members:
            return members[:MAX_MEMBERS]
    return []
