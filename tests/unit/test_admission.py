"""Who may hold a device: every reason, and the sentence a person reads."""

import pytest

from nodeagent.errors import AgentError, Reason
from nodeagent.model import Audience, Device, DeviceClass, DeviceNode, Grant, Offer, PodRef, Sandbox, UsbDevice
from nodeagent.sandboxes import kind_of
from nodeagent.seats.admission import admit, needs_account

DEVICE = Device(
    id="printer-aaaabbbbccccddddeeee", cls=DeviceClass.PRINTER, usb=UsbDevice(port="1-1", vendor=1, product=2)
)
POD = PodRef("team-a", "desk-1", "uid-1")


def offer(**changes: object) -> Offer:
    return Offer(**{"device": DEVICE, "rule": "printers", "grant": Grant(services=("ipp",)), **changes})


def sandbox(**changes: object) -> Sandbox:
    return Sandbox(**{"id": "s1", "pod": POD, "ready": True, "labels": {"role": "desktop"}, **changes})


@pytest.mark.parametrize(
    "to",
    [
        Audience(),
        Audience(namespaces=("team-*",)),
        Audience(namespaces=("x", "team-a"), labels={"role": "desktop"}),
        Audience(service_accounts=("alice", "bob*")),
    ],
)
def test_admits(to: Audience) -> None:
    admit(to, [offer()], sandbox(), "gvisor", "bobby")


@pytest.mark.parametrize(
    ("to", "changes", "kind", "account", "reason", "words"),
    [
        (Audience(namespaces=("team-b",)), {}, "runc", None, Reason.NAMESPACE_NOT_ALLOWED, "namespace team-a"),
        (Audience(labels={"role": "kiosk"}), {}, "runc", None, Reason.LABELS_DO_NOT_MATCH, "has role=desktop"),
        (Audience(labels={"floor": "2"}), {}, "runc", None, Reason.LABELS_DO_NOT_MATCH, "has floor=(none)"),
        (Audience(service_accounts=("alice",)), {}, "runc", None, Reason.IDENTITY_UNAVAILABLE, "cannot be looked up"),
        (Audience(service_accounts=("alice",)), {}, "runc", "bob", Reason.SERVICE_ACCOUNT_NOT_ALLOWED, "account bob"),
        (Audience(), {"sandbox": "gvisor"}, "runc", None, Reason.SANDBOX_NOT_ALLOWED, "for gvisor desktops"),
        (Audience(), {}, "kata", None, Reason.SANDBOX_NOT_ALLOWED, "under kata cannot be reached"),
        (
            Audience(),
            {"give": "node", "grant": Grant(nodes=(DeviceNode("/dev/usb/lp0", "usbmisc", 180, 0),))},
            "gvisor",
            None,
            Reason.SANDBOX_NOT_ALLOWED,
            "under runc only",
        ),
    ],
)
def test_refuses(to: Audience, changes: dict, kind: str, account: str | None, reason: Reason, words: str) -> None:
    with pytest.raises(AgentError) as caught:
        admit(to, [offer(**changes)], sandbox(), kind, account)  # type: ignore[arg-type]
    assert caught.value.reason is reason
    assert words in caught.value.message
    assert "'printers'" in caught.value.message and "team-a/desk-1" in caught.value.message
    assert caught.value.hint


def test_only_a_named_account_needs_the_api_server() -> None:
    assert not needs_account(Audience())
    assert not needs_account(Audience(service_accounts=("alice", "*")))
    assert needs_account(Audience(service_accounts=("alice",)))


@pytest.mark.parametrize(
    ("handler", "kind"),
    [("", "runc"), ("runc", "runc"), ("crun", "runc"), ("runsc", "gvisor"), ("my-gVisor", "gvisor"), ("kata-qemu", "kata"),
     ("special", "kubevirt")],
)  # fmt: skip
def test_kind_of_a_handler(handler: str, kind: str) -> None:
    assert (
        kind_of(Sandbox(id="s", pod=PodRef("a", "b", "c"), ready=True, handler=handler), {"special": "kubevirt"})
        == kind
    )
