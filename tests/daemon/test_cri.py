"""The CRI client against a small real gRPC server."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import pytest

from nodeagent.devices import cri
from nodeagent.devices.cri import Cri, take_pid
from nodeagent.errors import AgentError, Reason
from nodeagent.host import HostRoot
from nodeagent.model import Container, PodRef, Sandbox
from tests.fakes.cri import FakeCri


@pytest.fixture
async def fake(short_tmp: Path) -> AsyncIterator[FakeCri]:
    (short_tmp / "run/crio").mkdir(parents=True)
    async with FakeCri(short_tmp / "run/crio/crio.sock") as running:
        yield running


@pytest.fixture
async def client(short_tmp: Path, fake: FakeCri) -> AsyncIterator[Cri]:
    async with Cri(HostRoot(short_tmp)) as opened:
        yield opened


async def test_a_sandbox_has_its_pod_and_the_pods_own_labels(fake: FakeCri, client: Cri) -> None:
    fake.add_sandbox("alice", role="desktop")
    fake.add_sandbox("bob", ready=False)
    assert await client.sandboxes() == (
        Sandbox(
            id="sandbox-alice",
            pod=PodRef("default", "alice", "uid-alice"),
            ready=True,
            labels={"role": "desktop"},
            handler="runsc",
            created_ns=5,
        ),
        Sandbox(
            id="sandbox-bob",
            pod=PodRef("default", "bob", "uid-bob"),
            ready=False,
            handler="runsc",
            created_ns=5,
        ),
    )


async def test_running_containers_have_mounts_and_a_pid_and_are_asked_about_once(fake: FakeCri, client: Cri) -> None:
    sandbox = fake.add_sandbox("alice")
    fake.add_container("one", sandbox.id, {"/run/opencdi/printer": "/run/nodeagent/slots/x"}, pid=4711)
    for state in (0, 2, 3):
        fake.add_container(f"not-running-{state}", sandbox.id, {}, state=state)
    expected = Container(
        id="one",
        sandbox_id=sandbox.id,
        name="desktop",
        running=True,
        created_ns=6,
        mounts={"/run/opencdi/printer": "/run/nodeagent/slots/x"},
        pid=4711,
    )
    assert await client.containers() == (expected,)
    fake.add_container("two", sandbox.id, {}, pid=0)
    assert [c.id for c in await client.containers()] == ["one", "two"]
    assert (await client.fresh()).containers[0] == expected
    assert fake.calls["ContainerStatus"] == 2
    fake.containers.clear()
    assert await client.containers() == ()
    fake.add_container("one", sandbox.id, {}, pid=5)
    assert [c.pid for c in await client.containers()] == [5], "forgotten when it was gone"


async def test_at_most_eight_statuses_are_asked_for_at_once(fake: FakeCri, client: Cri) -> None:
    for n in range(40):
        fake.add_container(f"c{n}", "sandbox", {}, pid=n)
    assert [c.pid for c in await client.containers()] == list(range(40))
    assert fake.most_at_once == cri.STATUS_CONCURRENCY


async def test_one_container_that_cannot_be_asked_about_spoils_nothing(
    fake: FakeCri, client: Cri, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cri, "STATUS_TIMEOUT_S", 0.2)
    fake.add_container("good", "s", {"/a": "/b"})
    fake.add_container("ended", "s", {"/a": "/b"})
    fake.add_container("odd", "s", {"/a": "/b"})
    fake.broken = {"ended": grpc.StatusCode.NOT_FOUND, "odd": grpc.StatusCode.UNKNOWN}
    assert [(c.id, c.mounts, c.pid) for c in await client.containers()] == [("good", {"/a": "/b"}, 7), ("odd", {}, 0)]
    fake.broken = {}
    assert [(c.id, c.pid) for c in await client.containers()] == [("good", 7), ("ended", 7), ("odd", 7)]


async def test_a_container_whose_status_hangs_is_left_alone_for_a_while(
    fake: FakeCri, client: Cri, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cri, "STATUS_TIMEOUT_S", 0.1)
    fake.add_container("hung", "s", {"/a": "/b"})
    fake.gate.clear()
    for _ in range(3):
        assert [(c.id, c.pid) for c in await client.containers()] == [("hung", 0)]
    assert fake.calls["ContainerStatus"] == 1
    fake.gate.set()
    monkeypatch.setattr(client, "_silent", {})
    assert [c.pid for c in await client.containers()] == [7]


async def test_200_looks_at_once_are_a_few(fake: FakeCri, client: Cri) -> None:
    sandbox = fake.add_sandbox("alice")
    fake.add_container("one", sandbox.id, {})
    views = await asyncio.gather(*(client.fresh() for _ in range(200)))
    assert {len(v.sandboxes) for v in views} == {1}
    assert {len(v.containers) for v in views} == {1}
    assert fake.calls["ListPodSandbox"] <= 2


async def test_stopping_a_container(fake: FakeCri, client: Cri) -> None:
    fake.add_container("one", "sandbox", {})
    await client.stop_container("one", 10)
    await client.stop_container("never", 10)
    assert fake.stopped == [("one", 10)]


async def test_a_runtime_that_is_away_is_told_and_found_again(short_tmp: Path) -> None:
    socket = short_tmp / "run/containerd/containerd.sock"
    socket.parent.mkdir(parents=True)
    async with Cri(HostRoot(short_tmp)) as client:
        with pytest.raises(AgentError, match="the container runtime did not answer ListContainers") as told:
            await client.fresh()
        assert told.value.reason is Reason.CRI_UNAVAILABLE
        for _ in range(2):
            async with FakeCri(socket) as fake:
                fake.add_sandbox("alice")
                assert len(await client.sandboxes()) == 1


async def test_a_socket_that_is_named_is_below_the_hosts_root(short_tmp: Path) -> None:
    async with FakeCri(short_tmp / "odd.sock") as fake, Cri(HostRoot(short_tmp), "/odd.sock") as client:
        fake.add_sandbox("alice")
        assert len(await client.sandboxes()) == 1


@pytest.mark.parametrize(
    ("untrusted_json", "pid"),
    [
        ('{"pid": 12, "runtimeSpec": {"process": {"env": []}}}', 12),
        ('{"pid": -1}', 0),
        ('{"pid": "12"}', 0),
        ('{"pid": 99999999999}', 0),
        ("{}", 0),
        ("[]", 0),
        ("", 0),
        ('{"pid": 12', 0),
        ("[" * 100_000, 0),
        (json.dumps({"pid": 12, "pad": "x" * cri.MAX_INFO_BYTES}), 0),
    ],
)
def test_pids_are_read_with_care(untrusted_json: str, pid: int) -> None:
    assert take_pid({"info": untrusted_json}) == pid
    assert take_pid({"other": untrusted_json}) == 0
