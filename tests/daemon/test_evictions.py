"""Evictions over real HTTP: exactly one pod, its disruption budget, and refused pods from note to end."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import pytest

from nodeagent.errors import AgentError, Reason
from nodeagent.metrics import Metrics
from nodeagent.model import PodRef
from nodeagent.report.endpoint import Endpoint
from nodeagent.report.kube import ApiError, KubeClient
from nodeagent.seats.refusals import AGAIN_S, Refusals
from tests.fakes.apiserver import ApiServer

DESK = PodRef("office", "desk-1", "7f3c")


@pytest.fixture
async def api() -> AsyncIterator[ApiServer]:
    async with ApiServer() as server:
        yield server


def pod(uid: str) -> dict[str, Any]:
    return {"metadata": {"uid": uid}}


def sample(metrics: Metrics, name: str, **labels: str) -> float:
    return metrics.registry.get_sample_value(name, labels) or 0.0


async def test_an_eviction_is_of_exactly_this_pod(api: ApiServer, metrics: Metrics) -> None:
    api.pods["office", "desk-1"] = pod("another")
    async with KubeClient(Endpoint(server=api.url), metrics) as kube:
        assert not await kube.evict(DESK), "the name belongs to another pod now"
        assert api.pods and not api.evicted
        api.pods["office", "desk-1"] = pod(DESK.uid)
        assert await kube.evict(DESK)
        assert api.evicted == [("office", "desk-1", DESK.uid)]
        assert not await kube.evict(DESK), "gone"


async def test_a_disruption_budget_is_an_answer_and_not_a_server_that_is_away(api: ApiServer, metrics: Metrics) -> None:
    api.pods["office", "desk-1"] = pod(DESK.uid)
    api.budgets.add(("office", "desk-1"))
    async with KubeClient(Endpoint(server=api.url), metrics) as kube:
        with pytest.raises(ApiError) as refused:
            await kube.evict(DESK)
        assert refused.value.status == 429 and refused.value.causes == ("DisruptionBudget",)
        assert sample(metrics, "nodeagent_apiserver_connected") == 1
        api.mood(429, "TooManyRequests", Retry_After="1")
        with pytest.raises(ApiError) as refused:
            await kube.evict(DESK)
        assert refused.value.retry_after_s == 1 and sample(metrics, "nodeagent_apiserver_connected") == 0


class RecordingReporter:
    def __init__(self) -> None:
        self.reasons: list[str] = []

    def pod_event(self, pod: PodRef, reason: Reason | str, message: str, *, warning: bool = True) -> None:
        self.reasons.append(str(reason))


async def test_a_refused_pod_outlives_its_budget_and_an_absent_server_and_no_more(
    api: ApiServer, metrics: Metrics
) -> None:
    time_s, report = 0.0, RecordingReporter()
    api.pods["office", "desk-1"] = pod(DESK.uid)
    api.budgets.add(("office", "desk-1"))
    async with KubeClient(Endpoint(server=api.url), metrics) as kube:
        refusals = Refusals(
            report=report, metrics=metrics, evict=kube.evict, evicting=lambda: True, monotonic=lambda: time_s
        )
        for _ in range(3):
            refusals.note("s1", "a/b", ("r",), DESK, AgentError(Reason.NAMESPACE_NOT_ALLOWED, "no"), attempt=True)
        await refusals.step()
        assert sample(metrics, "nodeagent_evictions_total", result="not_now") == 1
        api.budgets.clear()
        await api.stop()
        time_s += AGAIN_S
        await refusals.step()
        assert sample(metrics, "nodeagent_evictions_total", result="failed") == 1
        await api.start()
        time_s += AGAIN_S
        await refusals.step()
    assert api.evicted == [("office", "desk-1", DESK.uid)]
    assert report.reasons == ["namespace_not_allowed", "evicting_refused_pod"]
