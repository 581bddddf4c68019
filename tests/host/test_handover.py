"""Two lives of the daemon under one running gVisor desktop: killed as the main process of a container, and overlapped.

What is promised: a running desktop prints again on a new connection within 2 s, and no worker outlives its daemon. The time
itself is measured by the bench; here it only has a generous limit, since a loaded machine proves nothing about it.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from nodeagent.demo.kubelet import StandInKubelet
from nodeagent.demo.pods import ContainerSpec, PodSpec, RunOptions
from nodeagent.demo.runtime import StandInRuntime

pytestmark = pytest.mark.root

PRINTER = "opencdi.io/printer"
CHECKOUT = Path(__file__).parents[2]
PAGE = "%!PS-Adobe-3.0 showpage\n"
PRINT = ["sh", "-c", f"printf '%s' '{PAGE}' | lp -t page -"]
LIMIT_S = 20.0
DESK = PodSpec(
    name="desk", uid="uid-desk", handler="runsc",
    containers=(ContainerSpec(name="desktop", limits={PRINTER: 1}, args=("sleep", "600")),),
)  # fmt: skip


class Node:
    """The stand-in kubelet and runtime of one node, and the desktop on it."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        (directory / "dp").mkdir()
        self.runtime = StandInRuntime(directory / "rt", directory / "cri.sock")
        self.kubelet = StandInKubelet(directory / "dp", directory / "kubelet/pod-resources/kubelet.sock", self._start)
        self.container = ""

    def config(self, name: str) -> Path:
        path = self.directory / f"{name}.yaml"
        directory = str(self.directory)
        path.write_text(json.dumps({
            "state_dir": f"{directory}/state", "run_dir": f"{directory}/run", "http": {"listen": ""},
            "kubelet": {"root_dir": f"{directory}/kubelet", "device_plugin_dir": f"{directory}/dp"},
            "cri": {"socket": f"{directory}/cri.sock"}, "kubernetes": {"api": "off"},
            "devices": {
                "rules": [{"name": "printers", "match": {"class": "printer", "simulated": True}}],
                "simulated": [{"model": "printer", "serial": "P1"}],
            },
        }))  # fmt: skip
        return path

    def log(self) -> str:
        path = self.directory / "log"
        return path.read_text() if path.exists() else ""

    async def desktop(self) -> None:
        await self.kubelet.until(lambda: len(self.kubelet.allocatable(PRINTER)) == 1, LIMIT_S)
        await self.runtime.run_pod(DESK)
        await self.kubelet.start(DESK)

    async def prints_within(self, limit_s: float) -> float:
        """Seconds until the running desktop has printed once more."""
        began = asyncio.get_running_loop().time()
        output = self.directory / "state/simulated/P1/output"
        before = output.stat().st_size if output.exists() else 0
        while True:
            done = await self.runtime.exec(self.container, PRINT, timeout_s=limit_s)
            if done.code == 0:
                break
            assert asyncio.get_running_loop().time() - began < limit_s, f"{done}\n{self.log()}"
        accepted = asyncio.get_running_loop().time() - began
        while not output.exists() or output.stat().st_size < before + len(PAGE):
            await asyncio.sleep(0.02)
            assert asyncio.get_running_loop().time() - began < limit_s, self.log()
        return accepted

    async def _start(self, pod: PodSpec, container: ContainerSpec, options: RunOptions) -> None:
        self.container = await self.runtime.start_container(pod, container, options.env, options.mounts)


@pytest.fixture
async def node(short_tmp: Path) -> AsyncIterator[Node]:
    made = Node(short_tmp)
    async with made.runtime, made.kubelet:
        yield made


def workers(node: Node) -> set[int]:
    """Processes of seats of this node's daemon: by the name of their cgroup."""
    mine = f"nodeagent-seats-{hashlib.sha256(f'{node.directory}/state'.encode()).hexdigest()[:8]}/"
    found = set()
    for directory in Path("/proc").iterdir():
        with contextlib.suppress(OSError, ValueError, StopIteration):
            lines = (directory / "status").read_text().splitlines()
            if mine in (directory / "cgroup").read_text() and not any(line.startswith("State:\tZ") for line in lines):
                found.add(int(directory.name))
    return found


async def gone(node: Node, pids: set[int], limit_s: float = 5.0) -> None:
    deadline = asyncio.get_running_loop().time() + limit_s
    while left := workers(node) & pids:
        assert asyncio.get_running_loop().time() < deadline, f"{left} outlived their daemon"
        await asyncio.sleep(0.02)


@asynccontextmanager
async def daemon(node: Node, name: str, *, contained: bool) -> AsyncIterator[asyncio.subprocess.Process]:
    """A daemon as a process of its own; `contained`: the main process of a runc container of the machine's own root."""
    command = [sys.executable, "-m", "nodeagent", "run", "--config", str(node.config(name))]
    if contained:
        bundle = node.directory / name
        (bundle / "rootfs").mkdir(parents=True, exist_ok=True)
        (bundle / "config.json").write_text(json.dumps(container_spec(command)))
        command = [
            "unshare", "--mount", "--propagation", "slave", "--", "sh", "-c",
            'mount --rbind / "$1/rootfs" && exec runc --root "$2" run --bundle "$1" "$3"',
            "sh", str(bundle), str(node.directory / "runc"), f"na-{name}-{node.directory.name}",
        ]  # fmt: skip
    with (node.directory / "log").open("ab") as log:
        process = await asyncio.create_subprocess_exec(*command, cwd=CHECKOUT, stdout=log, stderr=log)
    try:
        yield process
    finally:
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(signal.SIGTERM)
            try:
                async with asyncio.timeout(10):
                    await process.wait()
            except TimeoutError:
                process.kill()
                await process.wait()
                raise AssertionError(f"the daemon does not end on SIGTERM\n{node.log()}") from None


def container_spec(args: list[str]) -> dict[str, object]:
    names = (
        "CHOWN DAC_OVERRIDE DAC_READ_SEARCH FOWNER FSETID KILL SETGID SETUID SETPCAP NET_ADMIN NET_RAW IPC_LOCK SYS_CHROOT"
        " SYS_PTRACE SYS_ADMIN SYS_NICE MKNOD SETFCAP SYS_MODULE BPF PERFMON"
    )
    capabilities = [f"CAP_{name}" for name in names.split()]
    return {
        "ociVersion": "1.0.2",
        "process": {
            "args": args, "cwd": str(CHECKOUT), "user": {"uid": 0, "gid": 0}, "env": ["PATH=/usr/sbin:/usr/bin:/sbin:/bin"],
            "capabilities": dict.fromkeys(("bounding", "effective", "permitted"), capabilities),
        },
        "root": {"path": "rootfs", "readonly": False},
        "mounts": [{"destination": "/proc", "type": "proc", "source": "proc"}],
        "linux": {"namespaces": [{"type": "pid"}, {"type": "mount"}, {"type": "ipc"}, {"type": "uts"}]},
    }  # fmt: skip


async def kill_main_process(node: Node, name: str) -> None:
    killer = await asyncio.create_subprocess_exec(
        "runc", "--root", str(node.directory / "runc"), "kill", f"na-{name}-{node.directory.name}", "KILL"
    )
    assert await killer.wait() == 0


async def test_a_desktop_prints_again_after_its_daemon_was_killed_as_main_process(node: Node) -> None:
    async with daemon(node, "first", contained=True) as first:
        await node.desktop()
        await node.prints_within(LIMIT_S)
        before = workers(node)
        assert before
        await kill_main_process(node, "first")
        await first.wait()
        await gone(node, before)
    async with daemon(node, "second", contained=True):
        took = await node.prints_within(LIMIT_S)
        print(f"printed again {took:.2f} s after the restart")
        await node.kubelet.until(lambda: len(node.kubelet.allocatable(PRINTER)) == 1, LIMIT_S)


async def test_a_standby_takes_over_when_the_active_one_ends(node: Node) -> None:
    async with daemon(node, "first", contained=False) as first:
        await node.desktop()
        await node.prints_within(LIMIT_S)
        before = workers(node)
        async with daemon(node, "second", contained=False):
            while "standby" not in node.log():
                await asyncio.sleep(0.05)
            assert workers(node) == before, "a standby has no seats"
            await node.prints_within(LIMIT_S)
            first.send_signal(signal.SIGTERM)
            await first.wait()
            await gone(node, before)
            took = await node.prints_within(LIMIT_S)
            print(f"printed again {took:.2f} s after the first one ended")
            await node.kubelet.until(lambda: len(node.kubelet.allocatable(PRINTER)) == 1, LIMIT_S)


async def test_a_standby_takes_over_from_one_that_is_killed(node: Node) -> None:
    async with daemon(node, "first", contained=False) as first:
        await node.desktop()
        await node.prints_within(LIMIT_S)
        before = workers(node)
        async with daemon(node, "second", contained=False):
            while "standby" not in node.log():
                await asyncio.sleep(0.05)
            first.kill()
            await first.wait()
            await gone(node, before)
            await node.prints_within(LIMIT_S)
