"""A container runtime for the demo and the tests: real runc and runsc below, a real CRI socket above.

What containerd does for a kubelet, as far as nodeagent can see it: a sandbox record that exists before its containers, with
the pod's labels in it; host paths made when they are missing; containers whose state follows their process; mounts and process
ids told by CRI. What it leaves out: images (the root is the machine's own), a pause process and pod networks.
"""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import shlex
import shutil
import time
from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from contextlib import AsyncExitStack, suppress
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any, Self

import msgspec

from nodeagent.demo import bundles, cdi, oci
from nodeagent.demo.crisocket import serve
from nodeagent.demo.pods import ContainerSpec, NodeSpec, PodSpec
from nodeagent.demo.records import ContainerRecord, SandboxRecord, State
from nodeagent.devices.plugin import MountSpec
from nodeagent.errors import AgentError, Reason
from nodeagent.host import Finished, run
from nodeagent.model import PodRef

log = logging.getLogger(__name__)

MAX_OUTPUT_BYTES = 1 << 20
"""Of one container; what it says beyond is read and dropped."""
MAX_CONTAINERS = 64
START_TIMEOUT_S = 30.0
STATE_POLL_S = 0.05
KILL_TIMEOUT_S = 10.0


class _Life:
    """The process of one container (`runsc run`, attached) and what it wrote."""

    def __init__(self, binary: bundles.Binary, bundle: Path, process: asyncio.subprocess.Process) -> None:
        self.binary = binary
        self.bundle = bundle
        self.process = process
        self.output = bytearray()
        self.ended = asyncio.Event()


class StandInRuntime:
    """An async context manager; leaving it ends every container and removes everything that was made for them.

    `directory` gets the runtimes' own state and the bundles; CRI is served on `socket`. `hidden` are further directories of
    this machine that desktops find empty; `cdi_dirs` are where CDI specifications are, the static ones first.
    """

    def __init__(
        self,
        directory: Path,
        socket: Path,
        *,
        hidden: Sequence[str] = (),
        cdi_dirs: Sequence[str] = cdi.SPEC_DIRS,
        clock_ns: Callable[[], int] = time.time_ns,
    ) -> None:
        self.socket = socket
        self._directory = directory
        self._hidden = (*bundles.PRIVATE_PLACES, *hidden)
        self._cdi_dirs = tuple(Path(d) for d in cdi_dirs)
        self._clock_ns = clock_ns
        self._cgroup = f"/nodeagent-demo-{os.getpid()}-{secrets.token_hex(3)}"
        self._sandboxes: dict[str, SandboxRecord] = {}
        self._containers: dict[str, ContainerRecord] = {}
        self._lives: dict[str, _Life] = {}
        self._stack = AsyncExitStack()
        self._group = asyncio.TaskGroup()

    async def __aenter__(self) -> Self:
        async with AsyncExitStack() as stack:
            stack.push_async_callback(asyncio.to_thread, self._clear)
            await asyncio.to_thread(self._prepare)
            await stack.enter_async_context(self._group)
            stack.push_async_callback(self._stop_everything)
            await stack.enter_async_context(serve(self, self.socket))
            self._stack = stack.pop_all()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool | None:
        return await self._stack.__aexit__(kind, error, trace)

    # ---- what a kubelet asks for

    async def run_pod(self, pod: PodSpec) -> str:
        """The id of the pod's sandbox; made if it has none that is ready. Raises AgentError when its runtime is missing."""
        for record in self._sandboxes.values():
            if record.pod.uid == pod.uid and record.ready:
                return record.id
        bundles.binary_of(pod.handler)
        record = SandboxRecord(
            id=secrets.token_hex(32),
            pod=PodRef(pod.namespace, pod.name, pod.uid),
            labels=dict(pod.labels),
            handler=pod.handler,
            ready=True,
            created_ns=self._clock_ns(),
        )
        self._sandboxes[record.id] = record
        return record.id

    async def start_container(
        self,
        pod: PodSpec,
        container: ContainerSpec,
        env: Mapping[str, str] = MappingProxyType({}),
        mounts: Sequence[MountSpec] = (),
        nodes: Sequence[NodeSpec] = (),
        cdi_devices: Sequence[str] = (),
    ) -> str:
        """Start one container; the answer is its id, once it runs or has already ended by itself.

        Raises AgentError when the pod has no sandbox, the runtime is not installed, a CDI device is unknown, or the runtime
        could not start it.
        """
        sandbox = self._sandbox_of(pod.uid)
        binary = bundles.binary_of(sandbox.handler)
        if len(self._containers) >= MAX_CONTAINERS:
            raise AgentError(Reason.TOO_MANY, f"the stand-in runtime has {MAX_CONTAINERS} containers already")
        earlier = [c for c in self._containers.values() if (c.sandbox_id, c.name) == (sandbox.id, container.name)]
        container_id = secrets.token_hex(32)
        bundle = self._directory / "bundles" / container_id
        desktop = oci.Desktop(
            pod=sandbox.pod,
            sandbox_id=container_id if binary.kind == "sandbox" else sandbox.id,
            name=container.name,
            args=tuple(container.args),
            root=str(bundle / "rootfs"),
            cgroup=f"{self._pod_cgroup(pod.uid)}/{container_id}",
            kind=binary.kind,
            env=tuple(env.items()),
            mounts=tuple(
                oci.Mount(destination=m.container_path, source=m.host_path, readonly=m.read_only) for m in mounts
            ),
        )
        edits = await asyncio.to_thread(cdi.resolve, cdi_devices, self._cdi_dirs) if cdi_devices else ()
        desktop, spec = await asyncio.to_thread(bundles.lay_out, bundle, desktop, nodes, self._hidden, edits)
        created_ns = self._clock_ns()
        life = _Life(binary, bundle, await self._spawn(binary, bundle, container_id))
        self._lives[container_id] = life
        self._containers[container_id] = ContainerRecord(
            id=container_id,
            sandbox_id=sandbox.id,
            name=container.name,
            attempt=len(earlier),
            state=State.CREATED,
            created_ns=created_ns,
            mounts=tuple(oci.bind_mounts(desktop)),
            spec=spec,
        )
        self._group.create_task(self._follow(container_id, life), name=f"container {container_id[:12]}")
        await self._started(container_id, life)
        return container_id

    async def wait(self, container_id: str) -> int:
        """The exit code of the container, once it has ended; 128 + n after signal n."""
        await self._life(container_id).ended.wait()
        return self._containers[container_id].exit_code

    def command(self, container_id: str, *argv: str) -> list[str]:
        """What runs `argv` in the container, as the container's user and with its variables, from any shell of root."""
        user = f"{oci.DESKTOP_UID}:{oci.DESKTOP_UID}"  # without it runsc takes root
        return self._life(container_id).binary.argv(self._directory, "exec", "--user", user, container_id, *argv)

    async def exec(
        self, container_id: str, argv: Sequence[str], *, stdin: bytes = b"", timeout_s: float = 60
    ) -> Finished:
        """Run one more program in the container, to its end."""
        return await run(self.command(container_id, *argv), stdin=stdin, timeout_s=timeout_s)

    def output(self, container_id: str) -> str:
        """What the container has written to stdout and stderr, at most MAX_OUTPUT_BYTES."""
        return self._life(container_id).output.decode(errors="replace")

    async def stop(self, container_id: str, timeout_s: float = 1.0) -> None:
        """TERM, after `timeout_s` KILL; returns when the container is gone. Nothing happens to one that has ended."""
        life = self._life(container_id)
        for signal, patience_s in (("TERM", timeout_s), ("KILL", KILL_TIMEOUT_S)):
            if not life.ended.is_set():
                await run(life.binary.argv(self._directory, "kill", container_id, signal), timeout_s=KILL_TIMEOUT_S)
                with suppress(TimeoutError):
                    async with asyncio.timeout(patience_s):
                        await life.ended.wait()
        if not life.ended.is_set():
            life.process.kill()
            await self._delete(container_id, life)
            await life.ended.wait()

    async def stop_pod(self, pod: PodSpec, timeout_s: float = 1.0) -> None:
        """End a pod: its containers, then its sandbox (first not ready, then gone). Nothing happens to an unknown one."""
        for sandbox in [s for s in self._sandboxes.values() if s.pod.uid == pod.uid]:
            await self._stop_sandbox(sandbox, timeout_s)

    # ---- what CRI tells

    def sandboxes(self) -> tuple[SandboxRecord, ...]:
        return tuple(self._sandboxes.values())

    def containers(self) -> tuple[ContainerRecord, ...]:
        return tuple(self._containers.values())

    # ---- the life of a container

    async def _spawn(self, binary: bundles.Binary, bundle: Path, container_id: str) -> asyncio.subprocess.Process:
        argv = bundles.launch(binary, self._directory, bundle, container_id)
        log.debug("run: %s", shlex.join(argv))
        return await asyncio.create_subprocess_exec(
            *argv,
            stdin=asyncio.subprocess.DEVNULL,
            # A pipe: runsc writes to a regular file at an offset of its own, over what others wrote.
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            # Ctrl-C on the terminal is for whoever drives this runtime; it ends the containers in its own order.
            start_new_session=True,
        )

    async def _started(self, container_id: str, life: _Life) -> None:
        """Until the runtime says that the container runs, or its process is over."""
        deadline = asyncio.get_running_loop().time() + START_TIMEOUT_S
        while not life.ended.is_set():
            if pid := await self._running_pid(container_id, life):
                if not life.ended.is_set():
                    self._change(container_id, state=State.RUNNING, pid=pid, started_ns=self._clock_ns())
                return
            if asyncio.get_running_loop().time() > deadline:
                await self.stop(container_id, 0)
                raise AgentError(Reason.DEADLINE, f"{life.binary.program} did not start within {START_TIMEOUT_S:.0f} s")
            with suppress(TimeoutError):
                async with asyncio.timeout(STATE_POLL_S):
                    await life.ended.wait()
        if not (life.bundle / bundles.PID_FILE).exists():
            said = (
                " ".join(self.output(container_id).split()) or f"exit status {self._containers[container_id].exit_code}"
            )
            raise AgentError(
                Reason.UPSTREAM_UNAVAILABLE, f"{life.binary.program} could not start the container: {said}"
            )

    async def _running_pid(self, container_id: str, life: _Life) -> int:
        """The container's process as the host sees it (runsc: its sandbox), 0 while there is none."""
        finished = await run(life.binary.argv(self._directory, "state", container_id), timeout_s=KILL_TIMEOUT_S)
        if finished.code:
            return 0
        state = msgspec.json.decode(finished.stdout, type=_RuntimeState)
        return state.pid if state.status == "running" else 0

    async def _follow(self, container_id: str, life: _Life) -> None:
        """Collect what the container writes, and its end."""
        assert life.process.stdout is not None
        while data := await life.process.stdout.read(65536):
            life.output += data[: MAX_OUTPUT_BYTES - len(life.output)]
        code = await life.process.wait()
        await self._delete(container_id, life)
        self._change(
            container_id,
            state=State.EXITED,
            pid=0,
            finished_ns=self._clock_ns(),
            exit_code=code if code >= 0 else 128 - code,
        )
        life.ended.set()

    async def _delete(self, container_id: str, life: _Life) -> None:
        """Whatever is left of it; nothing unless the runtime itself was killed."""
        await run(life.binary.argv(self._directory, "delete", "--force", container_id), timeout_s=KILL_TIMEOUT_S)

    def _change(self, container_id: str, **fields: Any) -> None:
        self._containers[container_id] = msgspec.structs.replace(self._containers[container_id], **fields)

    # ---- ends

    async def _stop_sandbox(self, sandbox: SandboxRecord, timeout_s: float) -> None:
        ids = [c.id for c in self._containers.values() if c.sandbox_id == sandbox.id]
        await _all(self.stop(container_id, timeout_s) for container_id in ids)
        if self._sandboxes.get(sandbox.id) is not sandbox:
            return  # somebody else has come to this point first
        self._sandboxes[sandbox.id] = msgspec.structs.replace(sandbox, ready=False)
        for container_id in ids:
            await asyncio.to_thread(bundles.discard, self._lives.pop(container_id).bundle)
            del self._containers[container_id]
        await asyncio.to_thread(bundles.remove_cgroup, self._pod_cgroup(sandbox.pod.uid))
        del self._sandboxes[sandbox.id]

    async def _stop_everything(self) -> None:
        await _all(self._stop_sandbox(s, 1.0) for s in self.sandboxes())

    def _sandbox_of(self, uid: str) -> SandboxRecord:
        for record in self._sandboxes.values():
            if record.pod.uid == uid and record.ready:
                return record
        raise AgentError(Reason.NOT_RUNNING, f"pod {uid} has no sandbox that is ready", hint="run_pod comes first")

    def _life(self, container_id: str) -> _Life:
        if container_id not in self._lives:
            raise AgentError(Reason.NOT_RUNNING, f"there is no container {container_id[:12]}")
        return self._lives[container_id]

    def _pod_cgroup(self, uid: str) -> str:
        return f"{self._cgroup}/pod{uid}"

    def _prepare(self) -> None:
        for name in ("bundles", bundles.RUNC.program, bundles.RUNSC.program):
            (self._directory / name).mkdir(parents=True)

    def _clear(self) -> None:
        bundles.remove_cgroup(self._cgroup)
        for unused in (self._directory / "bundles").iterdir():
            bundles.discard(unused)
        (self._directory / "bundles").rmdir()
        for binary in (bundles.RUNC, bundles.RUNSC):
            shutil.rmtree(self._directory / binary.program)


async def _all(ends: Iterable[Coroutine[Any, Any, None]]) -> None:
    """Every one to its end, also when others fail; then the failures, if any."""
    results = await asyncio.gather(*ends, return_exceptions=True)
    if failures := [r for r in results if isinstance(r, BaseException)]:
        raise BaseExceptionGroup("could not clean up after containers", failures)


class _RuntimeState(msgspec.Struct, frozen=True):
    """Of `runc state` (runtime-spec, State)."""

    status: str
    pid: int = 0
