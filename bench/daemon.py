"""The daemon with 50 seats: how quick it starts and allocates, and what it costs in memory."""

from __future__ import annotations

import asyncio
import statistics
import time
from pathlib import Path

from bench.node import PRINTER, Node, node
from bench.result import Result, alone, percentile

SEATS = 50
STARTS = 7
ALLOCATES = 400


async def measure() -> list[Result]:
    results = []
    async with node(SEATS + 14) as made:
        starts = []
        for _ in range(STARTS):
            starts.append(await made.start())
            await made.stop()
        results.append(alone("start_to_registered_s", "s", starts, "process start to the kubelet's answer to Register"))
        await made.start()
        for number in range(SEATS):
            await made.run_pod(f"desk-{number}")
        await asyncio.sleep(3)
        results.append(await _allocate(made))
        assert made.process is not None
        results.append(
            alone(
                "daemon_rss_mib",
                "MiB",
                [_rss_mib(made.process.pid)],
                f"VmRSS of the root daemon with {SEATS} seats bound",
            )
        )
        unique = [_unique_mib(pid) for pid in _workers(made.process.pid)]
        assert len(unique) == SEATS, f"{len(unique)} workers for {SEATS} seats"
        results.append(
            alone("seat_worker_unique_mib", "MiB", unique, "Private_Clean + Private_Dirty of an idle seat's worker")
        )
    return results


async def _allocate(made: Node) -> Result:
    """Allocate of ids nobody holds, one after the other, through the plugin's own socket."""
    endpoint = made.kubelet.endpoints[PRINTER]
    used = {i for p in made.kubelet.pods.values() for i in made.kubelet.held(p, "desktop", PRINTER)}
    free = sorted(endpoint.healthy - used)
    samples = []
    for number in range(ALLOCATES):
        began = time.perf_counter()
        await endpoint.allocate((free[number % len(free)],))
        samples.append((time.perf_counter() - began) * 1000)
    note = f"p99 of {ALLOCATES} calls over a Unix socket, {SEATS} seats present; median {statistics.median(samples):.2f} ms"
    return alone("allocate_p99_ms", "ms", [percentile(samples, 0.99)], note)


def _rss_mib(pid: int) -> float:
    return _kib(Path(f"/proc/{pid}/status"), "VmRSS:") / 1024


def _unique_mib(pid: int) -> float:
    rollup = Path(f"/proc/{pid}/smaps_rollup")
    return (_kib(rollup, "Private_Clean:") + _kib(rollup, "Private_Dirty:")) / 1024


def _kib(path: Path, key: str) -> int:
    return next(int(line.split()[1]) for line in path.read_text().splitlines() if line.startswith(key))


def _workers(daemon: int) -> list[int]:
    """The grandchildren of the daemon that run as a seat's uid."""
    zygotes = Path(f"/proc/{daemon}/task/{daemon}/children").read_text().split()
    children = [int(c) for z in zygotes for c in Path(f"/proc/{z}/task/{z}/children").read_text().split()]
    return [pid for pid in children if _kib(Path(f"/proc/{pid}/status"), "Uid:") >= 0x7000_0000]
