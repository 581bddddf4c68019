"""Orphans that come to the daemon when it is process 1 of its container.

Whatever outlives its parent there becomes a child of the daemon: what an external command left running, what was started by
`kubectl exec`. Once dead they must be reaped by us. The daemon's own children must not be: asyncio has a thread in waitpid
for each and would lose the exit status.
"""

from __future__ import annotations

import os


class Strays:
    """Reaps a dead child that was dead at the last look too: asyncio reaps its own within milliseconds.

    Call `sweep` every second or so. It does not block, costs two system calls and reaps at most one a call, since the kernel
    shows the same dead child (WNOWAIT, waitid(2)) until it is reaped.
    """

    def __init__(self) -> None:
        self._seen = 0

    def sweep(self) -> int:
        """The pid that was reaped, or 0."""
        reaped = 0
        dead = self._peek()
        if dead and dead == self._seen:
            reaped, _ = os.waitpid(dead, os.WNOHANG)
            dead = self._peek()
        self._seen = dead
        return reaped

    @staticmethod
    def _peek() -> int:
        try:
            found = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        except ChildProcessError:
            return 0
        return found.si_pid if found else 0
