"""Pods that hold a slot they may not have: noted, told once, measured, and evicted where `devices.on_refusal` says so.

The kubelet hands a device out before anybody asks us, so a refused pod keeps it from others for as long as it lives. One
that was refused `HELD_AFTER` times is not a passing misunderstanding: it is in `refused_holding_seconds`, and may be evicted.

`run` evicts, level-triggered: what is due is looked up anew each time, a few at once and then one a minute. It never evicts a
pod that was admitted meanwhile, one whose identity could not be learned, or a static pod.
"""

from __future__ import annotations

import asyncio
import logging
import re
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping
from typing import Literal, Protocol

import msgspec

from nodeagent.errors import AgentError, Reason
from nodeagent.metrics import Metrics
from nodeagent.model import PodRef
from nodeagent.report.kube import BUDGET, ApiError

log = logging.getLogger(__name__)

HELD_AFTER = 3
SEEN_AGAIN_S = 10.0
"""A container that runs without its devices is refused anew after this; the kubelet's first back-off is as long."""
LOOK_S = 2.0
BURST = 3
REFILL_S = 60.0
AGAIN_S = 60.0
"""After a try that did not end the pod."""
ENDING_S = 600.0
"""An evicted pod may take its termination grace period; and what the API server forbids is asked for again after this."""
VERDICTS = frozenset(
    {
        Reason.NAMESPACE_NOT_ALLOWED,
        Reason.LABELS_DO_NOT_MATCH,
        Reason.SERVICE_ACCOUNT_NOT_ALLOWED,
        Reason.SANDBOX_NOT_ALLOWED,
    }
)
"""Reasons that lie in the pod, and that another try will not change."""
STATIC_UID = re.compile(r"[0-9a-f]{32}")
"""The kubelet makes the uid of a static pod: an MD5 (pkg/kubelet/config/common.go). The API server makes UUIDs."""

Result = Literal["evicted", "gone", "not_now", "failed"]
Evict = Callable[[PodRef], Awaitable[bool]]
"""Ends exactly this pod, False when it is gone already; raises ApiError (report.kube.KubeClient.evict)."""


class Reporter(Protocol):
    """Where Events about pods go."""

    def pod_event(self, pod: PodRef, reason: Reason | str, message: str, *, warning: bool = True) -> None: ...


class Refusal(msgspec.Struct, frozen=True, kw_only=True):
    """A pod that holds a slot it may not have."""

    slot: str
    resource: str
    pod: PodRef
    rules: tuple[str, ...]
    """The rules that offer the devices of the slot."""
    reason: Reason
    """Of the last refusal, as `message`."""
    message: str
    since_s: float
    """Of the first refusal, Unix seconds."""
    count: int
    told: frozenset[Reason] = frozenset()
    """Reasons that an Event named already."""


class Allowance:
    """A token bucket: `BURST` at once, then one in `REFILL_S`."""

    def __init__(self, monotonic: Callable[[], float]) -> None:
        self._monotonic = monotonic
        self._left = float(BURST)
        self._as_of_s = monotonic()

    @property
    def left(self) -> float:
        now_s = self._monotonic()
        self._left = min(BURST, self._left + (now_s - self._as_of_s) / REFILL_S)
        self._as_of_s = now_s
        return self._left

    def take(self) -> None:
        self._left = self.left - 1


class Refusals:
    """What Binding notes, by slot. `evict` None: there is no API server.

    `evicting` tells whether `on_refusal` is `evict` now, `admitted` whether a pod has its seat in a slot after all: it was let
    in a moment ago, or under an earlier `to:`.
    """

    def __init__(
        self,
        *,
        report: Reporter,
        metrics: Metrics,
        evict: Evict | None = None,
        evicting: Callable[[], bool] = lambda: False,
        admitted: Callable[[str, PodRef], bool] = lambda slot, pod: False,
        now: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._report, self._metrics = report, metrics
        self._evict, self._evicting, self._admitted = evict, evicting, admitted
        self._now, self._monotonic = now, monotonic
        self._rows: dict[str, Refusal] = {}
        self._counted_s: dict[str, float] = {}  # slot -> when its refusal was last counted
        self._not_before_s: dict[str, float] = {}  # pod uid -> when to look at it again
        self._announced: set[str] = set()  # pod uids
        self._allowance = Allowance(monotonic)
        self._quiet_until_s = float("-inf")

    @property
    def rows(self) -> tuple[Refusal, ...]:
        """Every refused pod by slot, the oldest first."""
        return tuple(sorted(self._rows.values(), key=lambda r: (r.since_s, r.slot)))

    def note(
        self, slot: str, resource: str, rules: Iterable[str], pod: PodRef, error: AgentError, *, attempt: bool
    ) -> bool:
        """A pod was refused a slot. True when that is news: it was not refused before, or for another reason.

        `attempt`: the kubelet asked. Otherwise its container was seen to run all the same, which counts every `SEEN_AGAIN_S`.
        """
        known = self._rows.get(slot)
        if known is not None and known.pod != pod:
            self.clear(slot)
            known = None
        news = known is None or known.reason is not error.reason
        elapsed_s = self._monotonic() - self._counted_s.get(slot, float("-inf"))
        counts = attempt or elapsed_s >= SEEN_AGAIN_S
        if counts:
            self._counted_s[slot] = self._monotonic()
        told = known.told if known else frozenset()
        if error.reason not in told and not self._said_of_another_slot(slot, pod, error):
            self._report.pod_event(pod, error.reason, str(error))
        self._rows[slot] = Refusal(
            slot=slot,
            resource=resource,
            pod=pod,
            rules=tuple(sorted(set(rules))),
            reason=error.reason,
            message=error.message,
            since_s=known.since_s if known else self._now(),
            count=(known.count if known else 0) + counts,
            told=told | {error.reason},
        )
        if news:
            self._metrics.denied.labels(error.reason.value).inc()
            log.warning("refused: %s", error)
        return news

    def clear(self, slot: str) -> None:
        """The slot is free, or its pod may have it now."""
        row = self._rows.pop(slot, None)
        self._counted_s.pop(slot, None)
        if row is not None and all(r.pod.uid != row.pod.uid for r in self._rows.values()):
            self._not_before_s.pop(row.pod.uid, None)
            self._announced.discard(row.pod.uid)

    def measure(self, resources: Iterable[str]) -> None:
        """Set the gauge for each of `resources`: the longest time one of its devices is held by a pod that was refused thrice."""
        now_s = self._now()
        for resource in resources:
            held = [now_s - r.since_s for r in self._rows.values() if r.resource == resource and r.count >= HELD_AFTER]
            self._metrics.refused_holding.labels(resource).set(max([0.0, *held]))

    async def run(self) -> None:
        """Evict what is due until cancelled."""
        while True:
            await self.step()
            await asyncio.sleep(LOOK_S)

    async def step(self) -> None:
        """Look once. Raises nothing for the API server."""
        if not self._evicting():
            return
        self._say_static()
        while self._evict is not None and self._monotonic() >= self._quiet_until_s and self._allowance.left >= 1:
            row = next_to_evict(self.rows, self._monotonic(), self._not_before_s)
            if row is None:
                return
            await self._evict_one(row, self._evict)

    async def _evict_one(self, row: Refusal, evict: Evict) -> None:
        uid = row.pod.uid
        self._not_before_s[uid] = self._monotonic() + AGAIN_S
        if any(self._admitted(r.slot, r.pod) for r in self._rows.values() if r.pod.uid == uid):
            return
        if uid not in self._announced:
            self._announced.add(uid)
            self._report.pod_event(row.pod, "evicting_refused_pod", self._why(row))
        result: Result = "failed"
        wait_s = AGAIN_S
        try:
            result = "evicted" if await evict(row.pod) else "gone"
        except ApiError as error:
            if error.status == 429:
                result = "not_now"
                wait_s = max(wait_s, error.retry_after_s or 0.0)
            elif error.status == 403:
                wait_s = ENDING_S
            if BUDGET not in error.causes:  # it says nothing about this pod, so the others need not try
                self._quiet_until_s = self._monotonic() + wait_s
            log.warning("pod %s cannot be evicted now: %s", row.pod, error)
        if result == "evicted":
            self._allowance.take()
            wait_s = ENDING_S
            log.warning("evicted pod %s: %s", row.pod, self._why(row))
        self._metrics.evictions.labels(result).inc()
        if any(r.pod.uid == uid for r in self._rows.values()):
            self._not_before_s[uid] = self._monotonic() + wait_s

    def _why(self, row: Refusal) -> str:
        rules = ", ".join(f"'{rule}'" for rule in row.rules) or "the rules"
        return (
            f"it was refused {row.count} times ({row.reason.value}) by rule {rules} and has held a device of {row.resource}"
            f" for {max(0.0, self._now() - row.since_s):.0f} s"
        )

    def _say_static(self) -> None:
        for row in self.rows:
            if deserves(row) and is_static(row.pod) and row.pod.uid not in self._announced:
                self._announced.add(row.pod.uid)
                self._report.pod_event(
                    row.pod,
                    "static_pod_not_evicted",
                    f"{self._why(row)}; a static pod cannot be evicted: change its manifest on the node",
                )

    def _said_of_another_slot(self, slot: str, pod: PodRef, error: AgentError) -> bool:
        said = (pod, error.reason, error.message)
        return any((r.pod, r.reason, r.message) == said for r in self._rows.values() if r.slot != slot)


def is_static(pod: PodRef) -> bool:
    """Whether the kubelet made the pod from a file or a URL. The API server has a mirror of it; evicting that ends nothing."""
    return STATIC_UID.fullmatch(pod.uid) is not None


def deserves(row: Refusal) -> bool:
    """Whether a refused pod may be evicted at all."""
    return row.count >= HELD_AFTER and row.reason in VERDICTS


def next_to_evict(rows: Iterable[Refusal], now_s: float, not_before_s: Mapping[str, float]) -> Refusal | None:
    """The one that has held its device longest. `not_before_s`: pod uid -> when it may be looked at again."""
    due = [
        r for r in rows if deserves(r) and not is_static(r.pod) and not_before_s.get(r.pod.uid, float("-inf")) <= now_s
    ]
    return min(due, key=lambda r: r.since_s, default=None)
