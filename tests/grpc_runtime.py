"""gRPC for tests that need it. Not for unit tests: a process that gRPC runs in cannot fork safely, and some of them do."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Iterator
from pathlib import Path

import grpc.aio
import pytest

from nodeagent import rpc


@pytest.fixture(scope="session", autouse=True)
def grpc_runtime() -> Iterator[None]:
    """gRPC's event engine and its poller (a thread, an epoll, a socket pair) belong to the process: they are made before the
    first test counts descriptors, and held so that they do not come and go with the last channel of each test."""
    held = grpc.insecure_channel("unix:/nowhere")  # an event engine lives as long as some channel does

    async def warm_up(socket: Path) -> None:
        grpc.aio.init_grpc_aio()  # type: ignore[attr-defined]
        server = grpc.aio.server()
        server.add_insecure_port(f"unix:{socket}")
        await server.start()
        async with rpc.channel(socket) as channel:
            await channel.channel_ready()
        await server.stop(None)

    with tempfile.TemporaryDirectory() as directory:
        asyncio.run(warm_up(Path(directory) / "s"))
    yield
    held.close()
    grpc.aio.shutdown_grpc_aio()  # type: ignore[attr-defined]
