"""The stand-in kubelet has the habits that were seen on a real one."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable
from pathlib import Path

import grpc.aio
import pytest

from nodeagent import rpc
from nodeagent.demo.kubelet import StandInKubelet
from nodeagent.demo.pods import ContainerNotStarted, PodPending, PodRejected, PodSpec, RunOptions
from nodeagent.devices.kubelet import Registrar
from nodeagent.errors import AgentError, Reason
from nodeagent.metrics import Metrics
from nodeagent.wire.pb.deviceplugin.v1beta1 import api_pb2 as pb
from tests.fakes.allocator import resource
from tests.fakes.node import KEYS, PRINTERS, QUICK, Node, is_registered, running
from tests.fakes.pods import pod


@pytest.fixture
async def node(short_tmp: Path, metrics: Metrics) -> AsyncIterator[Node]:
    node = Node(short_tmp, metrics)
    async with node.stack:
        yield node


@pytest.fixture
async def ready(node: Node) -> Node:
    await node.start_kubelet()
    registrar = await node.start_registrar()
    registrar.set_resources({PRINTERS: resource(a=True, b=True), KEYS: resource(KEYS, k=True)})
    await is_registered(registrar)
    return node


async def refused(attempt: Awaitable[None], words: str) -> None:
    with pytest.raises(PodRejected, match=words) as why:
        await attempt
    assert why.value.reason == "UnexpectedAdmissionError"


async def test_three_pods_for_two_devices(ready: Node) -> None:
    pods = [pod(name) for name in ("one", "two", "three")]
    await ready.kubelet.start(pods[0])
    await ready.kubelet.start(pods[1])
    with pytest.raises(PodPending, match="Insufficient"):
        await ready.kubelet.start(pods[2])
    ready.kubelet.delete(pods[0])
    await ready.kubelet.start(pods[2])
    assert ready.kubelet.held(pods[2], "desktop", PRINTERS) != ready.kubelet.held(pods[1], "desktop", PRINTERS)


async def test_init_and_app_container_share_one_id(ready: Node) -> None:
    alice = pod("alice", init={PRINTERS: 1})
    await ready.kubelet.start(alice)
    (device,) = ready.kubelet.held(alice, "desktop", PRINTERS)
    assert ready.kubelet.held(alice, "prepare", PRINTERS) == (device,)
    assert [(c.method, c.ids) for c in ready.kubelet.calls if c.method != "GetPreferredAllocation"] == [
        ("Allocate", (device,)),
        ("Allocate", (device,)),
        ("PreStartContainer", (device,)),
        ("PreStartContainer", (device,)),
    ]


async def test_two_resources_in_one_container(ready: Node) -> None:
    firsts = set()
    for n in range(20):
        alice = pod(f"alice{n}", limits={PRINTERS: 1, KEYS: 1})
        await ready.kubelet.start(alice)
        options = ready.kubelet.run_options(alice, "desktop")
        assert {m.container_path for m in options.mounts} == {"/run/opencdi/printer", "/run/opencdi/ukey"}
        firsts.add(options.env["CUPS_SERVER"])
        ready.kubelet.delete(alice)
    assert firsts == {"/run/opencdi/printer/ipp.sock", "/run/opencdi/ukey/ipp.sock"}, "which one is first is chance"


async def test_a_refused_allocate_rejects_the_pod_and_frees_its_ids(ready: Node) -> None:
    ready.allocator.refuse = AgentError(Reason.SERVICE_UNAVAILABLE, "no cupsd")
    await refused(ready.kubelet.start(pod("alice")), "code = Unavailable desc = no cupsd, which is unexpected")
    ready.allocator.refuse = None
    await ready.kubelet.start(pod("bob", limits={PRINTERS: 2}))


async def test_a_refused_prestart_leaves_the_pod_in_place(ready: Node) -> None:
    alice = pod("alice")
    await ready.kubelet.admit(alice)
    ready.allocator.refuse = AgentError(Reason.LABELS_DO_NOT_MATCH, "alice may not print")
    with pytest.raises(ContainerNotStarted, match="PermissionDenied desc = alice may not print"):
        await ready.kubelet.start_container(alice, "desktop")
    ready.allocator.refuse = None
    await ready.kubelet.start_container(alice, "desktop")


async def test_without_the_plugin_a_restarted_kubelet_starts_containers_unasked(
    short_tmp: Path, metrics: Metrics
) -> None:
    node = Node(short_tmp, metrics)
    async with node.kubelet as kubelet:
        registrar = Registrar(node.directory, node.allocator, None, metrics, pace=QUICK)
        alice = pod("alice")
        async with running(registrar):
            registrar.set_resources({PRINTERS: resource(a=True)})
            await kubelet.until(lambda: kubelet.allocatable(PRINTERS) == {"printer-a"})
            await kubelet.start(alice)
        await kubelet.until(lambda: not kubelet.allocatable(PRINTERS))
        with pytest.raises(ContainerNotStarted, match="has been stopped"):
            await kubelet.start_container(alice, "desktop")
        await kubelet.restart()
        calls = len(kubelet.calls)
        await kubelet.start_container(alice, "desktop")
        assert len(kubelet.calls) == calls
        assert kubelet.run_options(alice, "desktop").mounts


async def test_a_static_pod_before_its_plugin_runs_without_the_device(node: Node) -> None:
    started: list[dict[str, str]] = []

    async def start(pod: PodSpec, container: object, options: RunOptions) -> None:
        started.append(options.env)

    node.kubelet = StandInKubelet(node.directory, node.pod_resources, start)
    kubelet = await node.start_kubelet()
    await kubelet.start(pod("early", static=True))
    assert started == [{}]
    with pytest.raises(PodPending):
        await kubelet.start(pod("scheduled"))


async def test_the_kubelet_dials_during_register(node: Node) -> None:
    kubelet = await node.start_kubelet()
    async with rpc.channel(kubelet.socket) as channel:
        register = rpc.unary(channel, "/v1beta1.Registration/Register", pb.Empty)
        for request, words in (
            (pb.RegisterRequest(version="v1beta1", endpoint="no.sock", resource_name=PRINTERS), "failed to dial"),
            (pb.RegisterRequest(version="v2", endpoint="no.sock", resource_name=PRINTERS), "not supported"),
        ):
            with pytest.raises(grpc.aio.AioRpcError, match=words):
                await register(request, timeout=5)
    assert kubelet.endpoints == {}
