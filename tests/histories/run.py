"""Run histories: each life of the daemon in a process of its own, one after the other, until the script is over."""

from __future__ import annotations

import asyncio  # noqa: F401 (loaded before the first fork)
import os
import pickle
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.histories import script as scripts
from tests.histories.life import Progress, live
from tests.histories.model import Book
from tests.histories.script import Script
from tests.histories.world import World

MAX_LIVES = 40
SHARED_MEMORY = Path("/dev/shm")


@dataclass(frozen=True)
class Outcome:
    """What came of one history. `lines` tell it step by step."""

    seed: str
    script: str
    violations: tuple[str, ...]
    lines: tuple[str, ...]
    lives: int
    points: int
    virtual_s: float


def run(script: Script, seed: str) -> Outcome:
    """One history with the delays of `seed`, in a fresh directory on a tmpfs (its inode numbers are not used twice)."""
    directory = Path(tempfile.mkdtemp(prefix="na-history-", dir=SHARED_MEMORY if SHARED_MEMORY.is_dir() else None))
    try:
        for name in ("state", "run", "host", "cdi"):
            (directory / name).mkdir()
        world = World(directory)
        progress = Progress(world, Book(world), script)
        over = False
        while not over and progress.lives < MAX_LIVES:
            progress, over = _one_life(progress, seed)
        world = progress.world
        return Outcome(
            seed, scripts.put(script), tuple(world.violations), tuple(world.lines), progress.lives, progress.points,
            world.now_s,
        )  # fmt: skip
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def _one_life(progress: Progress, seed: str) -> tuple[Progress, bool]:
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)

        def send() -> None:
            data = memoryview(pickle.dumps(progress))
            while data:
                data = data[os.write(writing, data) :]

        def kill() -> None:
            progress.world.tell("daemon: kill -9")
            send()
            os._exit(0)

        try:
            live(progress, seed, kill)
            send()
        finally:
            os._exit(1)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        data = pipe.read()
    os.waitpid(child, 0)
    if not data:
        progress.world.violated("the life of a daemon left nothing behind")
        return progress, True
    after: Progress = pickle.loads(data)
    over = (after.at >= len(after.script) and "* finally" in "".join(after.world.lines[-4000:])) or bool(
        after.world.violations
    )
    after.world.daemon_died()
    return after, over


def seeded(seed: int) -> Outcome:
    return run(scripts.make(seed), str(seed))


def shrunk(outcome: Outcome) -> Outcome:
    """The shortest script found that violates something as well, with the same delays."""

    def fails(script: Script) -> bool:
        return bool(run(script, outcome.seed).violations)

    return run(scripts.shrink(scripts.take(outcome.script), fails), outcome.seed)


def many(seeds: range) -> Iterator[Outcome]:
    for seed in seeds:
        yield seeded(seed)
