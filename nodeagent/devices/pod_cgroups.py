"""Which pods of this node have a cgroup: the second witness when the container runtime does not answer.

The kubelet makes one for each pod, `pod<uid>` by the cgroupfs driver and `...-pod<uid with _>.slice` by the systemd driver, some
levels below a root that distributions and nested clusters name as they like (kubepods, kubepods.slice, kubelet/kubepods).
"""

from __future__ import annotations

import os
import re

from nodeagent.host import HostRoot

ROOT = "/sys/fs/cgroup"
V1 = ("systemd", "memory", "pids", "cpu,cpuacct", "cpu")
"""Hierarchies of v1 that the kubelet puts pods in; the first that shows any is believed."""
POD = re.compile(r"(?:^|-)pod([0-9a-fA-F]{8}(?:[-_][0-9a-fA-F]{4}){3}[-_][0-9a-fA-F]{12}|[0-9a-f]{32})(?:\.slice)?$")
MAX_DEPTH = 6
MAX_DIRECTORIES = 20_000


def pods_with_cgroups(host: HostRoot) -> frozenset[str] | None:
    """Their uids, as the API server writes them; None when no cgroup of a pod can be found at all, which says nothing. Blocks."""
    for top in (ROOT, *(f"{ROOT}/{name}" for name in V1)):
        if found := _below(str(host.path(top))):
            return frozenset(found)
    return None


def _below(top: str) -> set[str]:
    found: set[str] = set()
    stack = [(top, 0)]
    looked = 0
    while stack and looked < MAX_DIRECTORIES:
        directory, depth = stack.pop()
        looked += 1
        try:
            with os.scandir(directory) as entries:
                names = [e.name for e in entries if e.is_dir(follow_symlinks=False)]
        except OSError:
            continue
        for name in names:
            if pod := POD.search(name):
                found.add(pod[1].replace("_", "-"))
            elif depth < MAX_DEPTH:
                stack.append((f"{directory}/{name}", depth + 1))
    return found
