"""An allocator whose decisions a test makes, and resources made from a line."""

from __future__ import annotations

import asyncio

from nodeagent.devices.plugin import MountSpec, SlotAnswer
from nodeagent.errors import AgentError
from nodeagent.model import Audience, Device, DeviceClass, Grant, Offer, Resource, UsbDevice


def resource(name: str = "opencdi.io/printer", **present: bool) -> Resource:
    """`resource(a=True, b=False)`: printers `printer-a`, there, and `printer-b`, unplugged."""
    offers = {}
    for letter, there in present.items():
        usb = UsbDevice(port=f"sim-{letter}", vendor=1, product=2, simulated=True)
        device = Device(id=f"printer-{letter}", cls=DeviceClass.PRINTER, usb=usb, present=there)
        offers[device.id] = Offer(device=device, rule="all", grant=Grant(services=("ipp",)))
    return Resource(name=name, to=Audience(), offers=offers)


class FakeAllocator:
    """Grants everything, unless told to refuse, to hang (`held` cleared) or to break."""

    def __init__(self) -> None:
        self.allocated: list[tuple[str, tuple[str, ...]]] = []
        self.started: list[tuple[str, tuple[str, ...]]] = []
        self.refuse: AgentError | Exception | None = None
        self.free = asyncio.Event()
        self.free.set()
        self.waiting = 0

    async def allocate(self, resource: Resource, ids: tuple[str, ...]) -> SlotAnswer:
        await self._decide()
        self.allocated.append((resource.name, ids))
        inside = f"/run/opencdi/{resource.leaf}"
        return SlotAnswer(
            env={"CUPS_SERVER": f"{inside}/ipp.sock", f"OPENCDI_{resource.leaf.upper()}": "-".join(ids)},
            mounts=(MountSpec(container_path=inside, host_path="/run/nodeagent/slots/x", read_only=True),),
        )

    async def prestart(self, resource: Resource, ids: tuple[str, ...]) -> None:
        await self._decide()
        self.started.append((resource.name, ids))

    async def _decide(self) -> None:
        self.waiting += 1
        try:
            await self.free.wait()
        finally:
            self.waiting -= 1
        if self.refuse is not None:
            raise self.refuse
