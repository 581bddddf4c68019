"""QEMU's machine protocol (QMP, docs/interop/qmp-spec): commands one after the other, and events that are waited for."""

from __future__ import annotations

import asyncio
from collections import deque
from pathlib import Path
from typing import Any

from tests.vm.lines import Lines
from tests.vm.rootfs import LabFailed

COMMAND_TIMEOUT_S = 30.0
KEPT_EVENTS = 256


class Qmp(Lines):
    """`connect()` first, `run()` in a task, then `start()`."""

    def __init__(self) -> None:
        super().__init__("QEMU", self._on_object)
        self._one = asyncio.Lock()
        self._reply: asyncio.Future[dict[str, Any]] | None = None
        self._events: deque[dict[str, Any]] = deque(maxlen=KEPT_EVENTS)
        self._expected: list[tuple[str, str, asyncio.Future[None]]] = []

    async def start(self, socket: Path) -> None:
        await self.connect(socket)

    async def execute(self, command: str, **arguments: Any) -> Any:
        """One command; its `return`. Raises LabFailed with QEMU's own words."""
        async with self._one:
            self._reply = asyncio.get_running_loop().create_future()
            # QEMU spells its names with hyphens: `node_name` is written node-name.
            await self.send({"execute": command, "arguments": {k.replace("_", "-"): v for k, v in arguments.items()}})
            reply = await self.answer(self._reply, COMMAND_TIMEOUT_S)
        if "error" in reply:
            raise LabFailed(f"{command} {arguments}: {reply['error']['desc']}")
        return reply["return"]

    def expect(self, event: str, device: str) -> asyncio.Future[None]:
        """A future for an event about a device; ask for it before the command that leads to it."""
        future = asyncio.get_running_loop().create_future()
        self._expected.append((event, device, future))
        return future

    def _on_object(self, message: dict[str, Any]) -> None:
        if "event" in message:
            self._events.append(message)
            for expected in list(self._expected):
                event, device, future = expected
                if message["event"] == event and message.get("data", {}).get("device") == device:
                    self._expected.remove(expected)
                    if not future.done():
                        future.set_result(None)
        elif self._reply is not None and not self._reply.done() and "QMP" not in message:
            self._reply.set_result(message)
