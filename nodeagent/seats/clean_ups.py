"""Clean-ups: what happens to a device between two holders, once for each lease that a container had.

The end of such a lease and the note that a clean-up is due are one commit (devices/leases.py); the note goes when the clean-up
has run. So a crash at any point repeats a clean-up that was interrupted and never one that was finished, and the device
is nobody's until then: a next pod is bound after it, or after CLEAN_UP_S when the device hangs.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Collection, Iterable

from nodeagent.devices.clean_up import clean_up
from nodeagent.devices.leases import Leases
from nodeagent.devices.slow_calls import SlowCalls
from nodeagent.errors import AgentError
from nodeagent.host import HostRoot
from nodeagent.metrics import Metrics
from nodeagent.model import CleanUp, Device, Give, PodRef
from nodeagent.seats.roster import CLEAN_UP_S, Roster

log = logging.getLogger(__name__)

Hook = Callable[[CleanUp], Awaitable[str]]
"""Does it; returns what was done, for the log. Raises AgentError or OSError when the device refuses."""


def device_hook(host: HostRoot, slow: SlowCalls, find: Callable[[CleanUp], tuple[Device, Give] | None]) -> Hook:
    """The device side: `find` knows the device, if it is there, and how it was given."""

    async def hook(due: CleanUp) -> str:
        found = find(due)
        if found is None:
            return ""
        reports = await clean_up(host, *found, slow)
        if failed := next((r.error for r in reports if r.error is not None), None):
            raise failed
        return "; ".join(r.did for r in reports)

    return hook


class CleanUps:
    """Runs what is due, one at a time for each device."""

    def __init__(
        self, *, leases: Leases, roster: Roster, hook: Hook, metrics: Metrics, tasks: asyncio.TaskGroup,
        timeout_s: float = CLEAN_UP_S,
    ) -> None:  # fmt: skip
        self._leases, self._roster, self._hook, self._metrics = leases, roster, hook, metrics
        self._tasks, self._timeout_s = tasks, timeout_s
        self._running: dict[str, asyncio.Task[None]] = {}

    async def before(self, ids: Iterable[str], pod: PodRef) -> None:
        """Wait until nothing of an earlier pod is left on `ids`, as far as no seat has them still.

        What the same pod left is its own if it is bound again: its seat goes on (Leases.bind strikes it out); only one that
        has begun is waited for.
        """
        wanted = set(ids) - self._roster.device_ids
        others = {x.device_id for x in self._leases.clean_ups if x.device_id in wanted and x.pod_uid != pod.uid}
        if tasks := {self._start(i) for i in others} | {t for i, t in self._running.items() if i in wanted}:
            await asyncio.wait(tasks)

    def of_dead(self, alive: Collection[str]) -> None:
        """Begin what pods that are gone left behind; does not wait."""
        for due in self._leases.clean_ups:
            if due.pod_uid not in alive and due.device_id not in self._roster.device_ids:
                self._start(due.device_id)

    def _start(self, device_id: str) -> asyncio.Task[None]:
        task = self._running.get(device_id)
        if task is None:
            task = self._running[device_id] = self._tasks.create_task(
                self._run(device_id), name=f"clean up {device_id}"
            )
            task.add_done_callback(lambda _: self._running.pop(device_id, None))
        return task

    async def _run(self, device_id: str) -> None:
        await self._roster.settled([device_id])
        due = [x for x in self._leases.clean_ups if x.device_id == device_id]
        if not due:
            return
        result, said = "ok", ""
        try:
            async with asyncio.timeout(self._timeout_s):
                said = await self._hook(due[-1])
        except TimeoutError:
            result, said = "timeout", f"cut off after {self._timeout_s:.0f} s"
        except (AgentError, OSError) as error:
            result, said = "failed", str(error)
        self._metrics.clean_ups.labels(result).inc()
        log.log(
            logging.INFO if result == "ok" else logging.ERROR, "clean-up of %s: %s", device_id, said or "nothing to do"
        )
        try:
            await self._leases.cleaned(due)
        except AgentError as error:
            log.error("the clean-up of %s is done but not noted, and will be repeated: %s", device_id, error)
