"""What every reading verb prints: a table for people, or the document itself as JSON or YAML.

Colour only on a terminal and without NO_COLOR (no-color.org). Names that come from devices and pods are shown without
their control characters, so that a device cannot write to the terminal of who looks at it.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
import unicodedata
from collections.abc import Callable, Sequence
from typing import Literal

import msgspec

from nodeagent.documents import Problem

Colour = Literal["red", "yellow", "green", "dim", "bold"]
_CODES: dict[Colour, str] = {"red": "31", "yellow": "33", "green": "32", "dim": "2", "bold": "1"}


class Paint:
    """Colours text, or leaves it alone."""

    def __init__(self, on: bool) -> None:
        self.on = on

    def __call__(self, text: str, colour: Colour | None) -> str:
        return f"\x1b[{_CODES[colour]}m{text}\x1b[0m" if self.on and colour and text else text

    @classmethod
    def for_stdout(cls) -> Paint:
        plain = os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb"
        return cls(not plain and sys.stdout is not None and sys.stdout.isatty())


class Cell(msgspec.Struct, frozen=True):
    """A cell with a colour."""

    text: str
    colour: Colour | None = None


def add_output(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "-o", "--output", choices=("table", "json", "yaml"), default="table", help="how to print (default table)"
    )


def emit(document: msgspec.Struct | bytes, output: str, table: Callable[[Paint], str]) -> None:
    """Print a document (a struct, or the JSON of a daemon) as it was asked for; `table` makes the text for people."""
    if output == "table":
        text = table(Paint.for_stdout())
    elif output == "json":
        raw = document if isinstance(document, bytes) else msgspec.json.encode(document)
        text = msgspec.json.format(raw, indent=2).decode()
    else:
        import yaml

        builtins = msgspec.json.decode(document) if isinstance(document, bytes) else msgspec.to_builtins(document)
        text = yaml.safe_dump(builtins, sort_keys=False, allow_unicode=True).rstrip("\n")
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def columns(heads: Sequence[str], rows: Sequence[Sequence[str | Cell]], paint: Paint) -> str:
    """A table with a head line; columns as wide as their widest cell, two spaces apart, empty cells as `-`."""
    cells = [[cell if isinstance(cell, Cell) else Cell(cell) for cell in row] for row in rows]
    shown = [[Cell(visible(cell.text) or "-", cell.colour) for cell in row] for row in cells]
    widths = [max(width(text) for text in (head, *(row[i].text for row in shown))) for i, head in enumerate(heads)]
    lines = [paint(_joined([Cell(head) for head in heads], widths, Paint(False)), "bold")]
    lines += [_joined(row, widths, paint) for row in shown]
    return "\n".join(lines)


def _joined(row: Sequence[Cell], widths: Sequence[int], paint: Paint) -> str:
    padded = [paint(c.text, c.colour) + " " * (w - width(c.text)) for c, w in zip(row, widths, strict=True)]
    return "  ".join(padded).rstrip()


def problem_lines(problems: Sequence[Problem], paint: Paint) -> list[str]:
    """Problems as a person reads them: what happened, and below it what to do."""
    lines = []
    for problem in problems:
        lines.append(f"{paint('!', 'yellow')} {visible(problem.message)}")
        if problem.hint:
            lines.append(f"  -> {visible(problem.hint)}")
    return lines


def visible(text: str) -> str:
    """`text` on one line and without control characters."""
    return text if text.isprintable() else "".join(c if c.isprintable() else "?" for c in text)


def width(text: str) -> int:
    """Columns on a terminal: East Asian wide characters take two (UAX 11), combining marks none."""
    return sum(0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)


def duration(seconds: float) -> str:
    """`45s`, `12m`, `3h20m`, `5d4h`."""
    whole = max(0, int(seconds))
    if whole < 120:
        return f"{whole}s"
    minutes, hours, days = whole // 60, whole // 3600, whole // 86400
    if hours < 2:
        return f"{minutes}m"
    if days < 2:
        return f"{hours}h{minutes % 60}m" if minutes % 60 else f"{hours}h"
    return f"{days}d{hours % 24}h" if hours % 24 else f"{days}d"


def since(moment_s: float) -> str:
    """How long ago a Unix time was; `-` for never."""
    return duration(time.time() - moment_s) if moment_s else "-"


def amount(count: int) -> str:
    """Bytes in binary units: `812`, `3.4K`, `1.2G`."""
    value = float(count)
    for unit in ("", "K", "M", "G"):
        if value < 1024:
            return f"{value:.0f}{unit}" if not unit or value >= 10 else f"{value:.1f}{unit}"
        value /= 1024
    return f"{value:.1f}T"
