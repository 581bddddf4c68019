"""One physical device under several names: who is a sibling of whom, and what a lease makes of the others."""

import pytest

from nodeagent.devices.exclusive import Key, blocked, counted, siblings
from nodeagent.model import (
    Audience,
    Device,
    DeviceClass,
    DeviceNode,
    Grant,
    Health,
    Interface,
    Lease,
    Offer,
    Resource,
    UsbDevice,
)

BUS = DeviceNode("/dev/bus/usb/001/009", "usb", 189, 8)
BLOCK = DeviceNode("/dev/sda", "block", 8, 0, 1)
COMBO = UsbDevice(
    port="1-1", vendor=1, product=2, nodes=(BUS, BLOCK), interfaces=(Interface(0, 7, 1, 2), Interface(1, 8, 6, 80))
)


def offer(cls: DeviceClass, *parts: int, give: str = "service", nodes: tuple[DeviceNode, ...] = ()) -> Offer:
    device = Device(id=f"{cls}-x", cls=cls, usb=COMBO, interfaces=parts)
    return Offer(device=device, rule="r", grant=Grant(nodes=nodes), give=give)  # type: ignore[arg-type]


def resources(**offers: Offer) -> dict[str, Resource]:
    return {n: Resource(name=n, to=Audience(), offers={o.device.id: o}) for n, o in offers.items()}


def lease(resource: str, device_id: str) -> Lease:
    return Lease(device_id=device_id, resource=resource, slot="s", generation=1, created_s=0)


PRINTER, DISK = offer(DeviceClass.PRINTER, 0), offer(DeviceClass.STORAGE, 1, give="node", nodes=(BLOCK,))


@pytest.mark.parametrize(
    ("other", "related"),
    [
        (PRINTER, True),  # the same device under two names
        (DISK, False),  # another part of it
        (offer(DeviceClass.STORAGE, 1, give="node", nodes=(BUS,)), True),  # the raw device is all of it
        (offer(DeviceClass.STORAGE, 1, give="usb"), True),
        (offer(DeviceClass.STORAGE, 1, give="service", nodes=(BUS,)), False),  # what a service does not hand out
        (offer(DeviceClass.USB), True),  # every interface
    ],
)
def test_siblings(other: Offer, related: bool) -> None:
    found = siblings(resources(one=PRINTER, two=other))
    one: Key = ("one", "printer-x")
    two: Key = ("two", other.device.id)
    assert found == ({one: (two,), two: (one,)} if related else {})


def test_a_device_that_is_gone_is_still_the_one_with_its_id() -> None:
    gone = Offer(
        device=Device(id="printer-x", cls=DeviceClass.PRINTER, usb=UsbDevice(port="", vendor=0, product=0), present=False),
        rule="", grant=Grant(),
    )  # fmt: skip
    one, two = ("one", "printer-x"), ("two", "printer-x")
    assert siblings(resources(one=PRINTER, two=gone)) == {one: (two,), two: (one,)}


def test_a_lease_makes_siblings_unhealthy_and_not_itself() -> None:
    offered = resources(one=PRINTER, two=PRINTER, three=DISK)
    of = siblings(offered)
    found = blocked(counted(offered, of), of, [lease("two", "printer-x")])
    state = {
        name: (r.offers[i].health, r.offers[i].held_as, r.offers[i].siblings)
        for name, r in found.items()
        for i in r.offers
    }
    assert state == {
        "one": (Health.UNHEALTHY, "two", 1),
        "two": (Health.HEALTHY, "", 1),
        "three": (Health.HEALTHY, "", 0),
    }
    assert found["one"].offers["printer-x"].ailment == "leased_under_other_resource"


def test_one_that_is_leased_itself_stays_its_holders() -> None:
    """Rules may change while two parts are held that can no longer be held together."""
    offered = resources(one=PRINTER, two=PRINTER)
    of = siblings(offered)
    found = blocked(offered, of, [lease("one", "printer-x"), lease("two", "printer-x")])
    assert all(o.health is Health.HEALTHY for r in found.values() for o in r.offers.values())


def test_a_lease_of_something_unknown_changes_nothing() -> None:
    offered = resources(one=PRINTER)
    assert blocked(offered, siblings(offered), [lease("nine", "printer-z")]) == offered
