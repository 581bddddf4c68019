"""How the root side of a service starts a program: the shape of the zygote's `spawn_program`, which is passed in."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Protocol

from nodeagent.wire.zygote import Limits

GRACE_S = 1.0


class Exit(Protocol):
    """How a program ended."""

    @property
    def code(self) -> int:
        """Exit status, or minus the signal that killed it."""
        ...


class Program(Protocol):
    """A running program."""

    pid: int

    async def wait(self) -> Exit:
        """How it ended; any number may wait."""
        ...

    def kill(self, number: int = ...) -> None:
        """Send a signal, SIGKILL if none is said; no effect after its end."""
        ...


class Spawn(Protocol):
    """Execute a program with duplicates of three descriptors. `uid` None stays root; `network` False: none but Unix sockets;
    `private_tmp_bytes`: a /tmp of its own; `hidden`: directories it finds empty.

    Raises AgentError or OSError with the cause when it cannot be executed."""

    async def __call__(
        self,
        argv: Sequence[str],
        *,
        uid: int | None,
        cgroup_procs: Sequence[Path],
        stdin: int,
        stdout: int,
        stderr: int,
        env: Mapping[str, str],
        network: bool,
        private_tmp_bytes: int = 0,
        hidden: Sequence[str] = (),
        limits: Limits = ...,
    ) -> Program: ...


@asynccontextmanager
async def listen_to_end(take: Callable[[bytes], object]) -> AsyncIterator[int]:
    """The write end of a pipe for a program's standard error; `take` gets what comes out of it.

    Yields the descriptor, which the caller hands to the program inside the block. When the block ends it is closed, what is
    still in the pipe is taken, and a descendant that keeps its end open is waited for GRACE_S.
    """
    loop = asyncio.get_running_loop()
    ended = loop.create_future()

    class Taker(asyncio.Protocol):
        def data_received(self, data: bytes) -> None:
            take(data)

        def connection_lost(self, error: Exception | None) -> None:
            if not ended.done():
                ended.set_result(None)

    out, into = os.pipe2(os.O_CLOEXEC)
    transport, _ = await loop.connect_read_pipe(Taker, os.fdopen(out, "rb", 0))
    try:
        yield into
    finally:
        os.close(into)
        try:
            await asyncio.wait({ended}, timeout=GRACE_S)
        finally:
            transport.close()
