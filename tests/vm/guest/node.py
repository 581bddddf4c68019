"""The node in the guest: the stand-in kubelet, the stand-in runtime over the real runc, and the daemon as it is shipped.

Everything is where a real node has it, so the daemon's configuration needs no paths. Driven over a virtio-serial port with
the requests of tests/vm/wire.py; run as `python3 -m tests.vm.guest.node`.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import select
import signal
import sys
import time
from pathlib import Path
from typing import Any

import msgspec
import pyudev

from nodeagent.demo.kubelet import StandInKubelet
from nodeagent.demo.pods import ContainerNotStarted, ContainerSpec, NodeSpec, PodPending, PodRejected, PodSpec
from nodeagent.demo.runtime import StandInRuntime
from nodeagent.devices.plugin import MountSpec
from nodeagent.errors import AgentError, Reason
from tests.vm.guest.agent import port
from tests.vm.wire import (
    CONFIG,
    LOG,
    PORT,
    Answer,
    AnyRequest,
    DaemonEnded,
    EndPod,
    Event,
    Exec,
    Lists,
    RestartKubelet,
    RunPod,
    StartDaemon,
    StopDaemon,
    Uevent,
)

KUBELET = Path("/var/lib/kubelet")
CRI = Path("/run/containerd/containerd.sock")
RUNTIME = Path("/run/stand-in-runtime")
MAX_LINE_BYTES = 1 << 20
MAX_UEVENTS_A_TURN = 256
STOP_TIMEOUT_S = 30.0
WRITE_TIMEOUT_S = 5


class Envelope(msgspec.Struct, frozen=True):
    id: int
    request: AnyRequest


class Node:
    """`run()` serves the port until its other side closes it."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._kubelet = StandInKubelet(
            KUBELET / "device-plugins", KUBELET / "pod-resources/kubelet.sock", self._start_container
        )
        self._runtime = StandInRuntime(RUNTIME, CRI)
        self._containers: dict[tuple[str, str], str] = {}
        self._daemon: asyncio.subprocess.Process | None = None
        self._group = asyncio.TaskGroup()

    async def run(self) -> None:
        for directory in (KUBELET / "device-plugins", CRI.parent, Path(CONFIG).parent):
            directory.mkdir(parents=True, exist_ok=True)
        reader = asyncio.StreamReader(limit=MAX_LINE_BYTES)
        with open(self._fd, "rb", buffering=0, closefd=False) as file:
            await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), file)
            async with self._runtime, self._kubelet, self._group:
                watching = [self._group.create_task(self._watch_lists())]
                self._listen()
                self._tell(Lists(at_s=time.monotonic(), lists={}, connected=()))
                while line := await reader.readline():
                    self._group.create_task(self._serve(msgspec.json.decode(line, type=Envelope)))
                for task in watching:
                    task.cancel()
                await self._stop(kill=True)

    # ---- requests

    async def _serve(self, envelope: Envelope) -> None:
        try:
            answer = await self._do(envelope.request)
        except (AgentError, PodPending, PodRejected, ContainerNotStarted, OSError) as error:
            answer = Answer(error=f"{type(error).__name__}: {error}")
        self._write({"id": envelope.id, **msgspec.to_builtins(answer)})

    async def _do(self, request: AnyRequest) -> Answer:
        match request:
            case StartDaemon():
                await self._start(request.config)
            case StopDaemon():
                await self._stop(kill=request.kill)
            case RunPod():
                return await self._run_pod(request.pod)
            case EndPod():
                await self._runtime.stop_pod(request.pod)
                self._kubelet.delete(request.pod)
            case Exec():
                container = self._containers[request.pod.uid, request.container]
                ran = await self._runtime.exec(
                    container, request.argv, stdin=request.stdin, timeout_s=request.timeout_s
                )
                return Answer(code=ran.code, stdout=ran.stdout, stderr=ran.stderr)
            case RestartKubelet():
                await self._kubelet.restart(api_away=request.api_away)
        return Answer()

    async def _run_pod(self, pod: PodSpec) -> Answer:
        """In the order of a real node: devices at admission, then the sandbox, PreStartContainer, the container."""
        await self._kubelet.admit(pod)
        try:
            await self._runtime.run_pod(pod)
            for container in pod.in_start_order:
                await self._kubelet.start_container(pod, container.name)
        except BaseException:
            await self._runtime.stop_pod(pod)
            self._kubelet.delete(pod)
            raise
        first = pod.containers[0]
        held = {resource: self._kubelet.held(pod, first.name, resource) for resource in first.limits}
        return Answer(options=self._kubelet.run_options(pod, first.name), held=held)

    async def _start_container(
        self,
        pod: PodSpec,
        container: ContainerSpec,
        env: dict[str, str],
        mounts: tuple[MountSpec, ...],
        nodes: tuple[NodeSpec, ...],
    ) -> None:
        made = await self._runtime.start_container(pod, container, env, mounts, nodes)
        self._containers[pod.uid, container.name] = made

    # ---- the daemon

    async def _start(self, config: str) -> None:
        await self._stop(kill=True)
        Path(CONFIG).write_text(config)
        with open(port(f"lab.log.{LOG}"), "wb", buffering=0) as log:  # the port can be open once; they share it
            self._daemon = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "nodeagent", "--config", CONFIG, "run"),
                stdin=asyncio.subprocess.DEVNULL, stdout=log, stderr=log,
            )  # fmt: skip
        self._group.create_task(self._follow(self._daemon))

    async def _follow(self, process: asyncio.subprocess.Process) -> None:
        self._tell(DaemonEnded(code=await process.wait(), at_s=time.monotonic()))

    async def _stop(self, *, kill: bool) -> None:
        process = self._daemon
        if process is None or process.returncode is not None:
            return
        process.send_signal(signal.SIGKILL if kill else signal.SIGTERM)
        try:
            async with asyncio.timeout(STOP_TIMEOUT_S):
                await process.wait()
        except TimeoutError:
            process.kill()
            await process.wait()
            raise AgentError(Reason.DEADLINE, f"the daemon did not end within {STOP_TIMEOUT_S:.0f} s of TERM") from None

    # ---- events

    async def _watch_lists(self) -> None:
        last: dict[str, Any] = {}

        def changed() -> bool:
            return self._now() != last

        while True:
            with contextlib.suppress(TimeoutError):
                await self._kubelet.until(changed, timeout_s=3600)
                last = self._now()
                self._tell(
                    Lists(
                        at_s=time.monotonic(),
                        lists={name: dict(devices) for name, (devices, _) in last.items()},
                        connected=tuple(sorted(name for name, (_, connected) in last.items() if connected)),
                    )
                )

    def _now(self) -> dict[str, tuple[dict[str, bool], bool]]:
        return {name: (dict(e.devices), e.connected) for name, e in self._kubelet.endpoints.items()}

    def _listen(self) -> None:
        """The kernel's own events, on a second socket beside the daemon's."""
        monitor = pyudev.Monitor.from_netlink(pyudev.Context(), source="kernel")
        monitor.start()

        def on_readable() -> None:
            for _ in range(MAX_UEVENTS_A_TURN):
                device = monitor.poll(timeout=0)
                if device is None:
                    return
                if "/usb" in device.device_path:
                    self._tell(
                        Uevent(
                            at_s=time.monotonic(),
                            action=device.action or "",
                            path=device.device_path,
                            subsystem=device.subsystem or "",
                            devtype=device.device_type or "",
                        )
                    )

        asyncio.get_running_loop().add_reader(monitor.fileno(), on_readable)

    def _tell(self, event: Event) -> None:
        self._write({"event": msgspec.to_builtins(event)})

    def _write(self, message: dict[str, Any]) -> None:
        """Whole lines, at once: QEMU's end is read all the time. With nobody there the port would block for ever."""
        data = json.dumps(message).encode() + b"\n"
        writable = select.poll()
        writable.register(self._fd, select.POLLOUT)
        while data:
            try:
                data = data[os.write(self._fd, data) :]
            except BlockingIOError:
                ready = writable.poll(WRITE_TIMEOUT_S * 1000)
                if not ready or ready[0][1] & select.POLLHUP:
                    return


if __name__ == "__main__":
    asyncio.run(Node(os.open(port(f"lab.{PORT}"), os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)).run())
