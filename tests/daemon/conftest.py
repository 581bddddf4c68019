"""Fixtures of the daemon tests: gRPC's runtime, and one device-plugin server with a channel to it."""

from collections.abc import AsyncIterator
from pathlib import Path

import grpc.aio
import pytest

from nodeagent import rpc
from nodeagent.devices.plugin import PluginServer
from nodeagent.metrics import Metrics
from tests.fakes.allocator import FakeAllocator, resource
from tests.grpc_runtime import grpc_runtime

__all__ = ["grpc_runtime"]


@pytest.fixture
async def allocator() -> FakeAllocator:
    return FakeAllocator()


@pytest.fixture
async def server(short_tmp: Path, allocator: FakeAllocator, metrics: Metrics) -> AsyncIterator[PluginServer]:
    """Offers printers a and b, and c, which is unplugged."""
    async with PluginServer(resource(a=True, b=True, c=False), allocator, short_tmp, metrics) as running:
        yield running


@pytest.fixture
async def channel(server: PluginServer) -> AsyncIterator[grpc.aio.Channel]:
    async with rpc.channel(server.socket) as open_channel:
        yield open_channel
