"""A kubelet's directory with a registrar beside it, and ways to wait for what they do."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from pathlib import Path

from nodeagent.demo.kubelet import StandInKubelet
from nodeagent.devices.kubelet import Pace, Registrar
from nodeagent.devices.podresources import PodResources
from nodeagent.metrics import Metrics
from tests.fakes.allocator import FakeAllocator

PRINTERS, KEYS = "opencdi.io/printer", "opencdi.io/ukey"
QUICK = Pace(look=0.05, register=0.5, stream=0.5, unwatched=0.3, race=0.4, back_off=(0.1, 0.2))


class Node:
    """A kubelet's directory with a registrar beside it."""

    def __init__(self, root: Path, metrics: Metrics) -> None:
        self.directory = root / "dp"
        self.directory.mkdir()
        self.pod_resources = root / "pr" / "kubelet.sock"
        self.metrics = metrics
        self.allocator = FakeAllocator()
        self.stack = contextlib.AsyncExitStack()
        self.kubelet = StandInKubelet(self.directory, self.pod_resources)
        self.registrar: Registrar
        """For tests that keep theirs here."""

    async def start_kubelet(self) -> StandInKubelet:
        return await self.stack.enter_async_context(self.kubelet)

    async def start_registrar(self, pace: Pace = QUICK) -> Registrar:
        client = await self.stack.enter_async_context(PodResources(self.pod_resources, timeout_s=0.5))
        registrar = Registrar(self.directory, self.allocator, client, self.metrics, pace=pace, jitter=lambda: 0.5)
        await self.stack.enter_async_context(running(registrar))
        return registrar

    @property
    def sockets(self) -> list[str]:
        return sorted(p.name for p in self.directory.iterdir() if p.name.startswith("nodeagent-"))

    def registered_count(self, name: str = PRINTERS) -> int:
        return int(self.metrics.registry.get_sample_value("nodeagent_registrations_total", {"resource": name}) or 0)


@contextlib.asynccontextmanager
async def running(registrar: Registrar) -> AsyncIterator[None]:
    task = asyncio.create_task(registrar.run())
    try:
        yield
        assert not task.done(), "run() lives until it is cancelled"
    finally:
        task.cancel()
        await asyncio.wait({task})


async def until(condition: Callable[[], bool], timeout_s: float = 10) -> float:
    """Wait for a condition; returns how long that took."""
    clock = asyncio.get_running_loop().time
    started_s = clock()
    async with asyncio.timeout(timeout_s):
        while not condition():
            await asyncio.sleep(0.01)
    return clock() - started_s


async def is_registered(registrar: Registrar) -> None:
    async with asyncio.timeout(10):
        await registrar.registered.wait()
