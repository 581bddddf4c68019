"""`make run ONCE=1` again and again (make soak MINUTES=n, as root). Totals accumulate in bench/long.json.

A round that fails, or that leaves a process, a mount or a cgroup on the machine, is a failure; its output is kept in
bench/finds/ and the soak goes on. Exit code 1 when there was one.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

from tests import leftovers
from tests.fuzz import FINDS, ROOT, TOTALS, add_totals

ROUND_S = 600


def one_round() -> tuple[bool, str, str]:
    """Whether all went well, one line about it, and everything that was printed."""
    before = leftovers.Snapshot.take()
    command = [sys.executable, "-m", "nodeagent", "demo", "--once"]
    try:
        ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=ROUND_S, check=False)
        printed, code = ran.stdout + ran.stderr, ran.returncode
        summary = json.loads(ran.stdout.splitlines()[-1]) if ran.stdout else {"steps": []}
        bad = [step["name"] for step in summary["steps"] if not step["ok"]]
        line = f"failed: {', '.join(bad) or 'exit ' + str(code)}" if code else f"{len(summary['steps'])} steps"
    except (subprocess.TimeoutExpired, ValueError, KeyError) as error:
        printed, code, line = str(error), 1, f"no summary: {type(error).__name__}"
    left = leftovers.leftovers(before)
    return code == 0 and not left, line + (f"; left behind: {'; '.join(left)}" if left else ""), printed


def main() -> int:
    parser = argparse.ArgumentParser(description="the demo, again and again")
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--totals", type=Path, default=TOTALS)
    args = parser.parse_args()
    leftovers.announce()
    leftovers.watch_children()
    end = time.monotonic() + args.minutes * 60
    failures = 0
    while time.monotonic() < end:
        begun = time.monotonic()
        fine, line, printed = one_round()
        failures += not fine
        total = add_totals(
            args.totals, "rounds", {"soak_rounds": 1, "soak_failures": int(not fine)}, "whole demo rounds"
        )
        print(f"{total['soak_rounds']:>6.0f}  {time.monotonic() - begun:5.1f} s  {line}", flush=True)
        if not fine:
            FINDS.mkdir(exist_ok=True)
            (FINDS / f"soak-{time.time():.0f}.log").write_text(f"{line}\n\n{printed}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
