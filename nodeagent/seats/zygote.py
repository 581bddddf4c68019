"""The daemon's side of the zygote: start it, have it make children, hear how they end.

    async with Zygote() as zygote:
        worker = await zygote.spawn_worker(uid=..., cgroup_procs=cgroup.procs, control=theirs, name="...")
        ended = await worker.wait()

Start it before gRPC has threads and from the main thread: the pdeath signal fires when the *thread* that made the child ends.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec

from nodeagent.errors import AgentError, Reason
from nodeagent.services import SEAT_SERVICES
from nodeagent.transports.unix import Channel
from nodeagent.wire import zygote as wire
from nodeagent.wire.zygote import Limits

log = logging.getLogger(__name__)

START_S = 10.0
SPAWN_S = 10.0
STOP_S = 5.0
WORKER_LIMITS = Limits(files=4096)
GONE = -signal.SIGKILL

ROOT = Path(__file__).resolve().parents[2]
"""The directory that holds the package."""
_ENVIRONMENT = ("PATH", "LANG", "LC_ALL", "TZ", "LD_LIBRARY_PATH")
"""All the zygote inherits: what is in its environment is in the memory of every worker."""


class Exit(msgspec.Struct, frozen=True):
    """How a child ended: exit status, or minus the signal that killed it."""

    code: int


class Child:
    """A process of the zygote. It is reaped there; what remains here is how it ended."""

    def __init__(self, zygote: Zygote, number: int, name: str) -> None:
        self.pid = 0
        self.name = name
        self._zygote = zygote
        self._number = number
        self._exit: asyncio.Future[Exit] = asyncio.get_running_loop().create_future()

    async def wait(self) -> Exit:
        """How the child ended; any number may wait. Exit(-9) when the zygote died, since its children die with it."""
        return await asyncio.shield(self._exit)

    def kill(self, number: int = signal.SIGKILL) -> None:
        """Send a signal; no effect after its end. For a program it reaches the program; SIGKILL all its descendants too."""
        if not self._exit.done():
            self._zygote.kill(self._number, number)

    def ended(self, code: int) -> None:
        """The zygote reaped it (called once)."""
        if not self._exit.done():
            self._exit.set_result(Exit(code))


class Zygote:
    """An async context manager. `failed` gets an AgentError when the zygote dies on its own."""

    def __init__(self, *, services: Mapping[str, str] = SEAT_SERVICES, seccomp_dir: Path | None = None) -> None:
        self.pid = 0
        self._services = services
        self._seccomp_dir = seccomp_dir
        self._children: dict[int, Child] = {}
        self._starting: dict[int, asyncio.Future[int]] = {}
        self._last_number = 0

    async def __aenter__(self) -> Zygote:
        """Start it. Raises AgentError when it does not come up."""
        self.failed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.failed.add_done_callback(lambda future: future.cancelled() or future.exception())
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._channel = Channel(ours, max_bytes=wire.MAX_MESSAGE, max_fds=0)
        try:
            with theirs:
                self._process = await asyncio.create_subprocess_exec(
                    sys.executable, "-P", "-m", "nodeagent.seats.zygote", str(theirs.fileno()),
                    stdin=asyncio.subprocess.DEVNULL, stdout=2, pass_fds=(theirs.fileno(),), start_new_session=True,
                    env=_environment(),
                )  # fmt: skip
            try:
                async with asyncio.timeout(START_S):
                    await self._greet()
            except BaseException:
                self._process.kill()
                await self._process.wait()
                raise
        except BaseException:
            self._channel.close()
            raise
        self._reading = asyncio.create_task(self._read(), name="zygote")
        return self

    async def __aexit__(self, *_: object) -> None:
        """End it and with it every child; nothing of them is left afterwards."""
        self.failed.cancel()
        self._channel.close()
        await self._reading
        try:
            async with asyncio.timeout(STOP_S):
                await self._process.wait()
        except TimeoutError:
            log.error("the zygote (pid %d) does not end; killing it", self.pid)
            self._process.kill()
            await self._process.wait()

    async def run(self) -> None:
        """Live until the zygote dies on its own; then raise AgentError."""
        await asyncio.shield(self.failed)

    async def spawn_worker(
        self,
        *,
        uid: int,
        cgroup_procs: Sequence[Path],
        control: socket.socket,
        name: str,
        limits: Limits = WORKER_LIMITS,
    ) -> Child:
        """A confined process that runs nodeagent.seats.worker with a duplicate of `control`; the caller closes its own.

        Raises AgentError with the cause when it cannot be made.
        """
        message = wire.SpawnWorker(
            child=self._next(), name=name, uid=uid, cgroup_procs=tuple(map(str, cgroup_procs)), limits=limits
        )
        return await self._spawn(f"worker {name}", message, [control.fileno()], Reason.INTERNAL)

    async def spawn_program(
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
        limits: Limits = Limits(),  # noqa: B008 (frozen)
    ) -> Child:
        """Execute a program in a pid namespace of its own, with its own /proc; its descendants end when it ends.

        `uid` None stays root; any other uid also means no groups, no capabilities, no_new_privs and the filter
        seccomp/seat-program.json, which leaves it no sockets. `network` False gives it an empty network. With
        `private_tmp_bytes` it has a tmpfs of that size over /tmp and every other directory that all users can write to,
        and finds `hidden` directories empty.
        `argv[0]` is a path or is looked for in the PATH of `env`. The program gets duplicates of the three descriptors;
        its working directory is /. Raises AgentError with the cause when it cannot be executed.
        """
        message = wire.SpawnProgram(
            child=self._next(), argv=tuple(argv), uid=uid, cgroup_procs=tuple(map(str, cgroup_procs)), env=dict(env),
            network=network, private_tmp_bytes=private_tmp_bytes, hidden=tuple(hidden), limits=limits,
        )  # fmt: skip
        return await self._spawn(
            argv[0] if argv else "a program without a name",
            message,
            [stdin, stdout, stderr],
            Reason.UPSTREAM_UNAVAILABLE,
        )

    def kill(self, number: int, signal_number: int) -> None:
        """Send a signal to the child with that number. A zygote that is gone took its children with it."""
        try:
            self._channel.send(wire.put_message(wire.Kill(child=number, signal=signal_number)))
        except ConnectionError:
            pass

    def _next(self) -> int:
        self._last_number += 1
        return self._last_number

    async def _spawn(
        self, name: str, message: wire.SpawnWorker | wire.SpawnProgram, fds: list[int], reason: Reason
    ) -> Child:
        try:
            data = wire.put_message(message)
            wire.take_to_zygote(data)  # what it could not take would end it
        except ValueError as error:
            raise AgentError(reason, f"cannot start {name}: {error}") from error
        child = self._children[message.child] = Child(self, message.child, name)
        answer = self._starting[message.child] = asyncio.get_running_loop().create_future()
        try:
            self._channel.send(data, fds)
            async with asyncio.timeout(SPAWN_S):
                child.pid = await answer
        except TimeoutError as error:
            self.kill(message.child, signal.SIGKILL)
            raise AgentError(Reason.DEADLINE, f"{name} did not start within {SPAWN_S:.0f} s") from error
        except OSError as error:
            raise AgentError(reason, f"cannot start {name}: {error}") from error
        except asyncio.CancelledError:
            self.kill(message.child, signal.SIGKILL)
            raise
        finally:
            del self._starting[message.child]
        return child

    async def _greet(self) -> None:
        """Tell the zygote what to load and wait until it has."""
        try:
            directory = self._seccomp_dir or _seccomp_directory()
            setup = wire.Setup(parent=os.getpid(), services=dict(self._services), seccomp_dir=str(directory))
            self._channel.send(wire.put_message(setup))
            data, _ = await self._channel.receive()
            message = wire.take_from_zygote(data)
        except (OSError, EOFError) as error:
            raise AgentError(Reason.INTERNAL, f"the zygote does not start: {error}") from error
        if not isinstance(message, wire.Hello):
            cause = message.message if isinstance(message, wire.Broken) else "it did not say Hello"
            raise AgentError(Reason.INTERNAL, f"the zygote cannot work: {cause}")
        self.pid = message.pid

    async def _read(self) -> None:
        """Hear what the zygote says until it is gone; then everything that waits for it is told."""
        cause = "it has ended"
        try:
            while True:
                data, _ = await self._channel.receive()
                self._on_message(wire.take_from_zygote(data))
        except (EOFError, ConnectionError):
            pass
        except Exception as error:  # whatever it is: without this reader nothing of the zygote works, so say it loudly
            cause = f"{type(error).__name__}: {error}"
            self._channel.close()
        for answer in self._starting.values():
            if not answer.done():
                answer.set_exception(ChildProcessError("the zygote has ended"))
        for child in self._children.values():
            child.ended(GONE)
        self._children.clear()
        if not self.failed.done():
            self.failed.set_exception(AgentError(Reason.INTERNAL, f"the zygote (pid {self.pid}) is lost: {cause}"))

    def _on_message(self, message: wire.FromZygote) -> None:
        match message:
            case wire.Spawned(child=number, pid=pid):
                answer = self._starting.get(number)
                if answer is not None and not answer.done():
                    answer.set_result(pid)
            case wire.Failed(child=number, message=cause):
                del self._children[number]
                answer = self._starting.get(number)
                if answer is not None and not answer.done():
                    answer.set_exception(ChildProcessError(cause))
            case wire.Exited(child=number, code=code):
                self._children.pop(number).ended(code)
            case wire.Said(child=number, untrusted_text=untrusted_text):
                log.warning("%s: %s", self._children[number].name, untrusted_text)
            case wire.Hello() | wire.Broken():
                raise ValueError(f"the zygote said {type(message).__name__} in mid-life")


def _environment() -> dict[str, str]:
    kept = {name: os.environ[name] for name in _ENVIRONMENT if name in os.environ}
    if ROOT.name not in ("site-packages", "dist-packages"):
        kept["PYTHONPATH"] = str(ROOT)  # a checkout
    return kept


def _seccomp_directory() -> Path:
    """Where the profiles are: beside the package in a checkout, under the prefix's `share/nodeagent` when installed."""
    checkout = ROOT / "seccomp"
    return checkout if (checkout / "seat-worker.json").is_file() else Path(sys.prefix, "share/nodeagent/seccomp")


if __name__ == "__main__":
    from nodeagent.seats.spawner import main

    sys.exit(main(socket.socket(fileno=int(sys.argv[1]))))
