"""PodResources and CRI from sockets that say anything: every failure has a reason, an end, and leaves nothing open."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest

from nodeagent import rpc
from nodeagent.devices.cri import Cri
from nodeagent.devices.podresources import PodResources
from nodeagent.errors import AgentError, Reason
from nodeagent.host import HostRoot
from nodeagent.wire.pb.cri.v1 import api_pb2 as cri_pb
from nodeagent.wire.pb.podresources.v1 import api_pb2 as pr_pb
from tests.fakes.scripted_kubelet import GARBAGE, SETTINGS

Reply = Callable[[str, Any], Awaitable[bytes]]


class _Anything(grpc.GenericRpcHandler):  # type: ignore[type-arg]
    def __init__(self, reply: Reply) -> None:
        self._reply = reply

    def service(self, handler_call_details: Any) -> Any:
        method = handler_call_details.method.rpartition("/")[2]

        async def answer(request: bytes, context: Any) -> bytes:
            return await self._reply(method, context)

        return grpc.unary_unary_rpc_method_handler(answer, request_deserializer=bytes, response_serializer=bytes)


@asynccontextmanager
async def serving(socket: Path, reply: Reply) -> AsyncIterator[None]:
    """Any method of any service gets `reply(method, context)`."""
    server = grpc.aio.server(options=rpc.OPTIONS)
    server.add_generic_rpc_handlers((_Anything(reply),))
    server.add_insecure_port(f"unix:{socket}")
    await server.start()
    try:
        yield
    finally:
        await server.stop(None)


def saying(answer: bytes) -> Reply:
    async def reply(method: str, context: Any) -> bytes:
        return answer

    return reply


def refusing(code: grpc.StatusCode) -> Reply:
    async def reply(method: str, context: Any) -> bytes:
        await context.abort(code, "no\x07\n")
        raise AssertionError

    return reply


async def silent(method: str, context: Any) -> bytes:
    await asyncio.Event().wait()
    raise AssertionError


BAD = {
    "no message": saying(GARBAGE),
    "half a message": saying(b"\x0a\x7f\x01"),
    "no text": saying(b"\x0a\x04\x0a\x02\xff\xff"),
    "17 MiB": saying(bytes(17 << 20)),
    "unimplemented": refusing(grpc.StatusCode.UNIMPLEMENTED),
    "internal": refusing(grpc.StatusCode.INTERNAL),
    "permission": refusing(grpc.StatusCode.PERMISSION_DENIED),
    "unavailable": refusing(grpc.StatusCode.UNAVAILABLE),
    "silent": silent,
}
PEERS = ["podresources", "cri"]


@asynccontextmanager
async def asking(
    peer: str, socket: Path, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[list[Callable[[], Awaitable[object]]]]:
    """Every question that is asked of a peer."""
    monkeypatch.setattr("nodeagent.devices.cri.LIST_TIMEOUT_S", 0.3)
    async with AsyncExitStack() as stack:
        if peer == "cri":
            cri = await stack.enter_async_context(Cri(HostRoot("/"), str(socket)))
            yield [cri.fresh, cri.sandboxes, cri.containers]
        else:
            pods = await stack.enter_async_context(PodResources(socket, timeout_s=0.3))
            yield [pods.fresh, pods.list, pods.allocatable]


@pytest.mark.parametrize("peer", PEERS)
@pytest.mark.parametrize("reply", BAD.values(), ids=BAD)
async def test_a_bad_answer_is_an_error_with_a_reason(
    short_tmp: Path, reply: Reply, peer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with serving(short_tmp / "s", reply), asking(peer, short_tmp / "s", monkeypatch) as questions:
        for question in questions:
            async with asyncio.timeout(5):
                with pytest.raises(AgentError) as told:
                    await question()
            assert told.value.reason in (Reason.KUBELET_UNAVAILABLE, Reason.CRI_UNAVAILABLE)
            assert told.value.message.isprintable()
            assert told.value.hint


@pytest.mark.parametrize("peer", PEERS)
@pytest.mark.parametrize(
    "said", [b"", b"\xff" * 300_000, SETTINGS + b"\x00\x00\x08\x7f\xff\xff\xff\xff\xff" + bytes(64)]
)
async def test_a_socket_that_speaks_no_grpc(
    short_tmp: Path, said: bytes, peer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(said)
        writer.close()

    async with (
        await asyncio.start_unix_server(talk, short_tmp / "s"),
        asking(peer, short_tmp / "s", monkeypatch) as questions,
    ):
        for question in questions:
            async with asyncio.timeout(5):
                with pytest.raises(AgentError):
                    await question()


@pytest.mark.parametrize("peer", PEERS)
async def test_an_hour_without_an_answer_costs_nothing_and_the_next_one_is_heard(
    short_tmp: Path, peer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A question every two seconds is 1,800 in an hour; nothing here depends on the time between them."""
    socket = short_tmp / "s"
    async with asking(peer, socket, monkeypatch) as questions:
        opened = 0
        for n in range(1800):
            with pytest.raises(AgentError, match="unavailable"):
                await questions[1]()
            if n == 10:
                opened = len(os.listdir("/proc/self/fd"))
        assert len(os.listdir("/proc/self/fd")) <= opened + 2
        async with serving(socket, saying(b"")):
            assert await questions[1]() == ()


async def test_absurd_names_are_names(short_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    absurd = ["", "a" * 100_000, "../../etc/passwd", "\u202e\x00\x1b[2J", "\U0001f5a8"]
    pods = pr_pb.ListPodResourcesResponse(
        pod_resources=[
            pr_pb.PodResources(
                name=name,
                namespace=name,
                containers=[
                    pr_pb.ContainerResources(
                        name=name, devices=[pr_pb.ContainerDevices(resource_name=name, device_ids=[name, name])]
                    )
                ],
            )
            for name in absurd
        ]
    )
    async with (
        serving(short_tmp / "p", saying(pods.SerializeToString())),
        asking("podresources", short_tmp / "p", monkeypatch) as ask,
    ):
        assert {h.pod for h in await ask[1]()} == set(absurd)  # type: ignore[attr-defined]
    sandboxes = cri_pb.ListPodSandboxResponse(
        items=[
            cri_pb.PodSandbox(
                id=name, metadata=cri_pb.PodSandboxMetadata(name=name, namespace=name, uid=name),
                labels={name: name, "io.kubernetes.pod.name": name}, created_at=-(2**63),
            )
            for name in absurd
        ]
        + [cri_pb.PodSandbox()]
    )  # fmt: skip
    async with (
        serving(short_tmp / "c", saying(sandboxes.SerializeToString())),
        asking("cri", short_tmp / "c", monkeypatch) as ask,
    ):
        found = await ask[1]()
        assert [s.pod.uid for s in found] == [*absurd, ""]  # type: ignore[attr-defined]


async def test_a_node_with_ten_thousand_held_devices_is_listed_in_one_message(
    short_tmp: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    message = pr_pb.ListPodResourcesResponse(
        pod_resources=[
            pr_pb.PodResources(
                name=f"pod-{n}",
                namespace="default",
                containers=[
                    pr_pb.ContainerResources(
                        name="desktop",
                        devices=[
                            pr_pb.ContainerDevices(
                                resource_name="opencdi.io/usb", device_ids=[f"usb-{n}-{m}" + "x" * 50]
                            )
                        ],
                    )
                    for m in range(40)
                ],
            )
            for n in range(250)
        ]
    ).SerializeToString()
    assert len(message) < 4 << 20
    async with serving(short_tmp / "s", saying(message)), asking("podresources", short_tmp / "s", monkeypatch) as ask:
        assert len(await ask[1]()) == 10_000  # type: ignore[arg-type]
