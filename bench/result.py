"""One measured figure, in the shape of bench/results.json (docs/bench.md)."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Literal

import msgspec

T95 = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36, 9: 2.31, 10: 2.26}
"""Student's t, two-sided 95 %, by number of samples."""


class Result(msgspec.Struct, frozen=True, kw_only=True):
    """`ours` and `peer` are medians in `unit`, measured in the same run, interleaved; `ratio` is ours/peer."""

    name: str
    unit: str
    ours: float
    peer: float | None = None
    peer_name: str | None = None
    ratio: float | None = None
    better: Literal["higher", "lower"] = "lower"
    n: int = 1
    ci95: tuple[float, float] | None = None
    note: str = ""


def alone(
    name: str, unit: str, samples: Sequence[float], note: str = "", *, better: Literal["higher", "lower"] = "lower"
) -> Result:
    """A figure whose target is a plain number."""
    return Result(
        name=name,
        unit=unit,
        ours=_round(statistics.median(samples)),
        n=len(samples),
        ci95=interval(samples),
        note=note,
        better=better,
    )


def versus(
    name: str, unit: str, ours: Sequence[float], peer: Sequence[float], peer_name: str, note: str = ""
) -> Result:
    """Rates of ours and of the peer, pair by pair."""
    ratios = [a / b for a, b in zip(ours, peer, strict=True)]
    return Result(
        name=name, unit=unit, ours=_round(statistics.median(ours)), peer=_round(statistics.median(peer)), peer_name=peer_name,
        ratio=_round(statistics.median(ours) / statistics.median(peer)), better="higher", n=len(ours),
        ci95=interval(ratios), note=note,
    )  # fmt: skip


def interval(samples: Sequence[float]) -> tuple[float, float] | None:
    """The 95 % confidence interval of the mean; None for a single sample."""
    if len(samples) < 2:
        return None
    half = T95.get(len(samples), 1.96) * statistics.stdev(samples) / math.sqrt(len(samples))
    mean = statistics.fmean(samples)
    return _round(mean - half), _round(mean + half)


def percentile(samples: Sequence[float], share: float) -> float:
    return sorted(samples)[min(len(samples) - 1, math.ceil(share * len(samples)) - 1)]


def _round(value: float) -> float:
    return float(f"{value:.4g}")
