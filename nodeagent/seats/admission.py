"""Who may hold the devices of a slot: `to:` and `sandbox:` of the rules against what CRI says of the pod. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatchcase

from nodeagent.errors import AgentError, Reason
from nodeagent.model import Audience, Offer, Sandbox, SandboxKind
from nodeagent.sandboxes import REACHED


def needs_account(to: Audience) -> bool:
    """Whether the pod's service account has to be known (it needs the API server; everything else works offline)."""
    return "*" not in to.service_accounts


def admit(to: Audience, offers: Iterable[Offer], sandbox: Sandbox, kind: SandboxKind, account: str | None) -> None:
    """Return if the pod of `sandbox` may hold `offers`; raise AgentError with the rule and the reason if not.

    `account` is the pod's service account, None where it is not known.
    """
    offers = tuple(offers)
    pod = sandbox.pod
    rules = ", ".join(sorted({f"'{o.rule}'" for o in offers})) or "the rules"
    if not any(fnmatchcase(pod.namespace, pattern) for pattern in to.namespaces):
        raise AgentError(
            Reason.NAMESPACE_NOT_ALLOWED,
            f"rule {rules} does not let namespace {pod.namespace} hold this device (pod {pod})",
            hint="add the namespace to `to.namespaces` of the rule",
        )
    for key, value in sorted(to.labels.items()):
        if sandbox.labels.get(key) != value:
            raise AgentError(
                Reason.LABELS_DO_NOT_MATCH,
                f"rule {rules} asks for label {key}={value}, pod {pod} has {key}={sandbox.labels.get(key, '(none)')}",
                hint="label the pod, or change `to.labels` of the rule",
            )
    if needs_account(to):
        if account is None:
            raise AgentError(
                Reason.IDENTITY_UNAVAILABLE,
                f"rule {rules} asks for a service account and that of pod {pod} cannot be looked up now",
                hint="the API server must have answered once for this pod",
            )
        if not any(fnmatchcase(account, pattern) for pattern in to.service_accounts):
            raise AgentError(
                Reason.SERVICE_ACCOUNT_NOT_ALLOWED,
                f"rule {rules} does not let service account {account} hold this device (pod {pod})",
                hint="add it to `to.service_accounts` of the rule",
            )
    for offer in offers:
        _check_sandbox(offer, kind, sandbox)


def _check_sandbox(offer: Offer, kind: SandboxKind, sandbox: Sandbox) -> None:
    if offer.sandbox not in ("any", kind):
        raise AgentError(
            Reason.SANDBOX_NOT_ALLOWED,
            f"rule '{offer.rule}' is for {offer.sandbox} desktops, pod {sandbox.pod} runs under {kind}",
            hint=f"use a RuntimeClass of {offer.sandbox}, or change `sandbox` of the rule",
        )
    if kind == "kubevirt" and offer.give == "node":
        return
    if kind not in REACHED:
        raise AgentError(
            Reason.SANDBOX_NOT_ALLOWED,
            f"desktops under {kind} cannot be reached by this version (pod {sandbox.pod}, rule '{offer.rule}')",
            hint="run the desktop under runc or gVisor",
        )
    if offer.give == "node" and kind != "runc":
        raise AgentError(
            Reason.SANDBOX_NOT_ALLOWED,
            f"rule '{offer.rule}' gives a device node, which works under runc only; pod {sandbox.pod} runs under {kind}",
            hint="use `give: service`, which works in every sandbox",
        )
