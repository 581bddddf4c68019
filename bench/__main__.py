"""Measure, print a table for people, write bench/results.json for machines.

python -m bench [NAME ...]     all figures, or those of the named files
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

import msgspec

from bench import daemon, histories, hotplug, printing, recordings
from bench.result import Result

RESULTS = Path(__file__).with_name("results.json")
PARTS = {
    "daemon": daemon.measure,
    "printing": printing.measure,
    "hotplug": hotplug.measure,
    "histories": histories.measure,
    "recordings": recordings.measure,
}


def main() -> int:
    names = sys.argv[1:] or list(PARTS)
    known = (
        {r.name: r for r in msgspec.json.decode(RESULTS.read_bytes(), type=list[Result])} if RESULTS.exists() else {}
    )
    for name in names:
        if name not in PARTS:
            print(f"bench: there is no {name}; one of {', '.join(PARTS)}", file=sys.stderr)
            return 1
        for result in asyncio.run(PARTS[name]()):
            known[result.name] = result
            peer = f"  {result.peer_name} {result.peer:g}, ratio {result.ratio:g}" if result.peer is not None else ""
            print(
                f"{result.name:28} {result.ours:>10g} {result.unit:8}{peer}  n={result.n} {result.ci95 or ''} {result.note}",
                flush=True,
            )
    RESULTS.write_bytes(msgspec.json.format(msgspec.json.encode(list(known.values())), indent=1) + b"\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
