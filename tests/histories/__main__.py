"""The command line; see the package."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from dataclasses import asdict
from pathlib import Path

from tests.histories.run import Outcome, run, seeded, shrunk
from tests.histories.script import take

TOLD = 400


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.histories")
    parser.add_argument("seeds", nargs="*", type=int, help="first and number of seeds")
    parser.add_argument("--script", action="append", default=[], type=Path)
    parser.add_argument("--shrink", action="store_true")
    parser.add_argument("--story", action="store_true", help="tell it step by step")
    parser.add_argument("--json", action="store_true", help="an outcome a line")
    arguments = parser.parse_args()
    failed, began = 0, time.monotonic()
    total = 0
    for outcome in _outcomes(arguments):
        total += 1
        if outcome.violations and arguments.shrink:
            outcome = shrunk(outcome)
        failed += bool(outcome.violations)
        if arguments.json:
            print(
                json.dumps({k: v for k, v in asdict(outcome).items() if k != "lines" or outcome.violations}), flush=True
            )
        elif outcome.violations or arguments.story:
            _print(outcome, arguments.story)
    if not arguments.json:
        print(f"{failed} of {total} histories violate the model ({time.monotonic() - began:.1f} s)")
    return bool(failed)


def _outcomes(arguments: argparse.Namespace) -> list[Outcome] | object:
    for path in arguments.script:
        text = path.read_text()
        first = text.splitlines()[0].split()
        yield run(take(text), first[2] if first[:2] == ["#", "seed"] else "0")
    if arguments.seeds:
        first_seed, count = arguments.seeds[0], arguments.seeds[1] if len(arguments.seeds) > 1 else 1
        for seed in range(first_seed, first_seed + count):
            yield seeded(seed)


def _print(outcome: Outcome, story: bool) -> None:
    print(f"# seed {outcome.seed}\n{outcome.script}")
    for line in outcome.lines[-TOLD:] if story else outcome.violations:
        print(f"# {line}")
    print(f"# {outcome.lives} lives, {outcome.points} points, {outcome.virtual_s:.0f} s\n", flush=True)


if __name__ == "__main__":
    if os.environ.get("PYTHONHASHSEED") != "0":  # the order of sets is part of a history
        os.execve(
            sys.executable,
            [sys.executable, "-m", "tests.histories", *sys.argv[1:]],
            {**os.environ, "PYTHONHASHSEED": "0"},
        )
    sys.exit(main())
