"""A node for measurements: the real daemon as a process of its own, a stand-in kubelet and a CRI of answers in this one."""

from __future__ import annotations

import asyncio
import json
import shutil
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from nodeagent.demo.kubelet import StandInKubelet
from nodeagent.demo.pods import ContainerSpec, PodSpec, RunOptions
from tests.fakes.cri import FakeCri

PRINTER = "opencdi.io/printer"
DAEMON = (sys.executable, "-m", "nodeagent", "run", "--config")


class Node:
    """Use as `async with node(...)`."""

    def __init__(self, directory: Path, printers: int, rules: list[dict[str, Any]], program: tuple[str, ...]) -> None:
        self.directory = directory
        self._program = program
        self.host = directory / "host"
        """The host's root as the daemon sees it where `rules` are given: what a measurement puts there."""
        self.mounts: dict[str, str] = {}
        (directory / "dp").mkdir()
        self.cri = FakeCri(directory / "cri.sock")
        self.kubelet = StandInKubelet(directory / "dp", directory / "kubelet/pod-resources/kubelet.sock", self._start)
        self.config = directory / "config.yaml"
        formats = ["application/postscript", "application/pdf"]
        self.config.write_text(json.dumps({
            "state_dir": str(directory / "state"), "run_dir": str(directory / "run"),
            "kubelet": {"root_dir": str(directory / "kubelet"), "device_plugin_dir": str(directory / "dp")},
            "cri": {"socket": str(directory / "cri.sock")}, "http": {"listen": ""}, "kubernetes": {"api": "off"},
            **({"host_root": str(self.host)} if rules else {}),
            "devices": {
                "rules": rules or [{"name": "printers", "match": {"class": "printer", "simulated": True}}],
                "simulated": [{"model": "printer", "serial": f"P{n}", "formats": formats} for n in range(printers)],
            },
        }))  # fmt: skip
        boot_id = self.host / "proc/sys/kernel/random/boot_id"
        boot_id.parent.mkdir(parents=True)
        boot_id.write_bytes(Path("/proc/sys/kernel/random/boot_id").read_bytes())
        here = self.host / str(directory).lstrip("/")
        here.parent.mkdir(parents=True)
        here.symlink_to(directory)  # the runtime's socket is looked for below host_root
        self.log = (directory / "log").open("ab")
        self.process: asyncio.subprocess.Process | None = None

    async def start(self, resource: str = PRINTER) -> float:
        """Start the daemon; seconds until the kubelet has its devices (of no resource: until it is registered)."""
        began = time.perf_counter()
        registrations = self.kubelet.registrations
        self.process = await asyncio.create_subprocess_exec(
            *self._program, str(self.config), stderr=self.log, stdout=self.log
        )
        await self.kubelet.until(lambda: self.kubelet.registrations > registrations, 20)
        answered = time.perf_counter() - began
        await self.kubelet.until(lambda: not resource or bool(self.kubelet.allocatable(resource)), 20)
        return answered

    async def stop(self) -> None:
        if self.process is not None and self.process.returncode is None:
            self.process.terminate()
            await self.process.wait()

    async def run_pod(self, name: str) -> PodSpec:
        pod = PodSpec(
            name=name,
            uid=f"uid-{name}",
            handler="runsc",
            containers=(ContainerSpec(name="desktop", limits={PRINTER: 1}),),
        )
        self.cri.add_sandbox(name)
        await self.kubelet.start(pod)
        return pod

    def slot(self, pod: PodSpec) -> Path:
        return Path(self.mounts[pod.name])

    def output(self, serial: str) -> Path:
        return self.directory / "state/simulated" / serial / "output"

    async def _start(self, pod: PodSpec, container: ContainerSpec, options: RunOptions) -> None:
        self.mounts[pod.name] = options.mounts[0].host_path
        self.cri.add_container(
            f"c-{pod.name}", f"sandbox-{pod.name}", {m.container_path: m.host_path for m in options.mounts}, pid=0
        )
        self.cri.containers[-1].created_at = time.time_ns()


@asynccontextmanager
async def node(
    printers: int, *, rules: Sequence[dict[str, Any]] = (), program: tuple[str, ...] = DAEMON
) -> AsyncIterator[Node]:
    directory = Path(tempfile.mkdtemp(prefix="/tmp/nabench-"))
    made = Node(directory, printers, list(rules), program)
    try:
        async with made.kubelet, made.cri:
            try:
                yield made
            finally:
                await made.stop()
    finally:
        made.log.close()
        shutil.rmtree(directory, ignore_errors=True)
