"""runc and its like: processes of the host in their own mount namespace."""

from __future__ import annotations

from nodeagent.host import HostRoot

MAX_MOUNTINFO_BYTES = 1 << 20


def mounted(host: HostRoot, pid: int, destination: str) -> str | None:
    """The root field of the mount at `destination` in the namespace of `pid`; None when there is none or `pid` is gone."""
    try:
        with host.path(f"/proc/{pid}/mountinfo").open("rb") as file:
            text = file.read(MAX_MOUNTINFO_BYTES).decode(errors="replace")
    except OSError:
        return None
    found = None
    for line in text.splitlines():
        fields = line.split(" ", 6)
        # ID parent major:minor root mount-point options ...; the kernel writes a space as \040. The last mount on a path wins.
        if len(fields) > 5 and fields[4] == destination:
            found = fields[3]
    return found
