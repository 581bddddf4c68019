"""USBGuard's attribute language: what it reads, what it refuses, and each operator against the same device."""

import pytest

from nodeagent.usbguard import AttributeSet, Operator, SetText, device_id, holds, interface, take_set, word

STICK = ("08:06:50", "08:06:62")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("08:06:50", "equals { 08:06:50 }"),
        ("{ 08:06:50 03:*:* }", "equals { 08:06:50 03:*:* }"),
        ("one-of { 0B:*:* 03:00:* }", "one-of { 0b:*:* 03:00:* }"),
        ("match-all{08:*:*}", "match-all { 08:*:* }"),
        (("08:06:50",), "equals { 08:06:50 }"),
        ({"none-of": ("03:01:01",)}, "none-of { 03:01:01 }"),
        ({"equals_ordered": ("03:01:01",)}, "equals-ordered { 03:01:01 }"),
    ],
)
def test_reads(text: SetText, expected: str) -> None:
    assert str(take_set(text, interface)) == expected


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "neither a value"),
        ("08:06:50 08:06:62", "neither a value"),
        ("one-of { }", "1 to 64"),
        ("some-of { 08:06:50 }", "none of all-of"),
        ("one-of { 08:06:50", "neither a value"),
        ("one-of { 08:06 }", "no interface type"),
        ("*:06:50", "no interface type"),
        ("08:*:50", "no interface type"),
        ("08:06:5", "no interface type"),
        ((), "1 to 64"),
        ({}, "one operator"),
        ({"one-of": ("08:*:*",), "none-of": ("03:*:*",)}, "one operator"),
        (("08:*:*",) * 65, "1 to 64"),
    ],
)
def test_refuses(text: SetText, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        take_set(text, interface)


@pytest.mark.parametrize(
    ("operator", "rule", "fits"),
    [
        ("all-of", ("08:06:50",), True),
        ("all-of", ("08:06:50", "03:*:*"), False),
        ("one-of", ("03:*:*", "08:06:*"), True),
        ("one-of", ("03:*:*",), False),
        ("none-of", ("03:*:*",), True),
        ("none-of", ("03:*:*", "08:06:62"), False),
        ("equals", ("08:06:62", "08:06:50"), True),
        ("equals", ("08:*:*",), False),  # as many values on both sides
        ("equals", ("08:*:*", "08:*:*"), True),
        ("equals", ("08:06:50", "08:06:50"), True),  # as USBGuard does it: each of the rule's fits one
        ("equals-ordered", ("08:06:50", "08:06:62"), True),
        ("equals-ordered", ("08:06:62", "08:06:50"), False),
        ("match-all", ("08:*:*",), True),
        ("match-all", ("08:06:50", "03:*:*"), False),
    ],
)
def test_operators(operator: str, rule: tuple[str, ...], fits: bool) -> None:
    assert holds(AttributeSet(Operator(operator), rule), STICK) is fits


@pytest.mark.parametrize(
    ("operator", "fits"),
    [("all-of", False), ("one-of", False), ("none-of", True), ("equals", False), ("match-all", True)],
)
def test_a_device_without_values(operator: str, fits: bool) -> None:
    assert holds(AttributeSet(Operator(operator), ("08:*:*",)), ()) is fits


def test_other_values() -> None:
    assert device_id("1050:0407") == device_id("1050:0407".upper()) == "1050:0407"
    assert (device_id("1050:*"), device_id("*:*")) == ("1050:*", "*:*")
    for wrong in ("*:0407", "1050", "1050:04", "g050:0407", "1050:0407:1"):
        with pytest.raises(ValueError, match="no device id"):
            device_id(wrong)
    assert word("hotplug") == "hotplug"
    with pytest.raises(ValueError, match="hardwired"):
        word("internal")
