"""Kubernetes Events about pods and this node: what happened to a desktop, where its owner looks for it.

    pod_event() -> bounded queue -> outbox (disk) -> API server

`pod_event` and `node_event` never wait: they may be called from anywhere in the loop. One object may cause `BURST`
Events and then one a minute, as Kubernetes' own recorder limits it; what is over that, and what finds the queue full,
is counted in `dropped_total{queue="events"}`. Without an API server Events are logged and stay in the outbox.

core/v1 Events, because every API server and every `kubectl describe` of the supported range knows them.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import random
import re
import time
from collections import OrderedDict
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Literal

import msgspec

from nodeagent.errors import Reason
from nodeagent.metrics import Metrics
from nodeagent.model import PodRef
from nodeagent.report.kube import ApiError, KubeClient
from nodeagent.report.outbox import Outbox, Report

log = logging.getLogger(__name__)

COMPONENT = "nodeagent"
MAX_WAITING = 256
MAX_NOTE_BYTES = 1024
"""The API server refuses a longer note (validation of events.k8s.io/v1, NoteLengthLimit)."""
BURST = 25
REFILL_S = 60.0
MAX_OBJECTS = 1024
"""Objects whose allowance is remembered."""
PACE_S = 0.1
"""Between two calls: a node that comes back after a day must not flood the API server."""
REPEAT_S = 60.0
"""A repetition is reported once a minute at most."""
REFUSED_S = 600.0
"""What the API server forbids is asked for again after this: roles get mended."""
BACKOFF_S = (1.0, 60.0)


class Involved(msgspec.Struct, frozen=True, kw_only=True):
    """What an Event is about (core/v1 ObjectReference)."""

    kind: Literal["Pod", "Node"]
    name: str
    uid: str
    namespace: str = ""


class Note(msgspec.Struct, frozen=True, kw_only=True):
    """An Event before it has a name and a count: the body that waits in the outbox."""

    about: Involved
    reason: str
    message: str
    warning: bool = True

    @property
    def namespace(self) -> str:
        """Events about things without a namespace live in `default` (core/v1 event validation)."""
        return self.about.namespace or "default"


class Events:
    """Takes Events from the daemon; `run()` stores and sends them. `api` None: there is no API server, Events are
    only logged."""

    def __init__(
        self,
        outbox: Outbox,
        node: str,
        metrics: Metrics,
        api: KubeClient | None = None,
        *,
        now: Callable[[], float] = time.time,
        pace_s: float = PACE_S,
        backoff_s: tuple[float, float] = BACKOFF_S,
    ) -> None:
        self._outbox = outbox
        self._node = node
        self._metrics = metrics
        self._api = api
        self._now = now
        self._pace_s = pace_s
        self._backoff_s = backoff_s
        self._failures = 0
        self._waiting: asyncio.Queue[tuple[float, Note]] = asyncio.Queue(MAX_WAITING)
        self._stored = asyncio.Event()
        self._allowance: OrderedDict[str, tuple[float, float]] = OrderedDict()
        """Object -> (Events it may still cause, as of when)."""

    def pod_event(self, pod: PodRef, reason: Reason | str, message: str, *, warning: bool = True) -> None:
        """Something happened to a pod. `reason` is a word in snake_case."""
        self._take(Involved(kind="Pod", name=pod.name, uid=pod.uid, namespace=pod.namespace), reason, message, warning)

    def node_event(self, reason: Reason | str, message: str, *, warning: bool = True) -> None:
        """Something happened to this node."""
        # The kubelet refers to its node by name in place of the uid, and `kubectl describe node` asks for that.
        self._take(Involved(kind="Node", name=self._node, uid=self._node), reason, message, warning)

    async def run(self) -> None:
        """Store and send until cancelled; what was taken by then is stored before it returns."""
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._store(), name="events to the outbox")
                if self._api is not None:
                    tasks.create_task(self._send(self._api), name="events to the API server")
        finally:
            while not self._waiting.empty():
                await self._keep(*self._waiting.get_nowait())

    def _take(self, about: Involved, reason: str, message: str, warning: bool) -> None:
        note = Note(about=about, reason=camel(reason), message=cut(message), warning=warning)
        if self._api is None:
            log.info("event %s about %s %s: %s", note.reason, about.kind, about.name, note.message)
            return
        if not self._allowed(about.uid):
            self._metrics.dropped.labels("events").inc()
            return
        try:
            self._waiting.put_nowait((self._now(), note))
        except asyncio.QueueFull:
            self._metrics.dropped.labels("events").inc()

    def _allowed(self, uid: str) -> bool:
        now = self._now()
        left, as_of = self._allowance.get(uid, (float(BURST), now))
        left = min(BURST, left + max(0.0, now - as_of) / REFILL_S)
        allowed = left >= 1
        self._allowance[uid] = (left - 1 if allowed else left, now)
        self._allowance.move_to_end(uid)
        if len(self._allowance) > MAX_OBJECTS:
            self._allowance.popitem(last=False)
        return allowed

    async def _store(self) -> None:
        while True:
            at_s, note = await self._waiting.get()
            await self._keep(at_s, note)
            self._stored.set()

    async def _keep(self, at_s: float, note: Note) -> None:
        text = f"{note.about.kind}/{note.about.uid}/{note.reason}/{note.warning}/{note.message}"
        key = hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
        await self._outbox.put(key, msgspec.json.encode(note), at_s)

    # ---- sending

    async def _send(self, api: KubeClient) -> None:
        while True:
            self._stored.clear()
            report = await self._outbox.due()
            if report is None:
                next_s = await self._outbox.next_due_s()
                wait_s = REFUSED_S if next_s is None else min(max(next_s - self._now(), self._pace_s), REFUSED_S)
                try:
                    async with asyncio.timeout(wait_s):
                        await self._stored.wait()
                except TimeoutError:
                    pass
                continue
            await asyncio.sleep(await self._send_one(api, report))

    async def _send_one(self, api: KubeClient, report: Report) -> float:
        """Send one report and return how long to wait before the next call."""
        note = msgspec.json.decode(report.body, type=Note)
        try:
            if report.sent_count == 0:
                await self._create(api, note, report)
            else:
                await api.patch_event(note.namespace, event_name(note, report), _progress(report))
        except ApiError as error:
            return await self._failed(note, report, error)
        self._failures = 0
        await self._outbox.sent(report, not_before_s=self._now() + REPEAT_S)
        return self._pace_s

    async def _create(self, api: KubeClient, note: Note, report: Report) -> None:
        try:
            await api.create_event(note.namespace, event(note, report, self._node))
        except ApiError as error:
            if error.status != 409:
                raise
            # It arrived before, and the daemon ended before it had noted that.
            await api.patch_event(note.namespace, event_name(note, report), _progress(report))

    async def _failed(self, note: Note, report: Report, error: ApiError) -> float:
        what = f"event {note.reason} about {note.about.kind} {note.about.name}"
        if error.status == 404 and report.sent_count > 0:
            await self._outbox.forgotten(report)  # it expired; the repetition is news again
            return self._pace_s
        if error.status == 404 or "NamespaceTerminating" in error.causes:
            log.info("%s dropped: namespace %s is gone", what, note.namespace)
            await self._outbox.drop(report)
            return self._pace_s
        if error.status in (400, 413, 422):
            log.error("%s dropped: %s", what, error)
            await self._outbox.drop(report)
            return self._pace_s
        if error.status in (403, 409):
            log.warning("%s refused, and tried again in %.0f min: %s", what, REFUSED_S / 60, error)
            await self._outbox.postpone(report, self._now() + REFUSED_S)
            return self._pace_s
        shortest, longest = self._backoff_s
        wait_s = min(longest, shortest * float(1 << min(self._failures, 16)))
        self._failures += 1
        if self._failures == 1:
            log.warning("reports wait for the API server: %s", error)
        # Spread, so that the nodes of a cluster do not come back in step.
        return max(error.retry_after_s or 0.0, wait_s) * random.uniform(0.75, 1.25)  # noqa: S311


def camel(word: str) -> str:
    """`namespace_not_allowed` -> `NamespaceNotAllowed`, the form of an Event's reason."""
    return "".join(part[:1].upper() + part[1:] for part in re.split(r"[^A-Za-z0-9]+", word))[:128]


def cut(message: str) -> str:
    """`message` in at most MAX_NOTE_BYTES of UTF-8."""
    data = message.encode(errors="replace")
    if len(data) <= MAX_NOTE_BYTES:
        return message
    return data[: MAX_NOTE_BYTES - 3].decode(errors="ignore") + "..."


def event_name(note: Note, report: Report) -> str:
    """The Event's name: the same at every attempt to send this report, and like no other's (RFC 1123, 253 characters)."""
    stem = note.about.name[:220].rstrip("-.")
    return f"{stem}.{int(report.first_s * 1e6):x}{report.id:x}"


def event(note: Note, report: Report, node: str) -> dict[str, object]:
    """The core/v1 Event object."""
    about: dict[str, object] = {
        "apiVersion": "v1",
        "kind": note.about.kind,
        "name": note.about.name,
        "uid": note.about.uid,
    }
    if note.about.namespace:
        about["namespace"] = note.about.namespace
    return {
        "apiVersion": "v1",
        "kind": "Event",
        "metadata": {"name": event_name(note, report), "namespace": note.namespace},
        "involvedObject": about,
        "reason": note.reason,
        "message": note.message,
        "type": "Warning" if note.warning else "Normal",
        "source": {"component": COMPONENT, "host": node},
        "reportingComponent": COMPONENT,
        "reportingInstance": node,
        "firstTimestamp": _time(report.first_s),
        **_progress(report),
    }


def _progress(report: Report) -> dict[str, object]:
    return {"count": report.count, "lastTimestamp": _time(report.last_s)}


def _time(moment_s: float) -> str:
    """metav1.Time: RFC 3339 in whole seconds."""
    return datetime.fromtimestamp(moment_s, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
