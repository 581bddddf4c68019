"""One JSON object a line, over a Unix socket: how the guest's programs, and QEMU itself (QMP), are spoken to.

`Lines` owns the connection and reads it until the end; who uses it says what a line means.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

MAX_LINE_BYTES = 16 << 20
CONNECT_TIMEOUT_S = 20.0
CONNECT_POLL_S = 0.02


class Gone(Exception):
    """The other side has closed the connection."""


class Lines:
    """`take` gets every object that arrives, in order. `run()` reads until the end; what waits for an answer then gets Gone."""

    def __init__(self, name: str, take: Callable[[dict[str, Any]], None]) -> None:
        self.name = name
        self._take = take
        self._writer: asyncio.StreamWriter | None = None
        self._reader: asyncio.StreamReader | None = None
        self._waiting: set[asyncio.Future[Any]] = set()
        self._ended = False

    async def connect(self, socket: Path) -> None:
        """Connect, as soon as QEMU has made the socket. Raises TimeoutError."""
        async with asyncio.timeout(CONNECT_TIMEOUT_S):
            while self._writer is None:
                with contextlib.suppress(FileNotFoundError, ConnectionRefusedError):
                    self._reader, self._writer = await asyncio.open_unix_connection(socket, limit=MAX_LINE_BYTES)
                    return
                await asyncio.sleep(CONNECT_POLL_S)

    async def run(self) -> None:
        """Read until the other side ends; one that speaks garbage ends with ValueError."""
        assert self._reader is not None
        try:
            with contextlib.suppress(ConnectionError):
                while line := await self._reader.readline():
                    self._take(json.loads(line))
        finally:
            self._ended = True
            for future in self._waiting:
                if not future.done():
                    future.set_exception(Gone(f"{self.name} has closed the connection"))
            self.close()

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()

    async def send(self, message: dict[str, Any]) -> None:
        if self._writer is None or self._ended:
            raise Gone(f"{self.name} is not connected")
        self._writer.write(json.dumps(message).encode() + b"\n")
        with contextlib.suppress(ConnectionError):  # run() sees it too, and tells who waits
            await self._writer.drain()

    async def answer(self, future: asyncio.Future[Any], timeout_s: float) -> Any:
        """Wait for a future that `take` will complete. Raises Gone, TimeoutError."""
        if self._ended:
            raise Gone(f"{self.name} has closed the connection")
        self._waiting.add(future)
        try:
            async with asyncio.timeout(timeout_s):
                return await future
        finally:
            self._waiting.discard(future)


class Calls(Lines):
    """Requests with a number, answers with the same number, in any order; other objects go to `told`."""

    def __init__(self, name: str, told: Callable[[dict[str, Any]], None] = lambda _: None) -> None:
        super().__init__(name, self._on_object)
        self._told = told
        self._numbers = 0
        self._open: dict[int, asyncio.Future[dict[str, Any]]] = {}

    async def call(self, request: dict[str, Any], timeout_s: float) -> dict[str, Any]:
        """The answer. Raises Gone, TimeoutError."""
        self._numbers += 1
        number, future = self._numbers, asyncio.get_running_loop().create_future()
        self._open[number] = future
        try:
            await self.send({"id": number, **request})
            answer: dict[str, Any] = await self.answer(future, timeout_s)
            return answer
        finally:
            del self._open[number]

    def _on_object(self, message: dict[str, Any]) -> None:
        future = self._open.get(message.get("id", 0))
        if future is not None and not future.done():
            future.set_result(message)
        elif "id" not in message:
            self._told(message)
