"""Device nodes follow a replug: what is asked of the sandbox, what is remembered, what happens when it refuses."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from nodeagent.devices.cri import CriView
from nodeagent.devices.slots import SlotDocument, Slots
from nodeagent.errors import AgentError, Reason
from nodeagent.metrics import Metrics
from nodeagent.model import Container, Device, DeviceClass, DeviceNode, Grant, Offer, PodRef, UsbDevice
from nodeagent.seats.node_carriage import AGAIN_S, NodeCarriage

POD = PodRef("d", "desk", "uid-desk")
OLD, NEW = DeviceNode("/dev/bus/usb/001/005", "usb", 189, 4), DeviceNode("/dev/bus/usb/001/006", "usb", 189, 5)


class Scene:
    """One seat with one slot, whose document says that its containers have OLD."""

    def __init__(self, directory: Path) -> None:
        self.slots = Slots(directory)
        self.slots.prepare()
        self.slots.ensure("slot")
        self.write((OLD,))
        self.nodes: tuple[DeviceNode, ...] = (OLD,)
        self.present = True
        self.time = 1000.0
        self.carried: list[tuple[str, list[DeviceNode], list[DeviceNode]]] = []
        self.told: list[str] = []
        self.fails: Exception | None = None
        slot = SimpleNamespace(name="slot", resource="r", ids=("ukey-a",))
        roster: Any = SimpleNamespace(seats={"s": SimpleNamespace(pod=POD, kind="runc", slots={"slot": slot})})
        report: Any = SimpleNamespace(pod_event=lambda pod, reason, message: self.told.append(message))
        self.carriage = NodeCarriage(
            roster=roster, slots=self.slots, offers=self.offers, carry=self.carry, report=report, metrics=Metrics(),
            clock=lambda: self.time,
        )  # fmt: skip
        self.seat = roster.seats["s"]

    def write(self, nodes: tuple[DeviceNode, ...]) -> None:
        self.slots.write(SlotDocument(slot="slot", resource="r", ids=("ukey-a",), state="bound", nodes=nodes))

    def offers(self, resource: str, ids: tuple[str, ...]) -> list[Offer]:
        usb = UsbDevice(port="1-1", vendor=1, product=2, nodes=self.nodes)
        device = Device(id="ukey-a", cls=DeviceClass.UKEY, usb=usb, present=self.present)
        return [Offer(device=device, rule="r", grant=Grant(nodes=self.nodes), give="node")]

    def carry(self, container: Container, gone: Sequence[DeviceNode], come: Sequence[DeviceNode]) -> None:
        if self.fails:
            raise self.fails
        self.carried.append((container.id, list(gone), list(come)))

    @property
    def has(self) -> tuple[DeviceNode, ...]:
        document = self.slots.read("slot")
        assert document is not None
        return document.nodes

    async def follow(self) -> None:
        here = {"/run/opencdi/ukey": str(self.slots.path("slot"))}
        boxes = [
            Container(id=i, sandbox_id="s", name=i, running=True, mounts=mounts, pid=7)
            for i, mounts in (("desktop", here), ("other", {}))
        ]
        await self.carriage.follow(CriView((), tuple(boxes)))


async def test_a_replug_is_followed_in_two_steps(tmp_path: Path) -> None:
    scene = Scene(tmp_path)
    await scene.follow()
    assert scene.carried == [], "nothing changed"
    scene.present = False
    await scene.follow()
    assert scene.carried == [("desktop", [OLD], [])], "at once: the numbers may be another device's next"
    assert scene.has == ()
    scene.present, scene.nodes = True, (NEW,)
    await scene.follow()
    await scene.follow()
    assert scene.carried[1:] == [("desktop", [OLD], [NEW])], "what is gone stays gone"
    assert scene.has == (NEW,)


async def test_a_quick_replug_is_one_change(tmp_path: Path) -> None:
    scene = Scene(tmp_path)
    scene.nodes = (NEW,)
    await scene.follow()
    assert scene.carried == [("desktop", [OLD], [NEW])]


@pytest.mark.parametrize("error", [AgentError(Reason.NOT_SUPPORTED, "a user namespace"), OSError(1, "not permitted")])
async def test_a_refusal_is_said_once_and_tried_again(tmp_path: Path, error: Exception) -> None:
    scene = Scene(tmp_path)
    scene.nodes, scene.fails = (NEW,), error
    await scene.follow()
    await scene.follow()
    assert len(scene.told) == 1
    assert scene.has == (OLD,)
    scene.fails = None
    await scene.follow()
    assert scene.has == (NEW,)


async def test_what_was_changed_is_asked_for_again(tmp_path: Path) -> None:
    """daemon-reload and runc update put permissions back as they were when the container was made."""
    scene = Scene(tmp_path)
    scene.time += AGAIN_S
    await scene.follow()
    assert scene.carried == [], "what was never changed is left alone"
    scene.nodes = (NEW,)
    await scene.follow()
    await scene.follow()
    assert len(scene.carried) == 1
    scene.time += AGAIN_S
    await scene.follow()
    assert scene.carried[1:] == [("desktop", [OLD], [NEW])]


@pytest.mark.parametrize("kind", ["gvisor", "kubevirt"])
async def test_only_runc_takes_nodes(tmp_path: Path, kind: str) -> None:
    scene = Scene(tmp_path)
    scene.seat.kind = kind
    scene.nodes = (NEW,)
    await scene.follow()
    assert scene.carried == []
