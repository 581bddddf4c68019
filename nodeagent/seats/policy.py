"""`to:` of the rules as a ValidatingAdmissionPolicy: what a pod would be refused here, the API server refuses at its creation.

`admit` (admission.py) goes by what CRI says of a pod that holds a device already. This says the same of a Pod object, in CEL,
so that such a pod is never scheduled. Not said: `sandbox:`, since which handler a RuntimeClass has is not in the Pod. Pure.

Every name that Kubernetes gives to a namespace or a service account consists of the characters of `ALPHABET` (RFC 1123 labels
and subdomains). That makes the translation of patterns exact: each `[...]` is the set of characters for which fnmatch itself
says yes, and a pattern that needs any other character fits nobody. Quantities: the API server writes a zero as `0`, and wants a
limit for every extended resource that a container requests.
"""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatchcase
from typing import Any, Literal

import msgspec

from nodeagent.config import DevicesConfig, possible_leaves
from nodeagent.errors import Reason
from nodeagent.model import Audience

FailurePolicy = Literal["Ignore", "Fail"]
Action = Literal["Deny", "Warn", "Audit"]

API = "admissionregistration.k8s.io/v1"
"""Served from Kubernetes 1.30 on."""
ALPHABET = "abcdefghijklmnopqrstuvwxyz0123456789-."
ID8 = "{id8}"
ID8_CEL = "[a-z2-7]{8}"
"""What stands for `{id8}`: lower-case base32 (devices/identity)."""
MAX_RULES_NAMED = 8
MAX_MESSAGE = 1000
"""Characters of each part of a message (the API server drops one of more than 5 KiB: apiserver/pkg/apis/cel/config.go)."""

HAS_LIMITS = "has(c.resources) && has(c.resources.limits)"
VARIABLES = {
    # The limits of every container. Not one list of containers first: on typed lists `+` merges by name.
    "limits": f"object.spec.containers.filter(c, {HAS_LIMITS}).map(c, c.resources.limits)"
    " + (has(object.spec.initContainers) ? object.spec.initContainers : [])"
    f".filter(c, {HAS_LIMITS}).map(c, c.resources.limits)",
    "labels": "has(object.metadata.labels) ? object.metadata.labels : {}",
    # Without an account a pod runs as `default`; the ServiceAccount admission plugin writes that before this is asked.
    "account": 'has(object.spec.serviceAccountName) && object.spec.serviceAccountName != ""'
    ' ? object.spec.serviceAccountName : "default"',
}


class Reserved(msgspec.Struct, frozen=True):
    """A resource name, or with `{id8}` at its end a family of them, that only some pods may ask for."""

    name: str
    to: Audience
    rules: tuple[str, ...]


class Clause(msgspec.Struct, frozen=True):
    """One demand on a pod: CEL for what has to hold, and what is said where it does not.

    The sentence is `before`, what `shown` (CEL) finds in the pod, and `after`; `plain` stands alone.
    """

    reason: Reason
    holds: str
    before: str
    shown: str
    after: str
    plain: str
    hint: str


def policy(
    config: DevicesConfig,
    *,
    name: str = "nodeagent",
    failure_policy: FailurePolicy = "Ignore",
    action: Action = "Deny",
) -> tuple[dict[str, Any], ...]:
    """The policy and its binding, as Kubernetes objects; nothing when the rules let everybody in.

    `failure_policy` is for expressions that cannot be evaluated; the verdict of one that can always counts. Ignore, because the
    daemon refuses the pod anyway, and an outage of this check must not be one of all pods.
    """
    found = reserved(config)
    exact = {r.name for r in found if not r.name.endswith(ID8)}
    validations = [_validation(r, clause, exact) for r in found for clause in _clauses(r.to, r.name)]
    if not validations:
        return ()
    metadata = {"name": name, "labels": {"app.kubernetes.io/name": "nodeagent"}}
    pods = {"apiGroups": [""], "apiVersions": ["v1"], "operations": ["CREATE"], "resources": ["pods"]}
    return (
        {
            "apiVersion": API,
            "kind": "ValidatingAdmissionPolicy",
            "metadata": metadata,
            "spec": {
                "failurePolicy": failure_policy,
                # Labels of a pod that runs can change; the container runtime goes on showing those it was created with.
                "matchConstraints": {"resourceRules": [pods]},
                "variables": [{"name": key, "expression": cel} for key, cel in VARIABLES.items()],
                "validations": validations,
            },
        },
        {
            "apiVersion": API,
            "kind": "ValidatingAdmissionPolicyBinding",
            "metadata": metadata,
            "spec": {"policyName": name, "validationActions": [action]},
        },
    )


def reserved(config: DevicesConfig) -> tuple[Reserved, ...]:
    """Every resource name that the rules can offer, in their order. Rules of one name have one `to:` (config.check)."""
    found: dict[str, Reserved] = {}
    for rule in config.rules:
        for leaf in possible_leaves(rule):
            name = f"{config.domain}/{leaf}"
            known = found.get(name, Reserved(name, rule.to, ()))
            found[name] = Reserved(name, known.to, (*known.rules, rule.name))
    return tuple(found.values())


def _clauses(to: Audience, resource: str) -> Iterable[Clause]:
    """In the order of `admit`, whose reasons and remedies these are."""
    if "*" not in to.namespaces:
        yield Clause(
            reason=Reason.NAMESPACE_NOT_ALLOWED,
            holds=fits("request.namespace", to.namespaces),
            before="does not let namespace ",
            shown="request.namespace",
            after=f" hold {resource}",
            plain=f"does not let the namespace of this pod hold {resource}",
            hint="add the namespace to `to.namespaces` of the rule",
        )
    for key, value in sorted(to.labels.items()):
        quoted, wanted = text(key), f"asks for label {key}={value} to hold {resource}, "
        yield Clause(
            reason=Reason.LABELS_DO_NOT_MATCH,
            holds=f"{quoted} in variables.labels && variables.labels[{quoted}] == {text(value)}",
            before=f"{wanted}the pod has {key}=",
            shown=f'({quoted} in variables.labels ? variables.labels[{quoted}] : "(none)")',
            after="",
            plain=f"{wanted}this pod has another or none",
            hint="label the pod, or change `to.labels` of the rule",
        )
    if "*" not in to.service_accounts:
        yield Clause(
            reason=Reason.SERVICE_ACCOUNT_NOT_ALLOWED,
            holds=fits("variables.account", to.service_accounts),
            before="does not let service account ",
            shown="variables.account",
            after=f" hold {resource}",
            plain=f"does not let the service account of this pod hold {resource}",
            hint="add it to `to.service_accounts` of the rule",
        )


def _validation(resource: Reserved, clause: Clause, exact: set[str]) -> dict[str, Any]:
    rules = ", ".join(f"'{rule}'" for rule in resource.rules[:MAX_RULES_NAMED])
    if len(resource.rules) > MAX_RULES_NAMED:
        rules += " and others"
    end = f" ({clause.reason.value}); {clause.hint}"
    before, after = text(_line(f"rule {rules} {clause.before}")), text(_line(clause.after + end))
    return {
        "expression": f"!{_asks(resource.name, exact)} || ({clause.holds})",
        # Where the pod's part is over 5 KiB or has a line break, the API server falls back to `message`.
        "messageExpression": f"{before} + {clause.shown} + {after}",
        "message": _line(f"rule {rules} {clause.plain}{end}"),
        "reason": "Forbidden",
    }


def _asks(name: str, exact: set[str]) -> str:
    """CEL: does a container ask for at least one of the resource?"""
    if not name.endswith(ID8):
        quoted = text(name)
        return f'variables.limits.exists(l, {quoted} in l && string(l[{quoted}]) != "0")'
    stem = name.removesuffix(ID8)
    others = sorted(n for n in exact if n.startswith(stem) and len(n) == len(stem) + 8)
    unless = f" && !(k in [{', '.join(map(text, others))}])" if others else ""
    regex = text(f"^{_literal(stem)}{ID8_CEL}$")
    return f'variables.limits.exists(l, l.exists(k, k.matches({regex}){unless} && string(l[k]) != "0"))'


def fits(subject: str, patterns: Iterable[str]) -> str:
    """CEL: is `subject`, a name that Kubernetes allows, matched by one of these fnmatch patterns?"""
    patterns = sorted(set(patterns))
    names = [p for p in patterns if not set(p) & set("*?[") and set(p) <= set(ALPHABET)]
    regexes = [r for p in patterns if set(p) & set("*?[") and (r := regex(p)) is not None]
    terms = [f"{subject} in [{', '.join(map(text, names))}]"] if names else []
    if regexes:
        terms.append(f"{subject}.matches({text('^(?:' + '|'.join(regexes) + ')$')})")
    return " || ".join(terms) or "false"


def regex(pattern: str) -> str | None:
    """An fnmatch pattern as RE2, for names of `ALPHABET`; None when it fits none of them."""
    made: list[str] = []
    rest = pattern
    while rest:
        piece, rest = _piece(rest)
        if piece == "*":
            if not made or made[-1] != ".*":
                made.append(".*")
        elif piece == "?":
            made.append(".")
        elif len(piece) > 1:
            among = [c for c in ALPHABET if fnmatchcase(c, piece)]
            if not among:
                return None
            # RE2 reads a dash at the end of a class as itself.
            made.append(
                "[" + "".join(sorted(among, key=lambda c: c == "-")) + "]" if len(among) > 1 else _literal(among[0])
            )
        elif piece not in ALPHABET:
            return None
        else:
            made.append(_literal(piece))
    return "".join(made)


def _piece(pattern: str) -> tuple[str, str]:
    """The first element of an fnmatch pattern and the rest; a `[` that nothing closes stands for itself."""
    if pattern[0] == "[":
        start = 2 if pattern[1:2] == "!" else 1
        end = pattern.find("]", start + 1)  # a `]` that comes first is one of the set
        if end > 0:
            return pattern[: end + 1], pattern[end + 1 :]
    return pattern[0], pattern[1:]


def _literal(name: str) -> str:
    """Of `ALPHABET` and the slash, only the dot means something to RE2 outside a class."""
    return name.replace(".", "[.]")


def _line(sentence: str) -> str:
    """In one line, as messages of a policy have to be, and not endless."""
    return "".join(c if c.isprintable() else " " for c in sentence)[:MAX_MESSAGE]


def text(value: str) -> str:
    """A CEL string literal."""
    made = []
    for c in value:
        if c in '\\"':
            made.append("\\" + c)
        elif " " <= c <= "~":
            made.append(c)
        elif "\ud800" <= c <= "\udfff":
            made.append("\\ufffd")  # half a surrogate pair is no text, and in no label
        elif ord(c) > 0xFFFF:
            made.append(f"\\U{ord(c):08x}")
        else:
            made.append(f"\\u{ord(c):04x}")
    return '"' + "".join(made) + '"'
