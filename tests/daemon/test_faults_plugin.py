"""The device-plugin server against a kubelet that asks for anything: each request has its answer or its refusal."""

from __future__ import annotations

import asyncio
import contextlib
import time
from pathlib import Path

import grpc
import grpc.aio
import pytest

from nodeagent import rpc
from nodeagent.devices import plugin
from nodeagent.devices.plugin import PluginServer
from nodeagent.metrics import Metrics
from nodeagent.model import Audience, Device, DeviceClass, Grant, Offer, Resource, UsbDevice
from nodeagent.wire.pb.deviceplugin.v1beta1 import api_pb2 as pb
from tests.fakes.allocator import FakeAllocator, resource
from tests.fakes.scripted_kubelet import GARBAGE, METHOD, PREFACE, allocate, raw, refusal

PRINTERS = "opencdi.io/printer"
GRPC_DEFAULT_RECEIVE_BYTES = 4 << 20
"""What the kubelet's client of a plugin takes in one message (google.golang.org/grpc, defaultClientMaxReceiveMessageSize)."""


async def works(channel: grpc.aio.Channel) -> None:
    assert len((await allocate(channel, ["printer-a"])).container_responses) == 1


async def test_one_allocate_again_and_again(channel: grpc.aio.Channel, allocator: FakeAllocator) -> None:
    """Init and app container, or a pod that follows 0.1 s after another: each time it is granted, and each time alike."""
    answers = [await allocate(channel, ["printer-a"]) for _ in range(3)]
    answers += await asyncio.gather(*(allocate(channel, ["printer-a"]) for _ in range(50)))
    assert len({a.SerializeToString(deterministic=True) for a in answers}) == 1
    assert len(allocator.allocated) == 53


async def test_several_containers_in_one_request_are_answered_in_their_order(
    channel: grpc.aio.Channel, allocator: FakeAllocator
) -> None:
    answer = await allocate(channel, ["printer-a"], ["printer-b"], ["printer-a"])
    assert [r.envs["OPENCDI_PRINTER"] for r in answer.container_responses] == ["printer-a", "printer-b", "printer-a"]
    assert (await allocate(channel)).container_responses == []
    many = await allocate(channel, *([["printer-a"]] * 1000))
    assert len(many.container_responses) == 1000


NOT_FOUND, MALFORMED = grpc.StatusCode.NOT_FOUND, grpc.StatusCode.INVALID_ARGUMENT
ABSURD = {
    "unknown": (["printer-zzz"], NOT_FOUND),
    "one of two unknown": (["printer-a", "printer-zzz"], NOT_FOUND),
    "unplugged": (["printer-c"], grpc.StatusCode.FAILED_PRECONDITION),
    "none": ([], MALFORMED),
    "twice": (["printer-a", "printer-a"], MALFORMED),
    "empty": ([""], MALFORMED),
    "long": (["p" * 64], MALFORMED),
    "very long": (["p" * 1_000_000], MALFORMED),
    "path": (["../../../etc/passwd"], NOT_FOUND),
    "zero byte": (["printer-a\x00"], NOT_FOUND),
    "escape": (["\x1b[2J\u202e"], NOT_FOUND),
    "format": (["{0.__class__}%s%n"], NOT_FOUND),
    "10,000 ids": ([f"printer-{n}" for n in range(10_000)], grpc.StatusCode.RESOURCE_EXHAUSTED),
}


@pytest.mark.parametrize(("ids", "code"), ABSURD.values(), ids=ABSURD)
async def test_absurd_ids_are_refused_in_a_sentence(
    channel: grpc.aio.Channel, allocator: FakeAllocator, ids: list[str], code: grpc.StatusCode
) -> None:
    was, sentence = await refusal(allocate(channel, ids))
    assert was is code
    assert 0 < len(sentence) <= plugin.MAX_DETAILS
    assert allocator.allocated == []
    await works(channel)


@pytest.mark.parametrize(
    "method", ["Allocate", "PreStartContainer", "GetDevicePluginOptions", "GetPreferredAllocation"]
)
async def test_bytes_that_are_no_request_are_refused(channel: grpc.aio.Channel, method: str) -> None:
    with contextlib.suppress(grpc.aio.AioRpcError):
        await raw(channel, METHOD + method, GARBAGE)
    await works(channel)


@pytest.mark.parametrize(
    "path", [METHOD + "NoSuchMethod", METHOD, "/v1alpha1.DevicePlugin/Allocate", "/v1beta1.Registration/Register", "/a"]
)
async def test_methods_that_are_not_there(channel: grpc.aio.Channel, path: str) -> None:
    code, _ = await refusal(raw(channel, path, b""))
    assert code is grpc.StatusCode.UNIMPLEMENTED
    await works(channel)


async def test_a_request_beyond_the_limit_is_refused_before_it_is_read(channel: grpc.aio.Channel) -> None:
    code, _ = await refusal(raw(channel, METHOD + "Allocate", bytes(rpc.MAX_MESSAGE_BYTES + 1)))
    assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
    await works(channel)


@pytest.mark.parametrize(
    "said",
    [b"", b"GET / HTTP/1.1\r\n\r\n", bytes(5000), PREFACE, PREFACE + b"\xff" * 5000, b"\x16\x03\x01" + bytes(300)],
)
async def test_connections_that_speak_no_grpc(server: PluginServer, channel: grpc.aio.Channel, said: bytes) -> None:
    writers = []
    for _ in range(20):
        _, writer = await asyncio.open_unix_connection(server.socket)
        writer.write(said)
        writers.append(writer)
    await works(channel)
    for writer in writers:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()
    await works(channel)


async def test_more_requests_than_are_served_at_once_are_refused_at_once(
    channel: grpc.aio.Channel, allocator: FakeAllocator
) -> None:
    allocator.free.clear()
    limit = plugin.MAX_CONCURRENT_REQUESTS
    asked = [asyncio.create_task(allocate(channel, ["printer-a"], timeout_s=20)) for _ in range(limit + 50)]
    async with asyncio.timeout(10):
        while sum(t.done() for t in asked) < 50:
            await asyncio.sleep(0.01)
    allocator.free.set()
    done = await asyncio.gather(*asked, return_exceptions=True)
    refused = [e for e in done if isinstance(e, grpc.aio.AioRpcError)]
    assert {e.code() for e in refused} <= {grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.DEADLINE_EXCEEDED}
    assert len(refused) >= 50
    await works(channel)


async def test_a_reader_that_never_reads_holds_up_nobody(server: PluginServer, allocator: FakeAllocator) -> None:
    """Its stream has no room left; the lists that nobody reads are not kept for it one by one."""
    async with rpc.channel(server.socket) as lazy, rpc.channel(server.socket) as other:
        stream = rpc.stream(lazy, METHOD + "ListAndWatch", pb.ListAndWatchResponse)(pb.Empty())
        async with asyncio.timeout(5):
            await server.watched.wait()
        for n in range(2000):
            server.update(resource(**{f"d{n}": True, "a": True}))
            if n % 100 == 0:
                await asyncio.sleep(0)
        await works(other)
        stream.cancel()


# ---- ten thousand devices


def ten_thousand(*absent: int) -> Resource:
    """Ids of the greatest length."""
    usb = UsbDevice(port="sim", vendor=1, product=2, simulated=True)
    ids = [f"printer-{n:0>55}" for n in range(10_000)]
    return Resource(
        name=PRINTERS,
        to=Audience(),
        offers={
            i: Offer(
                device=Device(id=i, cls=DeviceClass.PRINTER, usb=usb, present=n not in absent),
                rule="all",
                grant=Grant(),
            )
            for n, i in enumerate(ids)
        },
    )


async def test_ten_thousand_devices_are_one_message_within_the_kubelets_limit(
    short_tmp: Path, allocator: FakeAllocator, metrics: Metrics
) -> None:
    lists = [ten_thousand(n) for n in range(20)]
    async with PluginServer(lists[0], allocator, short_tmp, metrics) as server:
        options = [("grpc.max_receive_message_length", GRPC_DEFAULT_RECEIVE_BYTES)]
        async with grpc.aio.insecure_channel(f"unix:{server.socket}", options=options) as kubelet:
            call = kubelet.unary_stream(
                METHOD + "ListAndWatch", request_serializer=pb.Empty.SerializeToString, response_deserializer=bytes
            )
            stream = call(pb.Empty())
            first = await stream.read()
            assert len(first) < GRPC_DEFAULT_RECEIVE_BYTES / 4
            message = pb.ListAndWatchResponse.FromString(first)
            assert len(message.devices) == 10_000
            assert all(len(d.ID) == 63 for d in message.devices)
            began_s = time.process_time()
            for number, changed in enumerate(lists[1:], 1):
                server.update(changed)
                told = pb.ListAndWatchResponse.FromString(await stream.read())
                assert [n for n, d in enumerate(told.devices) if d.health == "Unhealthy"] == [number]
            assert time.process_time() - began_s < 5, "a change of one device among 10,000 costs well below 0.25 s"
            stream.cancel()
        async with rpc.channel(server.socket) as channel:
            code, _ = await refusal(allocate(channel, list(lists[0].offers)))
            assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
            await allocate(channel, [list(lists[0].offers)[1]])
