"""Rules against devices: what takes a device, what it is then, and what people are told of the others."""

import pytest

from nodeagent.config import ConfigError, DevicesConfig, parse
from nodeagent.devices.matching import kinds, rule_of
from nodeagent.devices.resources import build, explain
from nodeagent.errors import Reason
from nodeagent.model import Device, DeviceClass, DeviceNode, Interface, UsbDevice

BUS = DeviceNode("/dev/bus/usb/001/009", "usb", 189, 8)


def rules(*lines: str) -> DevicesConfig:
    return parse("devices:\n  rules:\n" + "".join(f"    - {{{line}}}\n" for line in lines)).devices


def usb(*interfaces: Interface, **changes: object) -> UsbDevice:
    given = {"port": "1-1", "vendor": 0x1050, "product": 0x0407, "nodes": (BUS,), "interfaces": interfaces, **changes}
    return UsbDevice(**given)  # type: ignore[arg-type]


def device(found: UsbDevice, cls: DeviceClass = DeviceClass.USB, natural: DeviceClass | None = None) -> Device:
    return Device(id=f"{cls}-{'a' * 20}", cls=cls, usb=found, natural=natural)


TOKEN = usb(Interface(0, 3, 0, 0), name="mToken", vendor=0x055C)
KEYBOARD = usb(Interface(0, 3, 1, 1))
COMBO = usb(Interface(0, 7, 1, 2), Interface(1, 8, 6, 0x50))


def test_a_rule_says_what_a_device_is_taken_for() -> None:
    config = rules("name: tokens, match: {id: '055c:*'}, as: ukey, give: node", "name: raw, match: {class: usb}")
    (kind,) = kinds(TOKEN, config.rules)
    assert (kind.part.cls, kind.natural) == (DeviceClass.UKEY, DeviceClass.USB)
    taken = device(TOKEN, DeviceClass.UKEY, DeviceClass.USB)
    rule = rule_of(taken, config.rules)
    assert rule is not None
    assert rule.name == "tokens"
    assert list(build({taken.id: taken}, config, frozenset()).resources) == ["opencdi.io/ukey", "opencdi.io/usb"]
    assert (
        kinds(TOKEN, rules("name: raw, match: {class: usb}", "name: t, match: {}, as: ukey").rules)[0].part.cls == "usb"
    )


def test_as_takes_the_whole_device() -> None:
    found = kinds(COMBO, rules("name: raw, match: {id: '1050:0407'}, as: usb, give: node").rules)
    assert [(k.part.cls, k.part.interfaces) for k in found] == [(DeviceClass.USB, (0, 1))]
    assert [k.part.interfaces for k in kinds(COMBO, ())] == [(0,), (1,)]


@pytest.mark.parametrize(
    ("match", "offered"),
    [
        ("{}", False),
        ("{class: usb}", False),
        ("{with_interface: '03:01:*'}", False),
        ("{with_interface: 'none-of { 03:01:01 }'}", False),
        ("{input: true}", True),
        ("{with_interface: 'one-of { 03:01:01 03:01:02 }'}", True),
    ],
)
def test_a_keyboard_is_offered_by_a_rule_that_says_so(match: str, offered: bool) -> None:
    keyboard = device(KEYBOARD)
    found = build({keyboard.id: keyboard}, rules(f"name: r, match: {match}, resource: x, give: node"), frozenset())
    assert bool(found.resources["opencdi.io/x"].offers) is offered
    assert [u.reason for u in found.unoffered] == ([] if offered else [Reason.NO_RULE])


def test_input_is_for_keyboards_alone_and_a_composite_one_is_one() -> None:
    config = rules("name: r, match: {input: true}")
    assert explain(device(TOKEN), config)[0].differs == ("it is no keyboard and no mouse",)
    hidden = device(usb(Interface(0, 0xFF, 0, 0), Interface(1, 3, 1, 1)))
    assert rule_of(hidden, rules("name: r, match: {class: usb}").rules) is None
    assert rule_of(hidden, config.rules) is not None


@pytest.mark.parametrize(
    ("match", "why"),
    [
        ("{class: audio}", "class is usb, not audio"),
        ("{id: 'one-of { 1050:* 096e:* }'}", "id is { 055c:0407 }, not one-of { 1050:* 096e:* }"),
        ("{with_interface: '0b:*:*'}", "with_interface is { 03:00:00 }, not equals { 0b:*:* }"),
        ("{name: 'Feitian*'}", "name is mToken, not Feitian*"),
        ("{serial: '12*'}", "serial is none, not 12*"),
        ("{with_connect_type: hardwired}", "with_connect_type is { unknown }, not equals { hardwired }"),
        ("{simulated: true}", "simulated is false, not true"),
    ],
)
def test_people_are_told_what_differs(match: str, why: str) -> None:
    assert explain(device(TOKEN), rules(f"name: r, match: {match}"))[0].differs == (why,)


def test_alternate_settings_count() -> None:
    stick = usb(Interface(0, 8, 6, 0x50), interface_types=("08:06:50", "08:06:62"), connect_type="not used")
    only = rules("name: r, match: {with_interface: 'one-of { 08:06:62 }', with_connect_type: not-used}")
    assert rule_of(device(stick, DeviceClass.STORAGE), only.rules) is not None


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (
            "match: {with_interface: 'one-of { 8 }'}",
            r"devices.rules\[0\].match.with_interface: '8' is no interface type",
        ),
        ("match: {id: '1050'}", r"match.id: .* no device id"),
        ("match: {with_interface: {some-of: ['08:*:*']}}", "none of all-of"),
        ("match: {with_interface: 5}", "with_interface"),
        ("match: {}, as: toaster", r"devices.rules\[0\].as"),
        ("match: {}, resource: [a, a]", "stands twice"),
        ("match: {}, resource: []", "resource"),
        ("match: {}, cdi: true", "only device nodes"),
        ("match: {}, give: node, sandbox: gvisor", "under runc and in KubeVirt only"),
    ],
)
def test_impossible_rules_are_refused_with_their_path(line: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        rules(f"name: r, {line}")


def test_two_rules_that_share_one_of_several_names_have_one_audience() -> None:
    with pytest.raises(ConfigError, match=r"devices.rules\[1\].to: differs .* opencdi.io/b"):
        rules("name: one, match: {}, resource: [a, b]", "name: two, match: {}, resource: b, to: {namespaces: [x]}")
