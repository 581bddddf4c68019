"""Reaping orphans without stealing exits from asyncio. In a process of its own: other tests have children too."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

SCRIPT = """
import asyncio, ctypes, os
from nodeagent.seats.strays import Strays

async def main():
    strays = Strays()
    assert strays.sweep() == 0
    # Two orphans: their parent, the shell, is gone when they end.
    shell = await asyncio.create_subprocess_exec("sh", "-c", "(exec sleep 0.3) & (exec sleep 0.3) & exit 0")
    assert await shell.wait() == 0
    reaped = set()
    async with asyncio.timeout(10):
        while len(reaped) < 2:
            # Meanwhile asyncio's own children end and keep their exit status.
            own = [await asyncio.create_subprocess_exec("sh", "-c", "exit 7") for _ in range(5)]
            reaped.add(strays.sweep())
            assert [await child.wait() for child in own] == [7] * 5
            reaped = {*reaped, strays.sweep()} - {0}
            assert not reaped & {shell.pid, *(child.pid for child in own)}
    assert strays.sweep() == 0

ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER: orphans come to us, as to process 1
asyncio.run(main())
"""


def test_orphans_are_reaped_and_asyncio_keeps_its_exits() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], cwd=ROOT, capture_output=True, text=True, timeout=30)
    assert (done.returncode, done.stderr) == (0, "")
