"""Random histories of devices, pods and crashes against a model; `python -m tests.histories SEED COUNT --shrink` replays one."""

import subprocess
import sys
from pathlib import Path

HISTORIES = 80


def test_no_history_violates_the_model() -> None:
    """In a process of their own: each crash abandons a life without ending anything."""
    command = [sys.executable, "-m", "tests.histories", "0", str(HISTORIES)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert f"0 of {HISTORIES} histories violate the model" in done.stdout
