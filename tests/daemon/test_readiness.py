"""The taint and the label of a node against an API server over real HTTP: away, busy, forbidding, and others who write."""

from __future__ import annotations

import asyncio
import contextlib
import copy
from collections.abc import AsyncIterator
from typing import Any

import pytest

from nodeagent.marks import Label, Taint
from nodeagent.metrics import Metrics
from nodeagent.report import readiness
from nodeagent.report.endpoint import Endpoint
from nodeagent.report.kube import KubeClient
from nodeagent.report.readiness import Readiness
from tests.fakes.apiserver import ApiServer

TAINT = Taint("opencdi.io/not-ready", "NoSchedule")
LABEL = Label("opencdi.io/devices", "ready")
OURS = {"key": "opencdi.io/not-ready", "effect": "NoSchedule"}
THEIRS = {"key": "node.kubernetes.io/unschedulable", "effect": "NoSchedule", "timeAdded": "2026-11-20T10:00:00Z"}


class Clock:
    now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


class Node:
    """One Readiness with its surroundings: what it is told, the time, and the node as the API server has it."""

    def __init__(self, api: ApiServer, kube: KubeClient, **options: Any) -> None:
        self.api, self.clock, self.registered = api, Clock(), asyncio.Event()
        self.object = api.add_node("node-1", zone="a")
        options = {"taint": TAINT, "label": LABEL, "monotonic": self.clock, **options}
        self.readiness = Readiness(kube, "node-1", self.registered, **options)

    @property
    def taints(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self.object["spec"].get("taints", [])
        return found

    @property
    def labels(self) -> dict[str, str]:
        found: dict[str, str] = self.object["metadata"]["labels"]
        return found

    async def after(self, seconds: float) -> list[str]:
        """Let so much time pass; returns the methods of the calls that were made for it."""
        before = len(self.api.calls)
        self.clock.now_s += seconds
        await self.readiness.step()
        return [method for method, _ in self.api.calls[before:]]


@pytest.fixture
async def api() -> AsyncIterator[ApiServer]:
    async with ApiServer() as server:
        yield server


@pytest.fixture
async def node(api: ApiServer, metrics: Metrics) -> AsyncIterator[Node]:
    async with KubeClient(Endpoint(server=api.url), metrics, timeout_s=0.5) as kube:
        yield Node(api, kube)


async def test_a_node_that_came_with_the_taint_loses_it_when_its_devices_are_offered(node: Node) -> None:
    node.object["spec"]["taints"] = [copy.deepcopy(THEIRS), dict(OURS, timeAdded="2026-11-25T10:00:00Z")]
    assert await node.after(0) == [], "nothing is known yet, so nothing is said"
    node.registered.set()
    assert await node.after(1) == ["GET", "PATCH"], "one change for both"
    assert node.taints == [THEIRS], "others' taints stay, with everything in them"
    assert node.labels == {"zone": "a", "opencdi.io/devices": "ready"}
    assert await node.after(1) == []


async def test_a_loss_is_told_after_the_grace_and_the_return_at_once(node: Node) -> None:
    node.registered.set()
    assert await node.after(0) == ["GET", "PATCH"]
    node.registered.clear()
    assert await node.after(1) == [] and await node.after(29) == []
    node.registered.set()
    assert await node.after(1) == [], "a kubelet that restarts does not flap"
    node.registered.clear()
    assert await node.after(0) == [] and await node.after(29) == [], "the grace begins anew"
    assert await node.after(1) == ["GET", "PATCH"]
    assert node.taints == [OURS] and node.labels == {"zone": "a"}
    assert await node.after(1) == []
    node.registered.set()
    assert await node.after(0) == ["GET", "PATCH"]
    assert node.taints == [] and node.labels["opencdi.io/devices"] == "ready"


async def test_a_daemon_that_never_gets_registered_says_so(node: Node) -> None:
    assert await node.after(0) == [] and await node.after(29) == []
    assert await node.after(2) == ["GET", "PATCH"]
    assert node.taints == [OURS]


async def test_it_is_looked_at_again_and_put_right(node: Node) -> None:
    node.registered.set()
    await node.after(0)
    del node.labels["opencdi.io/devices"]
    assert await node.after(200) == []
    assert await node.after(200) == ["GET", "PATCH"]
    assert node.labels["opencdi.io/devices"] == "ready"
    assert await node.after(400) == ["GET"], "nothing to change, nothing is written"


async def test_a_rival_loses_nothing(node: Node) -> None:
    def cordon(seen: dict[str, Any]) -> None:
        seen["spec"]["taints"] = [*seen["spec"].get("taints", []), copy.deepcopy(THEIRS)]

    node.object["spec"]["taints"] = [dict(OURS)]
    node.api.rivals.append(cordon)
    node.registered.set()
    assert await node.after(0) == ["GET", "PATCH", "GET", "PATCH"]
    assert node.taints == [THEIRS]


async def test_rivals_without_end_are_given_time(node: Node) -> None:
    node.api.rivals.extend([lambda seen: None] * readiness.CONFLICTS)
    node.registered.set()
    assert await node.after(0) == ["GET", "PATCH"] * readiness.CONFLICTS
    assert await node.after(0.5) == []
    assert await node.after(2) == ["GET", "PATCH"]


async def test_somebody_elses_value_is_left_alone_unless_the_devices_are_offered(node: Node) -> None:
    node.labels["opencdi.io/devices"] = "broken"
    assert await node.after(0) == [] and await node.after(31) == ["GET", "PATCH"]
    assert node.labels["opencdi.io/devices"] == "broken"
    node.registered.set()
    await node.after(0)
    assert node.labels["opencdi.io/devices"] == "ready"


async def test_a_taint_with_another_value_is_the_same_taint(api: ApiServer, metrics: Metrics) -> None:
    async with KubeClient(Endpoint(server=api.url), metrics) as kube:
        node = Node(api, kube, taint=Taint(TAINT.key, TAINT.effect, "agent"), label=None)
        node.object["spec"]["taints"] = [dict(OURS, value="boot"), dict(OURS, effect="NoExecute")]
        await node.after(0)
        await node.after(31)
        assert node.taints == [dict(OURS, effect="NoExecute"), dict(OURS, value="agent")]
        node.registered.set()
        await node.after(0)
        assert node.taints == [dict(OURS, effect="NoExecute")]
        assert "opencdi.io/devices" not in node.labels


@pytest.mark.parametrize(
    ("status", "options", "quiet_s", "again_s"),
    [
        (500, {}, 0.5, 1.5),
        (404, {}, 0.5, 1.5),
        (403, {}, 400, 800),
        (429, {"Retry_After": "100"}, 70, 130),
    ],
)
async def test_a_server_that_refuses_is_left_alone_for_a_while(
    node: Node, status: int, options: dict[str, str], quiet_s: float, again_s: float
) -> None:
    node.api.mood(status, "Whatever", **options)
    node.registered.set()
    assert await node.after(0) == ["GET"]
    assert await node.after(quiet_s) == []
    node.registered.clear()  # whatever happens meanwhile
    assert await node.after(0) == []
    node.registered.set()
    assert await node.after(again_s - quiet_s) == ["GET", "PATCH"]


async def test_a_server_that_is_away_is_asked_less_and_less(
    node: Node, caplog: pytest.LogCaptureFixture, metrics: Metrics
) -> None:
    caplog.set_level("INFO")
    await node.api.stop()
    node.registered.set()
    asked = 0
    for _ in range(600):
        before = node.readiness._failures
        await node.after(1)
        asked += node.readiness._failures - before
    assert 12 <= asked <= 20, "1, 2, 4 ... 60 s"
    assert len([r for r in caplog.records if "cannot be told" in r.message]) == 1
    await node.api.start()
    for _ in range(76):
        await node.after(1)
    assert node.labels["opencdi.io/devices"] == "ready" and "was told again" in caplog.text


async def test_an_answer_that_is_no_node_is_a_failure(node: Node) -> None:
    node.api.moods.append((200, {"kind": "Status"}, {}))
    node.registered.set()
    assert await node.after(0) == ["GET"]
    assert await node.after(2) == ["GET", "PATCH"]


async def test_nothing_is_asked_for_without_a_taint_and_a_label(api: ApiServer, metrics: Metrics) -> None:
    async with KubeClient(Endpoint(server=api.url), metrics) as kube:
        async with asyncio.timeout(5):
            await Readiness(kube, "node-1", asyncio.Event()).run()
    assert not api.calls


async def test_a_daemon_that_stops_changes_nothing_and_its_successor_neither(api: ApiServer, metrics: Metrics) -> None:
    async with KubeClient(Endpoint(server=api.url), metrics) as kube:
        first = Node(api, kube, monotonic=None, look_s=0.01)
        first.registered.set()
        task = asyncio.create_task(first.readiness.run())
        await api.until(calls=2)
        first.registered.clear()  # as the Registrar does when it ends
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
        before = copy.deepcopy(first.object)
        registered = asyncio.Event()
        second = Readiness(kube, "node-1", registered, taint=TAINT, label=LABEL, look_s=0.01)
        task = asyncio.create_task(second.run())
        registered.set()
        await api.until(calls=3)
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
    assert [method for method, _ in api.calls] == ["GET", "PATCH", "GET"]
    assert first.object == before
