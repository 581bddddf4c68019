"""PodResources, asked of the stand-in kubelet over its real socket; its devices come from a real plugin server."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from nodeagent.demo.kubelet import StandInKubelet
from nodeagent.devices.kubelet import Registrar
from nodeagent.devices.podresources import Holding, PodResources, _holdings
from nodeagent.errors import AgentError, Reason
from nodeagent.metrics import Metrics
from nodeagent.model import Resource
from nodeagent.wire.pb.podresources.v1 import api_pb2 as pb
from tests.fakes.allocator import FakeAllocator, resource
from tests.fakes.pods import pod

PRINTERS = "opencdi.io/printer"


@pytest.fixture
async def kubelet(short_tmp: Path) -> AsyncIterator[StandInKubelet]:
    (short_tmp / "dp").mkdir()
    async with StandInKubelet(short_tmp / "dp", short_tmp / "pr" / "kubelet.sock") as running:
        yield running


@pytest.fixture
async def client(short_tmp: Path, kubelet: StandInKubelet) -> AsyncIterator[PodResources]:
    async with PodResources(short_tmp / "pr" / "kubelet.sock", timeout_s=0.5) as opened:
        yield opened


class AsksWho(FakeAllocator):
    """PreStartContainer as nodeagent does it: who holds these ids right now?"""

    def __init__(self, client: PodResources) -> None:
        super().__init__()
        self.client = client
        self.found: list[Holding] = []

    async def prestart(self, resource: Resource, ids: tuple[str, ...]) -> None:
        holdings = await self.client.fresh()
        self.found.append(next(h for h in holdings if h.resource == resource.name and h.ids == ids))


@pytest.fixture
async def allocator(client: PodResources) -> AsksWho:
    return AsksWho(client)


@pytest.fixture
async def registrar(
    kubelet: StandInKubelet, client: PodResources, allocator: AsksWho, metrics: Metrics
) -> AsyncIterator[Registrar]:
    registrar = Registrar(kubelet.socket.parent, allocator, client, metrics)
    running = asyncio.create_task(registrar.run())
    yield registrar
    running.cancel()
    await asyncio.wait({running})


async def offer(registrar: Registrar, *resources: Resource) -> None:
    registrar.set_resources({r.name: r for r in resources})
    async with asyncio.timeout(5):
        await registrar.registered.wait()


async def test_holders_and_allocatable_devices(
    kubelet: StandInKubelet, client: PodResources, registrar: Registrar
) -> None:
    assert await client.list() == ()
    assert await client.allocatable() == {}
    await offer(registrar, resource(a=True, b=True, c=False), resource("opencdi.io/x", d=True))
    assert await client.allocatable() == {
        PRINTERS: frozenset({"printer-a", "printer-b"}),
        "opencdi.io/x": frozenset({"printer-d"}),
    }
    await kubelet.admit(pod("alice", limits={PRINTERS: 2, "opencdi.io/x": 1}))
    assert await client.list() == (
        Holding("default", "alice", "desktop", PRINTERS, ("printer-a", "printer-b")),
        Holding("default", "alice", "desktop", "opencdi.io/x", ("printer-d",)),
    )


async def test_200_containers_start_at_once_and_none_fails(
    kubelet: StandInKubelet, allocator: AsksWho, registrar: Registrar
) -> None:
    """The kubelet answers a burst of 10 Lists and 100 a second; 200 PreStartContainer calls share a few."""
    names = [f"n{n:03}" for n in range(200)]
    await offer(registrar, resource(PRINTERS, **dict.fromkeys(names, True)))
    pods = [pod(name) for name in names]
    for one in pods:
        await kubelet.admit(one)
    before = kubelet.lists
    clock = asyncio.get_running_loop().time
    started_s = clock()
    await asyncio.gather(*(kubelet.pre_start(one, "desktop") for one in pods))
    assert clock() - started_s < 10
    assert kubelet.lists - before <= 30
    assert {(h.pod, h.ids) for h in allocator.found} == {
        (one.name, kubelet.held(one, "desktop", PRINTERS)) for one in pods
    }
    assert len(allocator.found) == 200


async def test_a_fresh_list_never_predates_the_question(kubelet: StandInKubelet, client: PodResources) -> None:
    kubelet.hang()
    early = asyncio.create_task(client.fresh())
    await asyncio.sleep(0.05)
    kubelet.pods["late"] = pod("late")
    late = [asyncio.create_task(client.fresh()) for _ in range(5)]
    await asyncio.sleep(0.05)
    kubelet.unhang()
    await asyncio.gather(early, *late)
    assert kubelet.lists == 2


async def test_being_limited_is_waited_out(kubelet: StandInKubelet, client: PodResources) -> None:
    """Others on the node may have used up the kubelet's calls."""
    kubelet._tokens, kubelet._refilled_s = -20.0, asyncio.get_running_loop().time()
    assert await client.list() == ()


async def test_a_kubelet_that_hangs_or_is_gone_is_told_and_one_that_returns_is_heard_at_once(
    kubelet: StandInKubelet, client: PodResources
) -> None:
    await client.list()
    kubelet.hang()
    with pytest.raises(AgentError, match="did not answer List: deadline_exceeded") as told:
        await client.fresh()
    assert told.value.reason is Reason.KUBELET_UNAVAILABLE
    assert "is the kubelet running" in told.value.hint
    kubelet.unhang()
    await client.fresh()
    await kubelet.vanish()
    for _ in range(3):
        with pytest.raises(AgentError, match="unavailable"):
            await client.list()
    await kubelet.restart()
    assert await client.list() == ()
    await kubelet.restart()
    answers = await asyncio.gather(client.list(), client.fresh(), client.allocatable())
    assert [len(a) for a in answers] == [0, 0, 0]


async def test_a_kubelet_without_its_api_server_lists_nothing(
    kubelet: StandInKubelet, client: PodResources, registrar: Registrar
) -> None:
    await offer(registrar, resource(a=True))
    await kubelet.start(pod("alice"))
    await kubelet.restart(api_away=True)
    assert await client.list() == ()
    kubelet.has_sources = True
    assert [h.pod for h in await client.list()] == ["alice"]


async def test_init_containers_are_not_listed(
    kubelet: StandInKubelet, client: PodResources, registrar: Registrar
) -> None:
    await offer(registrar, resource(a=True, b=True))
    await kubelet.admit(pod("both", init={PRINTERS: 1}))
    await kubelet.admit(pod("only", limits={}, init={PRINTERS: 1}))
    assert [(h.pod, h.container) for h in await client.list()] == [("both", "desktop")]


def test_entries_of_one_resource_are_put_together() -> None:
    """A kubelet with several NUMA nodes lists one resource several times; empty entries hold nothing."""
    container = pb.ContainerResources(
        name="desktop",
        devices=[
            pb.ContainerDevices(resource_name=PRINTERS, device_ids=["b"]),
            pb.ContainerDevices(resource_name="other/x", device_ids=[]),
            pb.ContainerDevices(resource_name=PRINTERS, device_ids=["a", "b"]),
        ],
    )
    answer = pb.ListPodResourcesResponse(
        pod_resources=[pb.PodResources(name="p", namespace="n", containers=[container])]
    )
    assert _holdings(answer) == (Holding("n", "p", "desktop", PRINTERS, ("a", "b")),)
