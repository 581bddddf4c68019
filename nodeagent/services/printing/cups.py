"""The private cupsd: one per daemon, root's alone, on a socket that no pod sees. It spools device-ready bytes to devices.

cups = Cups(config.printing, state_dir, run_dir, zygote.spawn_program, metrics)
run()                 keeps it alive
set_queues(...)       which devices there are; told again to every new cupsd
submit(...) -> number     jobs() by key     cancel(number)
"""

from __future__ import annotations

import asyncio
import logging
import os
import re
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from nodeagent.config import PrintingConfig
from nodeagent.documents import Peer
from nodeagent.errors import AgentError, Reason
from nodeagent.metrics import Metrics
from nodeagent.model import Device
from nodeagent.services.printing.cups_client import CupsClient, CupsJob, CupsRefused, Queue
from nodeagent.services.printing.cups_files import SEARCH, CupsFiles
from nodeagent.services.printing.programs import Exit, Program, Spawn, listen_to_end

__all__ = ["Cups", "CupsJob", "CupsRefused", "Queue", "device_uri"]

log = logging.getLogger(__name__)

START_S = 10.0
"""To its first answer; measured: 0.03."""
STOP_S = 2.0
RESTART_DELAYS_S = (0.0, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
"""Before the nth start of one that keeps dying; a minute of life starts the row again."""
STEADY_S = 60.0
POLL_S = 0.005
"""Between two looks for its socket while it starts."""
PING_S = 15.0
"""Between two looks whether it still answers."""
MAX_LINE = 500
ENVIRONMENT = {
    "PATH": SEARCH,
    "LANG": "C.UTF-8",
    # colord and Avahi are not for these queues: a bus that is not there answers at once.
    "DBUS_SYSTEM_BUS_ADDRESS": "unix:path=/nonexistent",
}
NOWHERE = "opencdi:/nonexistent/"
"""Where the back end waits for ever; the file system hierarchy standard keeps that path free."""
_PLAIN_PATH = re.compile(r"/[A-Za-z0-9._/~+@=-]+\Z")


def device_uri(device: Device, state_dir: Path) -> str:
    """Where the bytes for this printer go: usblp's node, or the file of a simulated one; nowhere while it is unplugged.

    The USB device number goes with the node, because the next printer plugged in may get the same node before anybody has
    heard of it. Raises AgentError for a path that cannot be written in a URI.
    """
    if not device.present:
        return NOWHERE + device.id
    if device.usb.simulated:
        path, usb = str(state_dir / "simulated" / device.usb.serial / "output"), ""
    else:
        node = next((n.path for n in device.usb.nodes if n.subsystem == "usbmisc"), None)
        if node is None:
            return NOWHERE + device.id
        path, usb = node, next((n.path for n in device.usb.nodes if n.subsystem == "usb"), "")
    if not _PLAIN_PATH.match(path):
        raise AgentError(
            Reason.CONFIG_INVALID,
            f"cupsd cannot print to {path}",
            hint="letters, digits and ._/~+@=- only in state_dir",
        )
    if usb:
        bus, number = usb.split("/")[-2:]  # /dev/bus/usb/001/005 (kernel: drivers/usb/core/usb.c, usb_devnode)
        return f"opencdi:{path}?usb={int(bus)}/{int(number)}"
    return f"opencdi:{path}"


class Cups:
    """Methods that talk to cupsd raise CupsRefused for a no, AgentError(UPSTREAM_UNAVAILABLE) without an answer."""

    def __init__(self, config: PrintingConfig, state_dir: Path, run_dir: Path, spawn: Spawn, metrics: Metrics) -> None:
        self._files = CupsFiles(state_dir, run_dir, Path(config.server_bin))
        self._client = CupsClient(self._files.socket)
        self._spawn = spawn
        self._metrics = metrics
        self._queues: dict[str, Queue] = {}
        self._setting = asyncio.Lock()
        self._available = asyncio.Event()
        self._peer = Peer(name="cupsd", state="starting")

    @property
    def peer(self) -> Peer:
        """How it is, for people."""
        return self._peer

    @property
    def socket(self) -> Path:
        """Where it listens; for root only."""
        return self._files.socket

    async def available(self) -> None:
        """Wait until cupsd answers and has its queues."""
        await self._available.wait()

    async def set_queues(self, queues: Sequence[Queue]) -> None:
        """Make these the queues, now or as soon as cupsd is there. A queue that goes takes its jobs in cupsd with it."""
        self._queues = {queue.name: queue for queue in queues}
        if self._available.is_set():
            await self._set_queues()

    async def submit(self, queue: str, key: str, document: Path, copies: int = 1) -> int:
        """Print a device-ready file of the spool `copies` times; returns cupsd's number of the job.

        `key` names the job in `jobs()`, also after a crash between cupsd's yes and the caller's note of it.
        """
        return await self._client.submit(queue, key, document, copies)

    async def jobs(self, first: int = 1) -> dict[str, CupsJob]:
        """Jobs from cupsd's number `first` on, by key; finished ones for a day or until there are too many."""
        return await self._client.jobs(first)

    async def cancel(self, job: int) -> None:
        await self._client.cancel(job)

    async def run(self) -> None:
        """Keep cupsd alive until cancelled, then end it."""
        clock = asyncio.get_running_loop().time
        failures = 0
        try:
            while True:
                began = clock()
                cause = await self._run_once()
                self._metrics.upstream_restarts.labels(server="cupsd").inc()
                failures = 1 if clock() - began > STEADY_S else min(failures + 1, len(RESTART_DELAYS_S))
                delay_s = RESTART_DELAYS_S[failures - 1]
                self._say("unreachable", message=cause, restarts=self._peer.restarts + 1)
                log.warning("cupsd: %s; it is started again in %.1f s", cause, delay_s)
                await asyncio.sleep(delay_s)
        finally:
            self._say("off")

    async def _run_once(self) -> str:
        """One life of cupsd; returns why it ended."""
        try:
            argv = await asyncio.to_thread(self._files.install)
            null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
            try:
                lines = _Lines()
                async with listen_to_end(lines.take) as stderr:
                    program = await self._spawn(
                        argv, uid=None, cgroup_procs=(), stdin=null, stdout=null, stderr=stderr, env=ENVIRONMENT,
                        network=False,
                    )  # fmt: skip
                    try:
                        return await self._live(program)
                    finally:
                        self._available.clear()
                        await _stop(program)
            finally:
                os.close(null)
        except (AgentError, OSError) as error:
            return f"it cannot be started: {error}"

    async def _live(self, program: Program) -> str:
        began = time.monotonic()
        self._say("starting", pid=program.pid)
        ended = asyncio.create_task(program.wait(), name="cupsd ends")
        starting = asyncio.create_task(self._until_it_answers(), name="cupsd starts")
        try:
            async with asyncio.timeout(START_S):
                await asyncio.wait({ended, starting}, return_when=asyncio.FIRST_COMPLETED)
            if not ended.done():
                starting.result()
                log.info("cupsd (pid %d) answers after %.0f ms", program.pid, 1000 * (time.monotonic() - began))
                self._say("connected", pid=program.pid)
                self._available.set()
                if not await self._ends(ended):
                    return "it does not answer any more"
            code = ended.result().code
            return f"it was killed by signal {-code}" if code < 0 else f"it ended with status {code}"
        except TimeoutError:
            return f"it did not answer within {START_S:.0f} s"
        finally:
            for task in (ended, starting):
                task.cancel()
            await asyncio.wait({ended, starting})

    async def _ends(self, ended: asyncio.Task[Exit]) -> bool:
        """Wait for the end; False when it lives but has stopped to answer."""
        silent = 0
        while silent < 2:
            await asyncio.wait({ended}, timeout=PING_S)
            if ended.done():
                return True
            try:
                await self._client.ping()
                silent = 0
            except AgentError:
                silent += 1
        return False

    async def _until_it_answers(self) -> None:
        """Until it answers and has its queues."""
        while True:
            try:
                await self._client.ping()
                break
            except AgentError:
                await asyncio.sleep(POLL_S)
        try:
            await self._set_queues()
        except AgentError as error:
            log.warning("the queues of the new cupsd are not up to date: %s", error)

    async def _set_queues(self) -> None:
        """Make cupsd's queues ours. Every queue is tried; raises the first AgentError at the end."""
        errors: list[AgentError] = []
        async with self._setting:
            there = await self._client.queues()
            for name in there.keys() - self._queues.keys():
                try:
                    await self._client.delete_queue(name)
                except AgentError as error:
                    errors.append(error)
            for queue in tuple(self._queues.values()):
                try:
                    self._files.prepare_device(queue.device_uri)
                    if there.get(queue.name) != queue:
                        await self._client.set_queue(queue)
                except OSError as error:
                    errors.append(
                        AgentError(
                            Reason.UPSTREAM_UNAVAILABLE, f"no file for the printer {queue.name}: {error.strerror}"
                        )
                    )
                except AgentError as error:
                    errors.append(error)
        if errors:
            raise errors[0]

    def _say(
        self, state: Literal["connected", "unreachable", "starting", "off"], *, pid: int = 0, message: str = "",
        restarts: int | None = None,
    ) -> None:  # fmt: skip
        self._peer = Peer(
            name="cupsd", state=state, since_s=time.time(), pid=pid, message=message,
            restarts=self._peer.restarts if restarts is None else restarts,
        )  # fmt: skip


class _Lines:
    """What cupsd writes, into our log: `E [date] text`, where E is the level (cupsd-logs(5))."""

    def __init__(self) -> None:
        self._rest = b""

    def take(self, data: bytes) -> None:
        *lines, rest = (self._rest + data).split(b"\n")
        self._rest = rest[-MAX_LINE:]
        for line in lines:
            level, _, text = line[:MAX_LINE].decode(errors="replace").partition(" ")
            text = "".join(c if c.isprintable() else "?" for c in text.partition("] ")[2] or text)
            log.log(logging.WARNING if level in ("X", "A", "C", "E") else logging.DEBUG, "cupsd: %s", text)


async def _stop(program: Program) -> None:
    """Ask it to end, since that stops its jobs in good order, then kill it. Without effect on one that has ended."""
    program.kill(signal.SIGTERM)
    try:
        async with asyncio.timeout(STOP_S):
            await program.wait()
    except TimeoutError:
        program.kill(signal.SIGKILL)
        await program.wait()
