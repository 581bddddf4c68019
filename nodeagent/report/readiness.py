"""Readiness of the node, told to the scheduler: a taint while the devices are not offered, a label while they are.

Level-triggered: what the node has is compared with what it should have when that changes, and every few minutes since others
write nodes too. While the kubelet has all our resources the taint is absent and the label present. When it has not had them
for `GRACE_S` it is the other way round; until then nothing is changed, so that a restart of the kubelet or of the daemon, or one
daemon that follows another, does not flap. A daemon that stops changes nothing: its successor finds what it left.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable
from typing import Any

from nodeagent.marks import Label, Taint
from nodeagent.report.kube import ApiError, KubeClient, NodeState

log = logging.getLogger(__name__)

GRACE_S = 30.0
"""A successor is registered about two seconds after its predecessor left, and a kubelet restart takes a few more."""
LOOK_S = 1.0
RECHECK_S = 300.0
"""Spread by a quarter, so that the nodes of a cluster do not ask in step."""
REFUSED_S = 600.0
"""What the API server forbids is asked for again after this: roles get mended."""
BACKOFF_S = (1.0, 60.0)
CONFLICTS = 5
"""A kubelet and several controllers write nodes too; a change that comes too late is made anew at once, so often."""


class Readiness:
    """Keeps `taint` and `label` of one node as they should be while `run()` lives. `registered` is the Registrar's event.

    `monotonic` is the clock of the grace; by default the loop's.
    """

    def __init__(
        self,
        api: KubeClient,
        node: str,
        registered: asyncio.Event,
        *,
        taint: Taint | None = None,
        label: Label | None = None,
        grace_s: float = GRACE_S,
        look_s: float = LOOK_S,
        recheck_s: float = RECHECK_S,
        backoff_s: tuple[float, float] = BACKOFF_S,
        monotonic: Callable[[], float] | None = None,
    ) -> None:
        self._api, self._node, self._registered = api, node, registered
        self._taint, self._label = taint, label
        self._grace_s, self._look_s, self._recheck_s, self._backoff_s = grace_s, look_s, recheck_s, backoff_s
        self._monotonic = monotonic
        self._lost_s: float | None = None
        """Since when the resources are not registered."""
        self._told: bool | None = None
        """What the node is known to say."""
        self._due_s = float("-inf")
        """When the API server may be asked again, or is to be."""
        self._failures = 0

    async def run(self) -> None:
        """Until cancelled, which changes nothing at the node. Returns at once when there is neither taint nor label."""
        if self._taint is None and self._label is None:
            return
        while True:
            await self.step()
            if self._registered.is_set():
                await asyncio.sleep(self._look_s)
                continue
            try:
                async with asyncio.timeout(self._look_s):
                    await self._registered.wait()  # pods wait for this; nobody waits for the loss
            except TimeoutError:
                pass

    async def step(self) -> None:
        """Compare once, and ask the API server if there is a reason to. Raises nothing for the server."""
        now_s = self._now()
        ready = self._ready(now_s)
        if ready is None:
            return
        changed = ready is not self._told and not self._failures
        if not changed and now_s < self._due_s:
            return
        try:
            await self._bring(ready)
        except ApiError as error:
            self._failed(error)
            return
        if self._failures:
            log.info("node %s: the API server was told again whether devices are offered", self._node)
        self._failures, self._told = 0, ready
        self._due_s = self._now() + self._recheck_s * random.uniform(0.75, 1.25)  # noqa: S311

    def _ready(self, now_s: float) -> bool | None:
        """Whether devices are offered; None while that is not sure."""
        if self._registered.is_set():
            self._lost_s = None
            return True
        if self._lost_s is None:
            self._lost_s = now_s
        return False if now_s - self._lost_s >= self._grace_s else None

    async def _bring(self, ready: bool) -> None:
        """Make the node say it, if it does not. Raises ApiError."""
        for attempt in range(CONFLICTS):
            change = change_for(await self._api.node(self._node), self._taint, self._label, ready=ready)
            if change is None:
                return
            try:
                await self._api.patch_node(self._node, change)
            except ApiError as error:
                if error.status != 409 or attempt == CONFLICTS - 1:
                    raise
            else:
                log.info("node %s now says that its devices are %s", self._node, "offered" if ready else "not offered")
                return

    def _failed(self, error: ApiError) -> None:
        shortest, longest = self._backoff_s
        wait_s = min(longest, shortest * float(1 << min(self._failures, 16)))
        if error.status == 403:
            wait_s = REFUSED_S
        self._failures += 1
        if self._failures == 1:
            log.warning("node %s cannot be told whether devices are offered: %s", self._node, error)
        wait_s = max(wait_s, error.retry_after_s or 0.0)
        self._due_s = self._now() + wait_s * random.uniform(0.75, 1.25)  # noqa: S311

    def _now(self) -> float:
        return self._monotonic() if self._monotonic else asyncio.get_running_loop().time()


def change_for(node: NodeState, taint: Taint | None, label: Label | None, *, ready: bool) -> dict[str, Any] | None:
    """The JSON merge patch that makes the node say whether it is ready; None when it does already.

    `spec.taints` has no merge key (core/v1 types.go), so any patch of it replaces the whole list. The patch therefore names the
    version of the Node that was read: the API server refuses it (409) if anybody wrote the node meanwhile.
    """
    change: dict[str, Any] = {}
    if taint is not None:
        others = [t.raw for t in node.taints if (t.taint.key, t.taint.effect) != (taint.key, taint.effect)]
        if ready and len(others) < len(node.taints):
            change["spec"] = {"taints": others}
        elif not ready and taint not in [t.taint for t in node.taints]:
            ours = {"key": taint.key, "effect": taint.effect, **({"value": taint.value} if taint.value else {})}
            change["spec"] = {"taints": [*others, ours]}
    metadata: dict[str, Any] = {"resourceVersion": node.resource_version}
    if label is not None:
        has = node.labels.get(label.key)
        if ready and has != label.value:
            metadata["labels"] = {label.key: label.value}
        elif not ready and has == label.value:  # another value is somebody else's word
            metadata["labels"] = {label.key: None}
    if "spec" not in change and "labels" not in metadata:
        return None
    return {"metadata": metadata, **change}
