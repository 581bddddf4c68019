"""A 50 MB job: through a seat's filter and spool, against the same job straight into the same kind of cupsd."""

from __future__ import annotations

import asyncio
import os
import time
from pathlib import Path

from bench.node import Node, node
from bench.result import Result, versus

SIZE = 50_000_000
PAIRS = 11


async def measure() -> list[Result]:
    async with node(2) as made:
        await made.start()
        desk = await made.run_pod("desk")
        device = made.kubelet.held(desk, "desktop", "opencdi.io/printer")[0]
        document = made.directory / "job.ps"
        document.write_bytes(b"%!PS-Adobe-3.0\n" + os.urandom(SIZE - 15))
        ours, straight = [], []
        slot, cupsd = made.slot(desk) / "ipp.sock", made.directory / "run/cups/cups.sock"
        await _print(made, slot, device, document)
        for _ in range(PAIRS):
            ours.append(await _print(made, slot, device, document))
            straight.append(await _print(made, cupsd, device, document, "-o", "raw"))
    note = "lp to the last byte at the simulated printer, 50 MB of PostScript it speaks itself; straight = the agent's own cupsd"
    return [versus("print_throughput", "MB/s", ours, straight, "lp straight into cupsd", note)]


async def _print(made: Node, server: Path, printer: str, document: Path, *options: str) -> float:
    """MB/s from the start of `lp` until the printer has every byte."""
    outputs = (made.output("P0"), made.output("P1"))
    before = sum(p.stat().st_size for p in outputs if p.exists())
    began = time.perf_counter()
    process = await asyncio.create_subprocess_exec(
        "lp", "-d", printer, *options, str(document), env={**os.environ, "CUPS_SERVER": str(server)},
        stdout=asyncio.subprocess.DEVNULL,
    )  # fmt: skip
    assert await process.wait() == 0, f"lp through {server} failed"
    while sum(p.stat().st_size for p in outputs if p.exists()) < before + SIZE:
        await asyncio.sleep(0.005)
        assert time.perf_counter() - began < 60, f"the job through {server} never arrived"
    took = time.perf_counter() - began
    for path in outputs:
        if path.exists():
            os.truncate(path, 0)
    await asyncio.sleep(0.3)  # the queue goes back to idle
    return SIZE / 1e6 / took
