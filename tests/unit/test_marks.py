"""How the taint and the label of a node are written."""

import pytest

from nodeagent.errors import ConfigError
from nodeagent.marks import Label, Taint, take_label, take_taint


@pytest.mark.parametrize(
    ("text", "taint"),
    [
        ("", None),
        ("opencdi.io/not-ready:NoSchedule", Taint("opencdi.io/not-ready", "NoSchedule")),
        ("not_ready=Yes.1:PreferNoSchedule", Taint("not_ready", "PreferNoSchedule", "Yes.1")),
        ("a=:NoSchedule", Taint("a", "NoSchedule")),
        ("x." * 126 + "x/" + "k" * 63 + ":NoSchedule", Taint("x." * 126 + "x/" + "k" * 63, "NoSchedule")),
    ],
)
def test_a_taint(text: str, taint: Taint | None) -> None:
    assert take_taint(text, "k") == taint


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("opencdi.io/not-ready", "no effect"),
        (":NoSchedule", "not a name"),
        ("a:noschedule", "is no effect"),
        ("a:NoExecute", "would end the desktops"),
        ("a/b/c:NoSchedule", "not a DNS name"),
        ("/b:NoSchedule", "not a DNS name"),
        ("A.io/b:NoSchedule", "not a DNS name"),
        ("a..b/c:NoSchedule", "not a DNS name"),
        ("a.io/:NoSchedule", "not a name"),
        ("-a:NoSchedule", "not a name"),
        ("a\n:NoSchedule", "not a name"),
        ("k" * 64 + ":NoSchedule", "not a name"),
        ("x." * 126 + "xx/k:NoSchedule", "not a DNS name"),
        ("a=b=c:NoSchedule", "value"),
        ("a=-:NoSchedule", "value"),
    ],
)
def test_no_taint(text: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said) as refused:
        take_taint(text, "kubernetes.startup_taint")
    assert refused.value.message.startswith("kubernetes.startup_taint: ")


@pytest.mark.parametrize(
    ("text", "label"),
    [("", None), ("opencdi.io/devices=ready", Label("opencdi.io/devices", "ready")), ("a=", Label("a", ""))],
)
def test_a_label(text: str, label: Label | None) -> None:
    assert take_label(text, "k") == label


@pytest.mark.parametrize(
    ("text", "said"), [("a", "no value"), ("=b", "not a name"), ("a=b c", "value"), ("a b=c", "not a name")]
)
def test_no_label(text: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said) as refused:
        take_label(text, "kubernetes.ready_label")
    assert refused.value.message.startswith("kubernetes.ready_label: ")
