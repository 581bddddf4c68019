"""The node in the guest, as a test sees it: start the daemon, run pods, look at what the kubelet was told and when."""

from __future__ import annotations

import asyncio
import json
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import msgspec

from nodeagent.demo.pods import ContainerSpec, PodSpec
from nodeagent.documents import DeviceRow, DevicesDocument
from tests.vm import wire
from tests.vm.lab import Vm
from tests.vm.lines import Calls
from tests.vm.rootfs import LabFailed

REQUEST_TIMEOUT_S = 90.0
START_TIMEOUT_S = 120.0
LIST_TIMEOUT_S = 30.0
LIFE_S = 3600.0
KEPT_EVENTS = 10_000
DOMAIN = "opencdi.io"
LIVE = ("sh", "-c", "trap 'exit 0' TERM; while :; do sleep 3600 & wait $!; done")

DESKTOP_RULES = b"""\
# containerd gives a node in a container the owner and mode of the host's; a desktop is uid 1000 and would find it closed.
# On a cluster device_ownership_from_security_context does this.
SUBSYSTEM=="usb|usbmisc|hidraw|sound", GROUP="1000", MODE="0660"
SUBSYSTEM=="block", KERNEL=="sd*", GROUP="1000", MODE="0660"
"""

Listed = dict[str, dict[str, bool]]


class Node:
    """`async with node(vm)` makes it; `vm` needs the port wire.PORT and the log wire.LOG."""

    def __init__(self, vm: Vm) -> None:
        self.vm = vm
        self.lists: Listed = {}
        """Resource without its domain -> device id -> healthy, as the kubelet has it now."""
        self.history: deque[wire.Lists] = deque(maxlen=KEPT_EVENTS)
        self.uevents: deque[wire.Uevent] = deque(maxlen=KEPT_EVENTS)
        self.ended: deque[int] = deque(maxlen=16)
        """Exit codes of daemons that have ended."""
        self._calls = Calls("the guest's node", self._on_told)
        self._changed = asyncio.Event()
        self._stopping = False
        self._broken = ""
        """Why there is nothing more to wait for."""

    # ---- the daemon and pods

    async def start_daemon(self, **devices: Any) -> None:
        """Start it (again) with these keys of `devices`; returns when every resource of its rules is registered."""
        config = {"node_name": "guest", "http": {"listen": ""}, "kubernetes": {"api": "off"}, "devices": devices}
        self.lists = {}
        self._broken = ""
        await self._ask(wire.StartDaemon(json.dumps(config)))
        count = len({rule.get("resource") or rule["match"].get("class") for rule in devices["rules"]})
        await self.until(lambda lists: len(lists) >= count, timeout_s=START_TIMEOUT_S)

    async def stop_daemon(self, *, kill: bool = False) -> None:
        self._stopping = True
        try:
            await self._ask(wire.StopDaemon(kill))
        finally:
            self._stopping = False

    async def run_pod(self, name: str, *resources: str, labels: dict[str, str] | None = None) -> Pod:
        """A pod with one container, which has one device of each resource. Raises PodFailed."""
        box = ContainerSpec(name="desktop", args=LIVE, limits={f"{DOMAIN}/{leaf}": 1 for leaf in resources})
        spec = PodSpec(name=name, uid=f"uid-{name}", labels=labels or {}, handler="runc", containers=(box,))
        await self.vm.sh("udevadm settle --timeout=20")  # owners and modes are udev's work, and are copied
        return Pod(self, spec, await self._ask(wire.RunPod(spec)))

    async def restart_kubelet(self, *, api_away: bool = False) -> None:
        await self._ask(wire.RestartKubelet(api_away))

    # ---- what can be seen

    async def devices(self) -> tuple[DeviceRow, ...]:
        """`nodeagent devices -o json`: the answer of the daemon that runs."""
        ran = await self.vm.run(["python3", "-m", "nodeagent", "devices", "-o", "json", "--config", wire.CONFIG])
        document = msgspec.json.decode(ran.stdout, type=DevicesDocument)
        assert document.source == "daemon", ran.text
        return document.devices

    def listed(self, resource: str) -> dict[str, bool]:
        """Id -> healthy."""
        return self.lists.get(resource, {})

    async def until(self, condition: Callable[[Listed], object], timeout_s: float = LIST_TIMEOUT_S) -> None:
        """Wait for something that follows from the kubelet's lists. Raises LabFailed with those lists."""
        try:
            async with asyncio.timeout(timeout_s):
                while not condition(self.lists):
                    if self._broken:
                        raise LabFailed(self._broken)
                    self._changed.clear()
                    await self._changed.wait()
        except TimeoutError as error:
            raise LabFailed(f"the kubelet's lists did not become so within {timeout_s:g} s: {self.lists}") from error

    async def appears(self, resource: str) -> str:
        """The id of the only healthy device of a resource, as soon as there is exactly one."""
        await self.until(lambda _: len([i for i, good in self.listed(resource).items() if good]) == 1)
        return next(i for i, good in self.listed(resource).items() if good)

    async def _ask(self, request: wire.Request) -> wire.Answer:
        answer = await self._calls.call({"request": msgspec.to_builtins(request)}, REQUEST_TIMEOUT_S)
        found = msgspec.convert(answer, wire.Answer)
        if found.error:
            raise PodFailed(found.error)
        return found

    def _on_told(self, message: dict[str, Any]) -> None:
        event = msgspec.convert(message["event"], wire.AnyEvent)  # type: ignore[arg-type]
        match event:
            case wire.Lists():
                self.history.append(event)
                self.lists = {
                    name.partition("/")[2]: devices for name, devices in event.lists.items() if name in event.connected
                }
            case wire.Uevent():
                self.uevents.append(event)
            case wire.DaemonEnded():
                self.ended.append(event.code)
                if not self._stopping:
                    self._broken = f"the daemon ended with {event.code}:\n{self.vm.log_of(wire.LOG)}"
        self._changed.set()


class PodFailed(LabFailed):
    """The node refused; the message is the kubelet's."""


class Pod:
    """A pod that runs. Use as a block, `async with await node.run_pod(...) as pod`: it is ended at the end of it."""

    def __init__(self, node: Node, spec: PodSpec, answer: wire.Answer) -> None:
        self.spec = spec
        self.options = answer.options
        self._node = node
        self._held = {name.partition("/")[2]: ids for name, ids in answer.held.items()}

    async def __aenter__(self) -> Pod:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.end()

    def held(self, resource: str) -> str:
        """The id that the kubelet chose."""
        [device] = self._held[resource]
        return device

    @property
    def nodes(self) -> tuple[str, ...]:
        """The device nodes it was given, by their path inside."""
        return tuple(sorted(node.container_path for node in self.options.nodes))

    async def exec(self, argv: Sequence[str], *, stdin: bytes = b"", timeout_s: float = 60.0) -> wire.Answer:
        """Run a program in its container, as uid 1000; the answer's `code` is the program's."""
        box = self.spec.containers[0].name
        return await self._node._ask(wire.Exec(self.spec, box, tuple(argv), stdin, timeout_s))

    async def sh(self, script: str, **how: Any) -> str:
        """What a shell script prints in it. Raises LabFailed when it fails."""
        ran = await self.exec(["sh", "-ec", script], **how)
        if ran.code:
            raise LabFailed(f"in pod {self.spec.name}: exit {ran.code}: {script}\n{ran.stdout}{ran.stderr}")
        return ran.stdout

    async def end(self) -> None:
        await self._node._ask(wire.EndPod(self.spec))


@asynccontextmanager
async def node(vm: Vm) -> AsyncIterator[Node]:
    """Start kubelet and runtime in the guest. They, and a daemon that still runs, end with the block."""
    await vm.put("/etc/udev/rules.d/99-desktop.rules", DESKTOP_RULES)
    await vm.sh("udevadm control --reload")
    made = Node(vm)
    await made._calls.connect(vm.socket(wire.PORT))
    async with asyncio.TaskGroup() as group:
        reading = group.create_task(made._calls.run(), name="node port")

        async def live() -> None:
            ran = await vm.run(["python3", "-m", "tests.vm.guest.node"], timeout_s=LIFE_S, check=False)
            made._broken = f"the guest's node ended with {ran.code}\n{ran.text}{ran.stderr.decode(errors='replace')}"
            made._changed.set()

        living = group.create_task(live(), name="node in the guest")
        try:
            await made.until(lambda _: made.history, timeout_s=START_TIMEOUT_S)
            yield made
        finally:
            made._calls.close()
            await asyncio.wait((living, reading), timeout=REQUEST_TIMEOUT_S)
            for task in (living, reading):
                task.cancel()
