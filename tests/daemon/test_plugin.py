"""The device-plugin server, asked over its real socket as a kubelet asks."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import msgspec
import pytest

from nodeagent import rpc
from nodeagent.devices import plugin
from nodeagent.devices.plugin import CODES, PluginServer
from nodeagent.errors import AgentError, Reason
from nodeagent.metrics import Metrics
from nodeagent.model import DeviceNode
from nodeagent.wire.pb.deviceplugin.v1beta1 import api_pb2 as pb
from tests.fakes.allocator import FakeAllocator, resource

METHOD = "/v1beta1.DevicePlugin/"
PRINTERS = "opencdi.io/printer"


async def allocate(channel: grpc.aio.Channel, *ids: str) -> pb.ContainerAllocateResponse:
    request = pb.AllocateRequest(container_requests=[pb.ContainerAllocateRequest(devices_ids=ids)])
    answer = await rpc.unary(channel, METHOD + "Allocate", pb.AllocateResponse)(request, timeout=5)
    return answer.container_responses[0]


async def prestart(channel: grpc.aio.Channel, *ids: str) -> None:
    call = rpc.unary(channel, METHOD + "PreStartContainer", pb.PreStartContainerResponse)
    await call(pb.PreStartContainerRequest(devices_ids=ids), timeout=5)


def watch(channel: grpc.aio.Channel) -> Any:
    return rpc.stream(channel, METHOD + "ListAndWatch", pb.ListAndWatchResponse)(pb.Empty())


def told(message: pb.ListAndWatchResponse) -> dict[str, str]:
    return {d.ID: d.health for d in message.devices}


def counted(metrics: Metrics, result: str) -> float:
    name, labels = "nodeagent_allocations_total", {"resource": PRINTERS, "result": result}
    return metrics.registry.get_sample_value(name, labels) or 0


async def test_options_ask_for_prestart(channel: grpc.aio.Channel) -> None:
    answer = await rpc.unary(channel, METHOD + "GetDevicePluginOptions", pb.DevicePluginOptions)(pb.Empty(), timeout=5)
    assert answer.pre_start_required
    assert answer.get_preferred_allocation_available


async def test_allocate_answers_with_what_the_allocator_gives(
    channel: grpc.aio.Channel, allocator: FakeAllocator, metrics: Metrics
) -> None:
    answer = await allocate(channel, "printer-b", "printer-a")
    assert allocator.allocated == [(PRINTERS, ("printer-a", "printer-b"))]
    assert dict(answer.envs)["CUPS_SERVER"] == "/run/opencdi/printer/ipp.sock"
    assert [(m.container_path, m.host_path, m.read_only) for m in answer.mounts] == [
        ("/run/opencdi/printer", "/run/nodeagent/slots/x", True)
    ]
    assert counted(metrics, "ok") == 1
    assert metrics.registry.get_sample_value("nodeagent_allocate_duration_seconds_count") == 1


async def test_a_device_node_is_given_for_reading_and_writing() -> None:
    node = DeviceNode("/dev/usb/lp0", "usbmisc", 180, 0)
    answer = plugin._container_response(plugin.SlotAnswer(nodes=(node,)))
    assert [(d.container_path, d.host_path, d.permissions) for d in answer.devices] == [
        ("/dev/usb/lp0", "/dev/usb/lp0", "rw")
    ]


@pytest.mark.parametrize(
    ("ids", "code", "words"),
    [
        (("printer-x",), grpc.StatusCode.NOT_FOUND, "printer-x is no device of opencdi.io/printer"),
        (
            ("printer-a", "printer-c"),
            grpc.StatusCode.FAILED_PRECONDITION,
            "printer-c of opencdi.io/printer is unplugged",
        ),
        ((), grpc.StatusCode.INVALID_ARGUMENT, "must name device ids"),
        (("printer-a", "printer-a"), grpc.StatusCode.INVALID_ARGUMENT, "each once"),
        (("p" * 64,), grpc.StatusCode.INVALID_ARGUMENT, "63 characters"),
        (tuple(f"p{n}" for n in range(1025)), grpc.StatusCode.RESOURCE_EXHAUSTED, "at most 1024"),
    ],
)
async def test_allocate_refuses_ids_that_cannot_be_given(
    channel: grpc.aio.Channel, allocator: FakeAllocator, ids: tuple[str, ...], code: grpc.StatusCode, words: str
) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await allocate(channel, *ids)
    assert refused.value.code() is code
    assert words in str(refused.value.details())
    assert not allocator.allocated


async def test_a_refusal_keeps_its_sentence_and_its_hint(
    channel: grpc.aio.Channel, allocator: FakeAllocator, metrics: Metrics
) -> None:
    allocator.refuse = AgentError(Reason.LEASED_UNDER_OTHER_RESOURCE, "printer-a is held", hint="führe es zusammen")
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await allocate(channel, "printer-a")
    assert refused.value.code() is grpc.StatusCode.FAILED_PRECONDITION
    assert refused.value.details() == "printer-a is held (führe es zusammen)"
    assert counted(metrics, "leased_under_other_resource") == 1


async def test_a_very_long_refusal_still_arrives(channel: grpc.aio.Channel, allocator: FakeAllocator) -> None:
    allocator.refuse = AgentError(Reason.NOT_YOURS, "打印机" * 5000)
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await prestart(channel, "printer-a")
    assert refused.value.code() is grpc.StatusCode.PERMISSION_DENIED
    assert str(refused.value.details()).startswith("打印机打印机")


async def test_a_fault_of_ours_is_told_as_such(
    channel: grpc.aio.Channel, allocator: FakeAllocator, metrics: Metrics
) -> None:
    allocator.refuse = ZeroDivisionError("secret")
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await allocate(channel, "printer-a")
    assert refused.value.code() is grpc.StatusCode.INTERNAL
    assert "ZeroDivisionError" in str(refused.value.details())
    assert "secret" not in str(refused.value.details())
    assert counted(metrics, "internal") == 1
    allocator.refuse = None
    await allocate(channel, "printer-a")


async def test_allocate_never_outlasts_its_deadline(
    short_tmp: Path, allocator: FakeAllocator, metrics: Metrics
) -> None:
    allocator.free.clear()
    clock = asyncio.get_running_loop().time
    async with (
        PluginServer(
            resource(a=True), allocator, short_tmp, metrics, allocate_timeout_s=0.2, prestart_timeout_s=0.3
        ) as server,
        rpc.channel(server.socket) as channel,
    ):
        started_s = clock()
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await allocate(channel, "printer-a")
        assert refused.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        assert "was not decided within 0.2 s" in str(refused.value.details())
        assert 0.2 <= clock() - started_s < 1
        assert allocator.waiting == 0, "the allocator was cancelled"
        assert counted(metrics, "deadline") == 1
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await prestart(channel, "printer-a")
        assert "was not decided within 0.3 s" in str(refused.value.details())
    assert (plugin.ALLOCATE_TIMEOUT_S, plugin.PRESTART_TIMEOUT_S) == (2, 25)


async def test_a_hanging_allocate_holds_up_nothing_else(channel: grpc.aio.Channel, allocator: FakeAllocator) -> None:
    allocator.free.clear()
    hanging = asyncio.create_task(allocate(channel, "printer-a"))
    stream = watch(channel)
    assert len(told(await stream.read())) == 3
    stream.cancel()
    allocator.free.set()
    await hanging


async def test_prestart_takes_ids_that_are_unplugged_or_gone(
    channel: grpc.aio.Channel, allocator: FakeAllocator
) -> None:
    """A container restarts while its key is out: it gets its seat back and the key when it returns."""
    await prestart(channel, "printer-c", "printer-x")
    assert allocator.started == [(PRINTERS, ("printer-c", "printer-x"))]


async def test_the_list_is_whole_at_first_and_after_each_change(
    server: PluginServer, channel: grpc.aio.Channel, metrics: Metrics
) -> None:
    stream = watch(channel)
    assert told(await stream.read()) == {"printer-a": "Healthy", "printer-b": "Healthy", "printer-c": "Unhealthy"}
    server.update(resource(a=False, b=True), event_s=asyncio.get_running_loop().time())
    assert told(await stream.read()) == {"printer-a": "Unhealthy", "printer-b": "Healthy"}
    server.update(resource())
    assert told(await stream.read()) == {}
    assert metrics.registry.get_sample_value("nodeagent_hotplug_to_kubelet_seconds_count") == 1
    stream.cancel()


async def test_quick_changes_become_one_message_and_no_change_none(
    server: PluginServer, channel: grpc.aio.Channel
) -> None:
    stream = watch(channel)
    await stream.read()
    for present in (True, False) * 50:
        server.update(resource(a=present))
    server.update(resource(a=False, d=True))
    assert told(await stream.read()) == {"printer-a": "Unhealthy", "printer-d": "Healthy"}
    server.update(resource(a=False, d=True))
    server.update(resource(e=True))
    assert told(await stream.read()) == {"printer-e": "Healthy"}
    stream.cancel()


async def test_several_streams_at_once_and_each_ends_when_its_reader_leaves(
    server: PluginServer, channel: grpc.aio.Channel
) -> None:
    first, second = watch(channel), watch(channel)
    await first.read()
    await second.read()
    assert server.watched.is_set()
    assert server.unwatched_s == 0
    first.cancel()
    server.update(resource(a=True))
    assert told(await second.read()) == {"printer-a": "Healthy"}
    assert server.watched.is_set()
    second.cancel()
    async with asyncio.timeout(2):
        while server.watched.is_set():
            await asyncio.sleep(0.01)
    assert server.unwatched_s < 1


async def test_a_reader_that_vanishes_with_its_connection_leaves_no_stream(server: PluginServer) -> None:
    async with rpc.channel(server.socket) as own:
        await watch(own).read()
        assert server.watched.is_set()
    async with asyncio.timeout(2):
        while server.watched.is_set():
            await asyncio.sleep(0.01)


async def test_closing_ends_streams_and_hanging_requests_at_once(
    short_tmp: Path, allocator: FakeAllocator, metrics: Metrics
) -> None:
    allocator.free.clear()
    clock = asyncio.get_running_loop().time
    async with PluginServer(resource(a=True), allocator, short_tmp, metrics) as server:
        client = rpc.channel(server.socket)
        stream = watch(client)
        await stream.read()
        hanging = asyncio.create_task(allocate(client, "printer-a"))
        async with asyncio.timeout(2):
            while not allocator.waiting:
                await asyncio.sleep(0.01)
        closing_s = clock()
    assert clock() - closing_s < 1
    assert await stream.read() is grpc.aio.EOF  # type: ignore[attr-defined]
    with pytest.raises(grpc.aio.AioRpcError):
        await hanging
    assert list(short_tmp.iterdir()) == []
    assert counted(metrics, "cancelled") == 1
    await client.close(None)


async def test_every_server_has_a_socket_of_its_own_for_root_alone(
    short_tmp: Path, allocator: FakeAllocator, metrics: Metrics
) -> None:
    async with (
        PluginServer(resource(a=True), allocator, short_tmp, metrics) as one,
        PluginServer(resource(a=True), allocator, short_tmp, metrics) as two,
    ):
        assert one.endpoint != two.endpoint
        assert one.socket.stat().st_mode & 0o777 == 0o600
        assert plugin.endpoint_name(short_tmp, resource()).startswith("nodeagent-printer-")


async def test_a_long_name_is_cut_and_a_long_directory_refused(
    short_tmp: Path, allocator: FakeAllocator, metrics: Metrics
) -> None:
    directory = short_tmp / ("d" * (107 - len(str(short_tmp)) - 1 - 40))
    directory.mkdir()
    async with PluginServer(resource(f"opencdi.io/{'l' * 63}", a=True), allocator, directory, metrics) as server:
        assert len(str(server.socket)) == 107
        assert server.socket.is_socket()
    with pytest.raises(AgentError, match="too long") as refused:
        PluginServer(resource(a=True), allocator, Path("/" + "d" * 90), metrics)
    assert refused.value.reason is Reason.CONFIG_INVALID


async def test_a_missing_directory_is_told(short_tmp: Path, allocator: FakeAllocator, metrics: Metrics) -> None:
    with pytest.raises(AgentError, match=r"cannot listen on .*gone"):
        async with PluginServer(resource(a=True), allocator, short_tmp / "gone", metrics):
            pass


def test_every_reason_has_a_code() -> None:
    assert set(CODES) == set(Reason)


# ---- what is preferred, and when the kubelet has been told


def offering(**changes: Any) -> Any:
    """Printers a to d: b has a sibling, c is held under another name, d is unplugged."""
    made = resource(a=True, b=True, c=True, d=False)
    changed = {"printer-b": {"siblings": 1}, "printer-c": {"siblings": 1, "held_as": "opencdi.io/other"}}
    offers = {i: msgspec.structs.replace(o, **changed.get(i, {})) for i, o in made.offers.items()}
    return msgspec.structs.replace(made, offers=offers, **changes)


@pytest.mark.parametrize(
    ("available", "must", "size", "expected"),
    [
        ("abcd", "", 1, "a"),
        ("dcba", "", 2, "ab"),
        ("bcd", "", 1, "b"),
        ("abcd", "c", 2, "ca"),
        ("ab", "", 9, "ab"),
        ("ab", "", 0, ""),
        ("ab", "", -5, ""),
        ("za", "", 2, "az"),
        ("", "", 1, ""),
    ],
)
def test_preferred(available: str, must: str, size: int, expected: str) -> None:
    def ids(letters: str) -> list[str]:
        return [f"printer-{x}" for x in letters]

    assert plugin.preferred(offering(), ids(available), ids(must), size) == ids(expected)


async def test_the_kubelet_is_answered_what_is_preferred(
    channel: grpc.aio.Channel, server: PluginServer, allocator: FakeAllocator
) -> None:
    server.update(offering())
    request = pb.PreferredAllocationRequest(
        container_requests=[
            pb.ContainerPreferredAllocationRequest(available_deviceIDs=["printer-b", "printer-a"], allocation_size=1)
        ]
    )
    call = rpc.unary(channel, METHOD + "GetPreferredAllocation", pb.PreferredAllocationResponse)
    answer = await call(request, timeout=5)
    assert [list(c.deviceIDs) for c in answer.container_responses] == [["printer-a"]]
    assert allocator.allocated == []
    assert not (await call(pb.PreferredAllocationRequest(), timeout=5)).container_responses


async def test_told_waits_for_every_reader_and_not_for_one_that_does_not_read(
    channel: grpc.aio.Channel, server: PluginServer
) -> None:
    assert await server.told(), "nobody reads: nobody is waited for"
    one, two = watch(channel), watch(channel)
    assert told(await one.read()) == told(await two.read())
    server.update(offering())
    assert await server.told(5)
    assert told(await one.read())["printer-c"] == "Unhealthy"
    assert told(await two.read())["printer-c"] == "Unhealthy"
    server._sent[object()] = None  # a stream whose flow control has stopped
    assert not await server.told(0.05)
    server._sent.popitem()
    one.cancel()
    two.cancel()


async def test_cdi_names_reach_the_kubelet(channel: grpc.aio.Channel, allocator: FakeAllocator) -> None:
    async def give(resource: Any, ids: tuple[str, ...]) -> plugin.SlotAnswer:
        return plugin.SlotAnswer(cdi=tuple(f"{resource.name}={i}" for i in ids))

    allocator.allocate = give  # type: ignore[method-assign]
    answer = await allocate(channel, "printer-a")
    assert [d.name for d in answer.cdi_devices] == ["opencdi.io/printer=printer-a"]
