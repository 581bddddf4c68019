"""1,000 random histories of plug, unplug, allocate, bind, release, restart and kill at any instruction, against a model."""

from __future__ import annotations

import asyncio
import re
import sys

from bench.result import Result, alone

HISTORIES = 1000


async def measure() -> list[Result]:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "tests.histories", "0", str(HISTORIES), stdout=asyncio.subprocess.PIPE
    )
    out, _ = await process.communicate()
    found = re.search(rb"([0-9]+) of ([0-9]+) histories violate the model", out)
    assert found is not None, out[-2000:]
    note = f"histories with a violation, of {int(found[2])}, each with crashes; tests/histories says what is checked"
    return [alone("crash_history_violations", "histories", [int(found[1])], note)]
