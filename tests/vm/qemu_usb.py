"""USB devices that QEMU plays, plugged in while the guest runs. Each is a block: at its end the device is unplugged.

`port` is a port of the xHCI controller, 1 to 8; without one QEMU takes the first that is free. Of these devices only the
stick lets its serial number be chosen; the others have one that QEMU makes of the controller and the port, or a constant.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from tests.vm.card import Card
from tests.vm.lab import Vm

STICK, AUDIO, READER, KEYBOARD = "46f4:0001", "46f4:0002", "08e6:4433", "0627:0001"
"""vendor:product of QEMU's devices (docs and hw/usb/dev-*.c)."""
CARD_TIMEOUT_S = 20.0


def _at(port: int) -> dict[str, object]:
    return {"bus": "usb.0", **({"port": str(port)} if port else {})}


@asynccontextmanager
async def stick(vm: Vm, image: Path, serial: str, port: int = 0) -> AsyncIterator[str]:
    """A stick whose content is the file `image` on this side. Yields QEMU's id of it."""
    drive = vm.new_name("drive")
    await vm.qmp("blockdev-add", driver="raw", node_name=drive, file={"driver": "file", "filename": str(image)})
    try:
        async with _plugged(vm, "usb-storage", drive=drive, serial=serial, removable=True, **_at(port)) as device:
            yield device
    finally:
        await vm.qmp("blockdev-del", node_name=drive)


@asynccontextmanager
async def keyboard(vm: Vm, port: int = 0) -> AsyncIterator[str]:
    async with _plugged(vm, "usb-kbd", **_at(port)) as device:
        yield device


@asynccontextmanager
async def audio(vm: Vm, port: int = 0) -> AsyncIterator[str]:
    """A sound card that plays into `vm.directory / "audio"`, a WAV file."""
    async with _plugged(vm, "usb-audio", audiodev="audio", **_at(port)) as device:
        yield device


@asynccontextmanager
async def reader(vm: Vm, card: Card, port: int = 0) -> AsyncIterator[str]:
    """A card reader with `card` in it."""
    name = vm.new_name("card")
    socket = vm.directory / name
    backend = {"addr": {"type": "unix", "data": {"path": str(socket)}}, "server": True, "wait": False}
    await vm.qmp("chardev-add", id=name, backend={"type": "socket", "data": backend})
    try:
        async with _plugged(vm, "usb-ccid", **_at(port)) as device:
            await vm.plug("ccid-card-passthru", bus=f"{device}.0", chardev=name)
            async with asyncio.TaskGroup() as group:
                serving = group.create_task(card.run(socket), name=f"card {name}")
                try:
                    async with asyncio.timeout(CARD_TIMEOUT_S):
                        await card.inserted.wait()
                    yield device
                finally:
                    serving.cancel()
    finally:
        await vm.qmp("chardev-remove", id=name)


@asynccontextmanager
async def _plugged(vm: Vm, driver: str, **properties: object) -> AsyncIterator[str]:
    device = await vm.plug(driver, **properties)
    try:
        yield device
    finally:
        await vm.unplug(device)
