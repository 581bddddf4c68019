"""Rules applied to devices: who takes what, what stays behind, and why."""

import pytest

from nodeagent.config import DevicesConfig, parse
from nodeagent.devices.resources import Resources, build, explain
from nodeagent.errors import Reason
from nodeagent.model import Audience, Device, DeviceClass, DeviceNode, Health, Interface, UsbDevice

IPP = frozenset({"ipp"})


def rules(text: str) -> DevicesConfig:
    """`text` is what stands below devices.rules, checked like a real file."""
    return parse("devices:\n  rules:\n" + "".join(f"    {line}\n" for line in text.strip("\n").splitlines())).devices


def printer(number: int = 1, **changes: object) -> Device:
    usb = {
        "port": f"1-{number}",
        "vendor": 0x03F0,
        "product": 0x1D17,
        "serial": f"SERIAL{number}",
        "interfaces": (Interface(0, 7, 1, 2),),
        "nodes": (DeviceNode(f"/dev/usb/lp{number}", "usbmisc", 180, number, 0),),
        **changes,
    }
    return Device(id=f"printer-{number:020}", cls=DeviceClass.PRINTER, usb=UsbDevice(**usb))  # type: ignore[arg-type]


def headset() -> Device:
    usb = UsbDevice(port="1-6", vendor=0x046D, product=0x0A44, interfaces=(Interface(0, 1, 1, 0),))
    return Device(id="audio-" + "a" * 20, cls=DeviceClass.AUDIO, usb=usb)


def offered(config: DevicesConfig, *devices: Device, services: frozenset[str] = IPP) -> Resources:
    return build({d.id: d for d in devices}, config, services)


PRINTERS = "- {name: printers, match: {class: printer}}"


def test_default_resource() -> None:
    found = offered(rules(PRINTERS), printer())
    assert list(found.resources) == ["opencdi.io/printer"]
    offer = found.resources["opencdi.io/printer"].offers[printer().id]
    assert (offer.rule, offer.give, offer.grant.services) == ("printers", "service", ("ipp",))
    assert found.unoffered == ()


def test_no_rules_no_offers() -> None:
    found = offered(DevicesConfig(), printer())
    assert found.resources == {}
    assert [(u.device_id, u.reason) for u in found.unoffered] == [(printer().id, Reason.NO_RULE)]


@pytest.mark.parametrize(
    ("match", "differs"),
    [
        ("{}", ()),
        ("{class: printer, vendor: 03f0, product: 1d17, serial: SERIAL1, port: 1-1, simulated: false}", ()),
        ("{serial: 'SER*', port: '1-?'}", ()),
        ("{class: audio}", ("class",)),
        ("{vendor: 03f1, product: '0000'}", ("vendor", "product")),
        ("{serial: 'serial1'}", ("serial",)),
        ("{port: '1-1.*', simulated: true}", ("port", "simulated")),
        ("{serial: '[S]ERIAL[0-9]'}", ()),
        ("{serial: SERIAL}", ("serial",)),
    ],
)
def test_match(match: str, differs: tuple[str, ...]) -> None:
    config = rules(f"- {{name: r, match: {match}, resource: printer}}")
    (verdict,) = explain(printer(), config)
    assert (verdict.matched, verdict.takes) == (not differs, not differs)
    assert tuple(why.partition(" ")[0] for why in verdict.differs) == differs
    assert "SERIAL1" not in "".join(verdict.differs), "a serial number is never shown"
    assert bool(offered(config, printer()).unoffered) == bool(differs)


def test_first_match_wins_even_when_it_cannot_give() -> None:
    config = rules("""
- {name: raw, match: {port: 1-1}, resource: raw, give: node}
- {name: printers, match: {class: printer}}
""")
    bare = printer(1, nodes=())
    assert [(u.reason, "raw" in u.message) for u in offered(config, bare).unoffered] == [(Reason.NOT_SUPPORTED, True)]
    assert [(v.rule, v.matched, v.takes) for v in explain(bare, config)] == [
        ("raw", True, True),
        ("printers", True, False),
    ]


def test_a_fixed_resource_stays_without_devices() -> None:
    config = rules("""
- {name: printers, match: {class: printer}}
- {name: alice, match: {serial: A1}, resource: ukey-alice, to: {namespaces: [desktops]}}
- {name: any, match: {vendor: 03f0}}
- {name: each, match: {class: ukey}, resource: 'ukey-{id8}'}
""")
    found = offered(config)
    assert {n: r.offers for n, r in found.resources.items()} == {"opencdi.io/printer": {}, "opencdi.io/ukey-alice": {}}
    assert found.resources["opencdi.io/ukey-alice"].to == Audience(namespaces=("desktops",))


def test_a_resource_per_device() -> None:
    config = rules("- {name: each, match: {class: printer}, resource: 'printer-{id8}'}")
    device = printer()
    found = offered(config, device)
    assert list(found.resources) == [f"opencdi.io/printer-{device.id[8:16]}"]


def test_rules_that_share_a_resource_share_it() -> None:
    config = rules("""
- {name: one, match: {port: 1-1}, resource: office}
- {name: two, match: {port: 1-2}, resource: office, sandbox: runc}
""")
    offers = offered(config, printer(1), printer(2)).resources["opencdi.io/office"].offers
    assert [(o.rule, o.sandbox) for o in offers.values()] == [("one", "any"), ("two", "runc")]


def test_two_audiences_never_meet_in_one_resource() -> None:
    """config.check refuses the same leaf; a generated one may still meet a written one."""
    device = printer()
    config = rules(f"""
- {{name: written, match: {{port: 9-9}}, resource: printer-{device.id[8:16]}, to: {{namespaces: [a]}}}}
- {{name: each, match: {{class: printer}}, resource: 'printer-{{id8}}'}}
""")
    found = offered(config, device)
    assert [u.reason for u in found.unoffered] == [Reason.CONFIG_INVALID]
    assert [r.offers for r in found.resources.values()] == [{}]


def test_an_unplugged_device_stays_in_its_resource() -> None:
    gone = Device(id=printer().id, cls=DeviceClass.PRINTER, usb=printer().usb, present=False)
    offers = offered(rules(PRINTERS), gone).resources["opencdi.io/printer"].offers
    assert offers[gone.id].health is Health.UNHEALTHY
    assert offers[gone.id].ailment == Reason.DEVICE_UNPLUGGED


@pytest.mark.parametrize(
    ("device", "rule", "services", "reason", "words"),
    [
        (headset(), "match: {class: audio}", IPP, Reason.SERVICE_UNAVAILABLE, "none for audio"),
        (printer(nodes=()), "match: {class: printer}", IPP, Reason.SERVICE_UNAVAILABLE, "usblp"),
        (printer(), "match: {class: printer}", frozenset(), Reason.SERVICE_UNAVAILABLE, "ipp"),
        (headset(), "match: {class: audio}, give: node", IPP, Reason.NOT_SUPPORTED, "nodes"),
        (
            printer(nodes=(), simulated=True),
            "match: {class: printer}, give: node",
            IPP,
            Reason.NOT_SUPPORTED,
            "simulated",
        ),
    ],
)
def test_what_cannot_be_given(device: Device, rule: str, services: frozenset[str], reason: Reason, words: str) -> None:
    (unoffered,) = offered(rules(f"- {{name: r, {rule}}}"), device, services=services).unoffered
    assert (unoffered.device_id, unoffered.reason) == (device.id, reason)
    assert words in unoffered.message
    assert "SERIAL" not in unoffered.message


def test_every_device_is_in_exactly_one_place() -> None:
    config = rules("""
- {name: one, match: {port: 1-1}}
- {name: two, match: {port: 1-2}, give: node, resource: raw}
""")
    devices = [printer(1), printer(2), printer(3), headset()]
    found = offered(config, *devices)
    places = [i for r in found.resources.values() for i in r.offers] + [u.device_id for u in found.unoffered]
    assert sorted(places) == sorted(d.id for d in devices)
