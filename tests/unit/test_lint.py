"""Formatting, lint and types are tests too (`make check` runs them first, by themselves)."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("command", "remedy"),
    [
        (["ruff", "format", "--check", "--quiet", "."], "ruff format ."),
        (["ruff", "check", "--quiet", "."], "ruff check --fix ."),
        (["mypy"], "mypy says what it expects"),
    ],
    ids=["format", "lint", "types"],
)
def test_lint(command: list[str], remedy: str) -> None:
    ran = subprocess.run([sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, f"\n{ran.stdout}{ran.stderr}\n-> {remedy}"
