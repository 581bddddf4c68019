"""Refused pods: what is counted, told and measured, and which are evicted when."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nodeagent.errors import AgentError, Reason
from nodeagent.metrics import Metrics
from nodeagent.model import PodRef
from nodeagent.report.kube import ApiError
from nodeagent.seats import refusals as module
from nodeagent.seats.refusals import Refusal, Refusals, next_to_evict

PRINTER, UKEY = "opencdi.io/printer", "opencdi.io/ukey"
DESK = PodRef("office", "desk", "7f3c0000-0000-4000-8000-000000000001")
OTHER = PodRef("office", "other", "7f3c0000-0000-4000-8000-000000000002")
STATIC = PodRef("kube-system", "kiosk-node-1", "0123456789abcdef0123456789abcdef")


class RecordingReporter:
    def __init__(self) -> None:
        self.events: list[tuple[str, str, str]] = []

    def pod_event(self, pod: PodRef, reason: Reason | str, message: str, *, warning: bool = True) -> None:
        self.events.append((pod.name, str(reason), message))


class FakeCluster:
    """`evict` of an API server; `answers` say what the next calls meet: True, False, or an ApiError."""

    def __init__(self) -> None:
        self.asked: list[PodRef] = []
        self.answers: list[bool | ApiError] = []

    async def evict(self, pod: PodRef) -> bool:
        self.asked.append(pod)
        answer = self.answers.pop(0) if self.answers else True
        if isinstance(answer, ApiError):
            raise answer
        return answer


class Scene:
    def __init__(self, metrics: Metrics, evict: bool = True, api: bool = True) -> None:
        self.metrics, self.time_s, self.evicting = metrics, 1_000_000.0, evict
        self.report, self.cluster = RecordingReporter(), FakeCluster()
        self.admitted: set[tuple[str, PodRef]] = set()
        self.refusals = Refusals(
            report=self.report,
            metrics=metrics,
            evict=self.cluster.evict if api else None,
            evicting=lambda: self.evicting,
            admitted=lambda slot, pod: (slot, pod) in self.admitted,
            now=lambda: self.time_s,
            monotonic=lambda: self.time_s,
        )

    def refuse(
        self, pod: PodRef = DESK, slot: str = "s1", *, times: int = 1, reason: Reason = Reason.LABELS_DO_NOT_MATCH,
        resource: str = PRINTER, attempt: bool = True, rules: tuple[str, ...] = ("nurses",),
    ) -> bool:  # fmt: skip
        error = AgentError(reason, f"rule {rules} says {reason} to {pod}", hint="mend it")
        first, *_ = [self.refusals.note(slot, resource, rules, pod, error, attempt=attempt) for _ in range(times)]
        return first

    def value(self, name: str, **labels: str) -> float:
        self.refusals.measure([PRINTER, UKEY])
        return self.metrics.registry.get_sample_value(f"nodeagent_{name}", labels) or 0.0

    async def after(self, seconds: float) -> list[str]:
        """Let time pass and look once: the pods that the API server was asked to evict."""
        before = len(self.cluster.asked)
        self.time_s += seconds
        await self.refusals.step()
        return [pod.name for pod in self.cluster.asked[before:]]


@pytest.fixture
def scene(metrics: Metrics) -> Scene:
    return Scene(metrics)


# ---- what is noted


def test_a_reason_is_news_once_and_told_once(scene: Scene) -> None:
    assert scene.refuse()
    assert not scene.refuse(times=5)
    assert scene.report.events == [
        ("desk", "labels_do_not_match", f"rule ('nurses',) says labels_do_not_match to {DESK} (mend it)")
    ]
    assert scene.value("denied_total", reason="labels_do_not_match") == 1
    (row,) = scene.refusals.rows
    assert (row.count, row.rules, row.since_s, row.pod) == (6, ("nurses",), 1_000_000.0, DESK)


def test_reasons_that_take_turns_are_told_once_each(scene: Scene) -> None:
    for _ in range(4):
        assert scene.refuse(reason=Reason.IDENTITY_UNAVAILABLE)
        scene.time_s += 1
        assert scene.refuse(reason=Reason.SERVICE_ACCOUNT_NOT_ALLOWED)
    assert [reason for _, reason, _ in scene.report.events] == ["identity_unavailable", "service_account_not_allowed"]
    (row,) = scene.refusals.rows
    assert row.count == 8 and row.since_s == 1_000_000.0, "the device is held since the first refusal"


def test_two_containers_of_one_pod_get_one_event(scene: Scene) -> None:
    assert scene.refuse(slot="s1") and scene.refuse(slot="s2")
    assert len(scene.report.events) == 1
    scene.refuse(slot="s3", resource=UKEY, rules=("doctors",))
    assert len(scene.report.events) == 2, "another rule is another sentence"


def test_the_next_pod_of_a_slot_begins_anew(scene: Scene) -> None:
    scene.refuse(times=5)
    scene.time_s += 50
    assert scene.refuse(OTHER)
    (row,) = scene.refusals.rows
    assert (row.pod, row.count, row.since_s) == (OTHER, 1, 1_000_050.0)
    assert [pod for pod, _, _ in scene.report.events] == ["desk", "other"]


def test_a_container_that_runs_all_the_same_is_refused_every_ten_seconds(scene: Scene) -> None:
    for _ in range(10):
        scene.refuse(attempt=False)
        scene.time_s += 2
    assert scene.refusals.rows[0].count == 2
    scene.refuse(attempt=False)
    assert scene.refusals.rows[0].count == 3 and scene.value("refused_holding_seconds", resource=PRINTER) == 20


def test_holding_is_measured_from_the_first_refusal_once_there_were_three(scene: Scene) -> None:
    scene.refuse(times=2)
    scene.time_s += 30
    assert scene.value("refused_holding_seconds", resource=PRINTER) == 0
    scene.refuse()
    scene.refuse(OTHER, "s2", times=3)
    scene.time_s += 5
    assert scene.value("refused_holding_seconds", resource=PRINTER) == 35
    assert scene.value("refused_holding_seconds", resource=UKEY) == 0
    scene.time_s -= 100  # a clock that was set back
    assert scene.value("refused_holding_seconds", resource=PRINTER) == 0
    scene.refusals.clear("s1")
    scene.refusals.clear("s2")
    scene.refusals.clear("never")
    assert scene.value("refused_holding_seconds", resource=PRINTER) == 0 and not scene.refusals.rows


# ---- who is evicted


async def test_three_refusals_and_the_pod_is_evicted_once_with_an_event_first(scene: Scene) -> None:
    scene.refuse(times=2)
    assert await scene.after(60) == []
    scene.refuse()
    assert await scene.after(4) == ["desk"]
    name, reason, message = scene.report.events[-1]
    assert (name, reason) == ("desk", "evicting_refused_pod")
    assert "refused 3 times (labels_do_not_match) by rule 'nurses'" in message
    assert f"held a device of {PRINTER} for 64 s" in message
    assert scene.value("evictions_total", result="evicted") == 1
    for _ in range(10):
        scene.refuse()
        assert await scene.after(30) == [], "it is ending"
    assert len(scene.report.events) == 2


async def test_off_by_default_and_without_an_api_server(metrics: Metrics) -> None:
    for scene in (Scene(metrics, evict=False), Scene(metrics, api=False)):
        scene.refuse(times=9)
        assert await scene.after(60) == []
        assert len(scene.report.events) == 1
    plain = Refusals(report=scene.report, metrics=metrics, evict=scene.cluster.evict)
    for _ in range(3):
        plain.note("s", PRINTER, ("r",), DESK, AgentError(Reason.LABELS_DO_NOT_MATCH, ""), attempt=True)
    await plain.step()
    assert not scene.cluster.asked


@pytest.mark.parametrize("reason", Reason)
async def test_only_a_verdict_about_the_pod_evicts_it(scene: Scene, reason: Reason) -> None:
    scene.refuse(times=3, reason=reason)
    assert await scene.after(1) == (["desk"] if reason in module.VERDICTS else [])


def test_who_the_pod_is_must_be_known() -> None:
    assert Reason.IDENTITY_UNAVAILABLE not in module.VERDICTS


async def test_a_static_pod_is_told_and_left(scene: Scene) -> None:
    scene.refuse(STATIC, times=3)
    assert await scene.after(1) == [] and await scene.after(100) == []
    assert [reason for _, reason, _ in scene.report.events] == ["labels_do_not_match", "static_pod_not_evicted"]
    assert "change its manifest" in scene.report.events[-1][2]


async def test_a_pod_that_was_admitted_meanwhile_stays(scene: Scene) -> None:
    scene.refuse(times=3)
    scene.admitted.add(("s1", DESK))
    assert await scene.after(1) == []
    assert [reason for _, reason, _ in scene.report.events] == ["labels_do_not_match"]
    scene.refusals.clear("s1")
    scene.admitted.clear()
    assert await scene.after(100) == []


async def test_one_pod_with_two_slots_is_evicted_once(scene: Scene) -> None:
    scene.refuse(slot="s1", times=3)
    scene.refuse(slot="s2", resource=UKEY, times=3)
    assert await scene.after(1) == ["desk"]
    scene.refusals.clear("s1")
    assert await scene.after(1) == []
    assert scene.cluster.asked == [DESK]


async def test_three_at_once_then_one_a_minute(scene: Scene) -> None:
    pods = [PodRef("office", f"desk-{n}", f"uid-{n}") for n in range(6)]
    for n, pod in enumerate(pods):
        scene.refuse(pod, f"s{n}", times=3)
        scene.time_s += 1
    assert await scene.after(0) == ["desk-0", "desk-1", "desk-2"], "the longest holders first"
    assert await scene.after(59) == []
    assert await scene.after(1) == ["desk-3"]
    assert await scene.after(30) == [] and await scene.after(30) == ["desk-4"]


async def test_a_pod_that_is_gone_costs_nothing_of_the_allowance(scene: Scene) -> None:
    scene.cluster.answers = [False, True, True, True]
    for n in range(4):
        scene.refuse(PodRef("office", f"desk-{n}", f"uid-{n}"), f"s{n}", times=3)
    assert len(await scene.after(0)) == 4
    assert scene.value("evictions_total", result="gone") == 1 and scene.value("evictions_total", result="evicted") == 3


async def test_a_disruption_budget_is_waited_for_and_holds_up_nobody_else(scene: Scene) -> None:
    budget = ApiError("no", status=429, causes=("DisruptionBudget",))
    scene.cluster.answers = [budget]
    scene.refuse(times=3)
    scene.time_s += 1
    scene.refuse(OTHER, "s2", times=3)
    assert await scene.after(1) == ["desk", "other"]
    assert await scene.after(59) == []
    assert await scene.after(1) == ["desk"]
    assert (
        scene.value("evictions_total", result="not_now") == 1 and scene.value("evictions_total", result="evicted") == 2
    )
    assert [r for _, r, _ in scene.report.events].count("evicting_refused_pod") == 2, "each told once"


@pytest.mark.parametrize(
    ("error", "result", "quiet_s"),
    [
        (ApiError("away"), "failed", 60),
        (ApiError("oops", status=500), "failed", 60),
        (ApiError("busy", status=429, retry_after_s=200), "not_now", 200),
        (ApiError("no", status=403), "failed", 600),
    ],
)
async def test_a_server_that_does_not_is_left_alone_with_all_pods(
    scene: Scene, error: ApiError, result: str, quiet_s: float
) -> None:
    scene.cluster.answers = [error]
    scene.refuse(times=3)
    scene.refuse(OTHER, "s2", times=3)
    assert len(await scene.after(0)) == 1
    assert await scene.after(quiet_s - 1) == []
    assert len(await scene.after(1)) == 2
    assert scene.value("evictions_total", result=result) == 1


async def test_a_pod_that_goes_while_it_is_evicted_leaves_nothing_behind(scene: Scene) -> None:
    evict = scene.cluster.evict

    async def and_the_sandbox_is_gone(pod: PodRef) -> bool:
        scene.refusals.clear("s1")
        return await evict(pod)

    scene.refusals._evict = and_the_sandbox_is_gone
    scene.refuse(times=3)
    await scene.after(0)
    assert not scene.refusals._not_before_s and not scene.refusals._announced and not scene.refusals._counted_s


ROWS = st.lists(
    st.builds(
        Refusal,
        slot=st.text(max_size=3),
        resource=st.just(PRINTER),
        pod=st.sampled_from([DESK, OTHER, STATIC]),
        rules=st.just(("r",)),
        reason=st.sampled_from(Reason),
        message=st.just(""),
        since_s=st.floats(0, 100),
        count=st.integers(0, 5),
    ),
    max_size=6,
)


@given(ROWS, st.dictionaries(st.sampled_from([DESK.uid, OTHER.uid]), st.floats(0, 20)), st.floats(0, 20))
def test_the_choice(rows: list[Refusal], not_before_s: dict[str, float], now_s: float) -> None:
    chosen = next_to_evict(rows, now_s, not_before_s)
    may = [
        r
        for r in rows
        if r.count >= 3
        and r.reason in module.VERDICTS
        and r.pod is not STATIC
        and not_before_s.get(r.pod.uid, 0) <= now_s
    ]
    assert (chosen is None) == (not may)
    if chosen is not None:
        assert chosen in may and chosen.since_s == min(r.since_s for r in may)
