"""A whole node for tests: the real daemon in this process, a stand-in kubelet, a CRI of answers, desktops as plain clients.

Desktops here are not containers: they connect to the socket where their container would find it. Real sandboxes are the
business of tests/host.
"""

from __future__ import annotations

import asyncio
import json
import socket
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from nodeagent import daemon
from nodeagent.config import Config, parse
from nodeagent.demo.kubelet import StandInKubelet
from nodeagent.demo.pods import ContainerSpec, PodSpec, RunOptions
from nodeagent.host import HostRoot
from nodeagent.metrics import Metrics
from nodeagent.reload import Reload
from nodeagent.report.endpoint import Endpoint
from nodeagent.wire.pb.cri.v1 import api_pb2 as cri_pb
from tests.fakes.cri import FakeCri

PRINTER = "opencdi.io/printer"
RULES: list[dict[str, Any]] = [{"name": "printers", "match": {"class": "printer"}}]


def pod(name: str, *, labels: dict[str, str] | None = None, resource: str = PRINTER, **changes: Any) -> PodSpec:
    """A pod with one container `desktop` that asks for one device."""
    containers = changes.pop("containers", (ContainerSpec(name="desktop", limits={resource: 1}),))
    return PodSpec(name=name, uid=f"uid-{name}", labels=labels or {}, handler="runsc", containers=containers, **changes)


class House:
    """One node. `life()` is one life of its daemon."""

    def __init__(self, directory: Path, **devices: Any) -> None:
        self.directory = directory
        self.config_path = directory / "config.yaml"
        self.plugins = directory / "dp"
        self.plugins.mkdir()
        self.host = directory / "host"
        (self.host / "sys").mkdir(parents=True)
        self.mounts: dict[tuple[str, str], dict[str, str]] = {}  # (pod, container) -> container path -> host path
        self.env: dict[tuple[str, str], dict[str, str]] = {}
        self.endpoint: Endpoint | None = None
        """The API server of the next life."""
        self.started: list[tuple[str, str]] = []
        self.cri = FakeCri(directory / "cri.sock")
        self.kubelet = StandInKubelet(self.plugins, directory / "kubelet/pod-resources/kubelet.sock", self._start)
        self.raw: dict[str, Any] = {
            "node_name": "node-1",
            "host_root": str(self.host),
            "state_dir": str(directory / "state"),
            "run_dir": str(directory / "run"),
            "kubelet": {"root_dir": str(directory / "kubelet"), "device_plugin_dir": str(self.plugins)},
            "cri": {"socket": str(directory / "cri.sock")},
            "http": {"listen": "127.0.0.1:0"},
            "kubernetes": {"api": "off"},
            "devices": {
                "rules": RULES,
                "simulated": [{"model": "printer", "serial": "P1"}],
                "debounce": 0.02,
                **devices,
            },
        }
        (self.host / str(directory).lstrip("/")).parent.mkdir(parents=True, exist_ok=True)
        (self.host / str(directory).lstrip("/")).symlink_to(directory)  # the CRI socket is looked for below host_root
        self.save()

    def save(self, **devices: Any) -> Config:
        """Write the configuration file, with changes to `devices`."""
        self.raw["devices"].update(devices)
        self.config_path.write_text(json.dumps(self.raw))
        return parse(self.config_path.read_text())

    def slot(self, pod: PodSpec, container: str = "desktop", resource: str = PRINTER) -> Path:
        """The directory that the container has at /run/opencdi/<resource>."""
        return Path(self.mounts[pod.name, container][f"/run/opencdi/{resource.partition('/')[2]}"])

    def output(self, serial: str = "P1") -> Path:
        """Where a simulated printer prints."""
        return self.directory / "state/simulated" / serial / "output"

    def sandbox(self, pod: PodSpec) -> None:
        made = self.cri.add_sandbox(pod.name, **pod.labels)
        made.runtime_handler = pod.handler

    async def run(self, pod: PodSpec) -> None:
        """Everything a kubelet and a runtime do to start a pod."""
        self.sandbox(pod)
        await self.kubelet.start(pod)

    def end(self, pod: PodSpec) -> None:
        """The pod is gone: sandbox, containers, allocation."""
        self.kubelet.delete(pod)
        self.cri.sandboxes[:] = [s for s in self.cri.sandboxes if s.metadata.name != pod.name]
        self.cri.containers[:] = [c for c in self.cri.containers if c.pod_sandbox_id != f"sandbox-{pod.name}"]

    def seat(self, active: daemon.Active, pod: PodSpec) -> Any:
        return active.roster.seats.get(pod.uid)

    @asynccontextmanager
    async def life(self) -> AsyncIterator[daemon.Active]:
        """One life of the daemon: yields its parts once it is active; ends it as SIGTERM would."""
        self.metrics = Metrics()
        stop = asyncio.Event()
        source = Reload(self.config_path, parse(self.config_path.read_text()), self.metrics)
        views: list[daemon.View] = []
        task = asyncio.create_task(
            daemon.serve(source, HostRoot(self.host), self.metrics, stop, self.endpoint, views.append), name="daemon"
        )
        try:
            while not views or views[0].active is None:
                if task.done():
                    task.result()
                await asyncio.sleep(0.01)
            self.view, self.source = views[0], source
            active = views[0].active
            assert isinstance(active, daemon.Active)
            yield active
        finally:
            stop.set()
            await task

    def value(self, name: str, **labels: str) -> float:
        """A sample of the daemon's metrics; 0 when there is none."""
        for measure in self.metrics.on_scrape:
            measure()
        return self.metrics.registry.get_sample_value(f"nodeagent_{name}", labels) or 0.0

    async def _start(self, pod: PodSpec, container: ContainerSpec, options: RunOptions) -> None:
        """The runtime starts a container: a missing host path becomes an empty directory, as containerd does."""
        self.mounts[pod.name, container.name] = {m.container_path: m.host_path for m in options.mounts}
        self.env[pod.name, container.name] = options.env
        for mount in options.mounts:
            Path(mount.host_path).mkdir(parents=True, exist_ok=True)
        self.started.append((pod.name, container.name))
        container_id = f"c{len(self.started)}-{pod.name}-{container.name}"
        self.cri.containers[:] = [
            c for c in self.cri.containers
            if (c.pod_sandbox_id, c.metadata.name) != (f"sandbox-{pod.name}", container.name)
        ]  # fmt: skip
        if container.init:
            return
        self.cri.add_container(container_id, f"sandbox-{pod.name}", self.mounts[pod.name, container.name], pid=0)
        made: cri_pb.Container = self.cri.containers[-1]
        made.metadata.name = container.name
        made.created_at = time.time_ns()


async def eventually(condition: Callable[[], object], timeout_s: float = 15.0) -> None:
    """Wait until something is true; AssertionError when it never is."""
    deadline = asyncio.get_running_loop().time() + timeout_s
    while not condition():
        if asyncio.get_running_loop().time() > deadline:
            raise AssertionError("it never came true")
        await asyncio.sleep(0.02)


async def lp(
    slot: Path, document: bytes, *, title: str = "page", printer: str = "", timeout_s: float = 20
) -> tuple[int, str]:
    """Print with the stock client through a slot's socket: exit code and what it said."""
    process = await asyncio.create_subprocess_exec(
        "lp", *(["-d", printer] if printer else []), "-t", title, "-",
        stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
        env={"CUPS_SERVER": f"{slot}/ipp.sock", "PATH": "/usr/bin:/bin", "HOME": "/nonexistent"},
    )  # fmt: skip
    try:
        async with asyncio.timeout(timeout_s):
            said, _ = await process.communicate(document)
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    return process.returncode or 0, said.decode(errors="replace")


def connect(slot: Path, service: str = "ipp.sock") -> socket.socket:
    client = socket.socket(socket.AF_UNIX)
    client.setblocking(False)
    client.connect(str(slot / service))
    return client
