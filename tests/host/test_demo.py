"""`make run ONCE=1` on this machine: the main job, with the real daemon, gVisor, cupsd and CUPS client."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from pathlib import Path

import pytest

from nodeagent.demo import scene

pytestmark = pytest.mark.root

STEPS = ["prepare", "inventory", "register", "allocate", "bind", "print", "isolation", "identity", "metrics", "release"]
LIMIT_S = 180


async def demo(*words: str) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "nodeagent", "demo", *words),
        cwd=Path(__file__).parents[2],
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        env=os.environ | {"NO_COLOR": "1"},
    )


def left_over() -> set[Path]:
    return set(Path("/tmp").glob(f"{scene.PREFIX}*"))


async def test_once(short_tmp: Path) -> None:
    before = left_over()
    process = await demo("--once", "--keep", str(short_tmp / "kept"))
    async with asyncio.timeout(LIMIT_S):
        out, _ = await process.communicate()
    text = out.decode()
    summary = json.loads(text.strip().splitlines()[-1])
    assert [s["name"] for s in summary["steps"]] == STEPS, text
    assert [(s["name"], s["detail"]) for s in summary["steps"] if not s["ok"]] == [], text
    assert summary["schema"] == "nodeagent.demo/v1"
    assert summary["ok"] is True
    assert process.returncode == 0
    assert (short_tmp / "kept" / "nodeagent.log").stat().st_size
    assert left_over() <= before


async def test_ctrl_c_takes_everything_down() -> None:
    before = left_over()
    process = await demo()
    assert process.stdout is not None
    said = []
    async with asyncio.timeout(LIMIT_S):
        while line := (await process.stdout.readline()).decode():
            said.append(line)
            if "Ctrl-C ends everything" in line:
                process.send_signal(signal.SIGINT)
        await process.wait()
    text = "".join(said)
    assert process.returncode == 0, text
    assert "release" in said[-1] or "release" in text
    assert left_over() <= before


async def test_a_signal_in_the_middle_takes_everything_down() -> None:
    before = left_over()
    process = await demo("--once")
    assert process.stdout is not None
    said = []
    async with asyncio.timeout(LIMIT_S):
        while line := (await process.stdout.readline()).decode():
            said.append(line)
            if len(said) == 1:
                process.send_signal(signal.SIGTERM)
        await process.wait()
    summary = json.loads(said[-1])
    assert process.returncode == 3
    assert summary["ok"] is False
    assert not all(step["ok"] for step in summary["steps"])
    assert left_over() <= before
