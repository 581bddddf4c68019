"""The policy for the API server and the daemon's own judgement say the same of every pod: CEL, evaluated, against `admit`.

`rules -> build -> admit` is what the daemon does with devices; `rules -> policy -> CEL` knows rules only.
"""

from __future__ import annotations

import json
from fnmatch import fnmatchcase
from typing import Any

import celpy
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from nodeagent.config import DevicesConfig, Match, Rule, parse
from nodeagent.devices.resources import build
from nodeagent.errors import AgentError, Reason
from nodeagent.model import Audience, Device, DeviceClass, PodRef, Sandbox, UsbDevice
from nodeagent.seats.admission import admit
from nodeagent.seats.policy import ALPHABET, MAX_MESSAGE, fits, policy, regex, reserved, text

CEL = celpy.Environment()
Pod = dict[str, Any]


def evaluate(expression: str, **names: Any) -> Any:
    """The value of one expression; an error in it raises."""
    program = CEL.program(CEL.compile(expression))
    return program.evaluate({name: celpy.json_to_cel(value) for name, value in names.items()})


def refused_by_policy(config: DevicesConfig, pod: Pod) -> list[tuple[str, str]]:
    """What the API server would do with the policy: the reasons and messages of every validation that fails."""
    if not (made := policy(config)):
        return []
    spec = made[0]["spec"]
    names: dict[str, Any] = {
        "object": celpy.json_to_cel(pod),
        "request": celpy.json_to_cel({"namespace": pod["metadata"]["namespace"]}),
    }
    variables = {}
    for variable in spec["variables"]:
        program = CEL.program(CEL.compile(variable["expression"]))
        variables[celpy.celtypes.StringType(variable["name"])] = program.evaluate(names)
    names["variables"] = celpy.celtypes.MapType(variables)
    refused = []
    for validation in spec["validations"]:
        verdict = CEL.program(CEL.compile(validation["expression"])).evaluate(names)
        assert isinstance(verdict, celpy.celtypes.BoolType), verdict
        if not verdict:
            said = CEL.program(CEL.compile(validation["messageExpression"])).evaluate(names)
            assert isinstance(said, str)
            refused.append((validation["message"], str(said)))
    return refused


def refused_by_daemon(config: DevicesConfig, devices: dict[str, Device], pod: Pod) -> set[Reason]:
    """What `admit` says of each resource that a container of the pod asks for, once its sandbox is there."""
    meta, spec = pod["metadata"], pod["spec"]
    sandbox = Sandbox(
        id="s", pod=PodRef(meta["namespace"], "desk", "uid"), ready=True, labels=dict(meta.get("labels", {}))
    )
    built = build(devices, config, frozenset({"ipp"})).resources
    reasons = set()
    for container in [*spec["containers"], *spec.get("initContainers", [])]:
        for name, quantity in container.get("resources", {}).get("limits", {}).items():
            if quantity != "0" and name in built:
                account = spec.get("serviceAccountName") or "default"
                try:
                    admit(built[name].to, built[name].offers.values(), sandbox, "runc", account)
                except AgentError as error:
                    reasons.add(error.reason)
    return reasons


# ---- many rules and pods

IDS = ("aaaabbbb", "abcdefgh", "22334455")
DEVICES = {
    f"printer-{i}ccccddddeeee": Device(
        id=f"printer-{i}ccccddddeeee",
        cls=DeviceClass.PRINTER,
        usb=UsbDevice(port=f"1-{n}", vendor=1, product=2, serial=f"S{n}", simulated=True),
    )
    for n, i in enumerate(IDS)
}
LEAVES = (None, "printer", "desk", "desk-{id8}", "desk-aaaabbbb")
ASKABLE = (
    *(f"opencdi.io/{leaf}" for leaf in ("printer", "desk", *(f"desk-{i}" for i in IDS))),
    *("opencdi.io/desk-aaaabbbbb", "opencdi.io/desk-aaaa-bbb", "opencdixio/printer", "nvidia.com/printer"),
)
PIECES = ("*", "?", "[a-c]", "[!a-c]", "[]a]", "[c-a]", "[", "[!]", "[!]a]", "[^a]", "[a-]", "[+--]", "[a&&b]", "[\\a]",
          "team", "a", "b", ".", "-", "A", "é", "\n", "|", "(", "$", "\\", "{")  # fmt: skip
PATTERNS = st.lists(st.sampled_from(PIECES), min_size=1, max_size=4).map("".join)
NAMES = st.one_of(
    st.sampled_from(["team", "team-a", "default", "a", "ab", "b-team", "abc.d"]),
    st.text(ALPHABET, min_size=1, max_size=6),
)
KEYS = st.sampled_from(["role", "opencdi.io/user", 'od"d\\', "ключ"])
VALUES = st.sampled_from(["nurse", "", "a.b", "'", "\ud83d\ude00", "\n"])
AUDIENCES = st.builds(
    Audience,
    namespaces=st.one_of(st.just(("*",)), st.lists(PATTERNS, min_size=1, max_size=3).map(tuple)),
    labels=st.dictionaries(KEYS, VALUES, max_size=2),
    service_accounts=st.one_of(st.just(("*",)), st.lists(PATTERNS, min_size=1, max_size=2).map(tuple)),
)


def containers(names: list[str]) -> st.SearchStrategy[Pod]:
    limits = st.dictionaries(st.sampled_from(names), st.sampled_from(["1", "0", "2"]), min_size=1, max_size=2)
    asking = limits.map(lambda asked: {"name": "c", "resources": {"limits": asked}})
    return st.one_of(asking, st.sampled_from([{"name": "c"}, {"name": "c", "resources": {}}]))


@st.composite
def configs(draw: st.DrawFn) -> DevicesConfig:
    """Rules as config.check lets them through: one `to:` for all rules of a resource."""
    to = {leaf: draw(AUDIENCES) for leaf in LEAVES}
    to[None] = to["printer"]
    rules = []
    for number in range(draw(st.integers(1, 4))):
        leaf = draw(st.sampled_from(LEAVES))
        match = Match(class_="printer", serial=draw(st.sampled_from([None, "S0", "S[12]"])))
        rules.append(
            Rule(
                name=draw(st.sampled_from(["office", "it's", "a\nb"])) + str(number),
                match=match,
                resource=leaf,
                to=to[leaf],
            )
        )
    return DevicesConfig(rules=tuple(rules))


@st.composite
def scenes(draw: st.DrawFn) -> tuple[DevicesConfig, Pod]:
    """Rules, and a pod that asks for what they offer or for something that only looks like it."""
    config = draw(configs())
    offered = [
        n for r in reserved(config) for n in (r.name, *(r.name.replace("{id8}", i) for i in IDS)) if "{" not in n
    ]
    container = containers(offered) | containers(list(ASKABLE))
    metadata: Pod = {"namespace": draw(NAMES)}
    if draw(st.booleans()):
        metadata["labels"] = draw(st.dictionaries(KEYS, VALUES, max_size=2))
    spec: Pod = {"containers": draw(st.lists(container, min_size=1, max_size=2))}
    if draw(st.booleans()):
        spec["initContainers"] = draw(st.lists(container, max_size=2))
    if draw(st.booleans()):
        spec["serviceAccountName"] = draw(NAMES | st.just(""))
    return config, {"metadata": metadata, "spec": spec}


@settings(max_examples=60, deadline=None)
@given(scenes())
def test_the_policy_refuses_what_the_daemon_would(scene: tuple[DevicesConfig, Pod]) -> None:
    config, pod = scene
    daemon = refused_by_daemon(config, DEVICES, pod)
    refused = refused_by_policy(config, pod)
    if daemon:
        assert refused
        assert {r for r in daemon if any(f"({r.value})" in said for _, said in refused)} == daemon
    else:
        # A family `x-{id8}` is refused whole, also a member that no device of this node has.
        named = build(DEVICES, config, frozenset({"ipp"})).resources
        whole = [said for _, said in refused if "{id8}" not in said]
        asked = {n for c in [*pod["spec"]["containers"], *pod["spec"].get("initContainers", [])]
                 for n, q in c.get("resources", {}).get("limits", {}).items() if q != "0"}  # fmt: skip
        assert not whole and (not refused or any("desk-" in n and n not in named for n in asked))


@settings(max_examples=200, deadline=None)
@given(st.lists(PATTERNS, min_size=1, max_size=3), NAMES)
def test_patterns_fit_what_fnmatch_fits(patterns: list[str], name: str) -> None:
    assert bool(evaluate(fits("n", patterns), n=name)) == any(fnmatchcase(name, p) for p in patterns)


@pytest.mark.parametrize(
    ("pattern", "made"),
    [
        ("team", "team"),
        ("a.b", "a[.]b"),
        ("*", ".*"),
        ("a**b?", "a.*b."),
        ("[a-c]x", "[abc]x"),
        ("[!a-y]", "[z0123456789.-]"),
        ("[.]", "[.]"),
        ("[a-c", None),
        ("[c-a]", None),
        ("[A-Z]", None),
        ("Team", None),
        ("", ""),
    ],
)
def test_regex(pattern: str, made: str | None) -> None:
    assert regex(pattern) == made


# ---- what people read


def rules(below: str) -> DevicesConfig:
    return parse("devices: {rules: [" + below + "]}").devices


def pod(namespace: str, limits: dict[str, str], labels: dict[str, str] | None = None, account: str = "") -> Pod:
    spec: Pod = {"containers": [{"name": "c", "resources": {"limits": limits}}]}
    return {
        "metadata": {"namespace": namespace, "labels": labels or {}},
        "spec": {**spec, "serviceAccountName": account} if account else spec,
    }


OFFICE = rules(
    "{name: office, match: {class: printer},"
    " to: {namespaces: ['desk-*'], labels: {role: nurse}, service_accounts: [alice]}}"
)


@pytest.mark.parametrize(
    ("namespace", "labels", "account", "said"),
    [
        ("desk-1", {"role": "nurse"}, "alice", ()),
        (
            "kiosk",
            {"role": "nurse"},
            "alice",
            (
                "rule 'office' does not let namespace kiosk hold opencdi.io/printer (namespace_not_allowed);"
                " add the namespace to `to.namespaces` of the rule",
            ),
        ),
        (
            "desk-1",
            {"role": "cook"},
            "alice",
            (
                "rule 'office' asks for label role=nurse to hold opencdi.io/printer, the pod has role=cook"
                " (labels_do_not_match); label the pod, or change `to.labels` of the rule",
            ),
        ),
        (
            "desk-1",
            {},
            "",
            (
                "rule 'office' asks for label role=nurse to hold opencdi.io/printer, the pod has role=(none)"
                " (labels_do_not_match); label the pod, or change `to.labels` of the rule",
                "rule 'office' does not let service account default hold opencdi.io/printer (service_account_not_allowed);"
                " add it to `to.service_accounts` of the rule",
            ),
        ),
    ],
)
def test_the_message_names_rule_and_reason(
    namespace: str, labels: dict[str, str], account: str, said: tuple[str, ...]
) -> None:
    refused = refused_by_policy(OFFICE, pod(namespace, {"opencdi.io/printer": "1"}, labels, account))
    assert tuple(message for _, message in refused) == said


def test_what_asks_is_any_container_for_more_than_nothing() -> None:
    assert refused_by_policy(OFFICE, pod("kiosk", {"opencdi.io/printer": "0", "nvidia.com/gpu": "1"})) == []
    first = pod("kiosk", {})
    first["spec"]["initContainers"] = [{"name": "i", "resources": {"limits": {"opencdi.io/printer": "1"}}}]
    assert refused_by_policy(OFFICE, first)
    first["spec"]["initContainers"] += [{"name": "j"}]
    first["spec"]["containers"] = [{"name": "c", "resources": {}}]
    assert refused_by_policy(OFFICE, first)
    first["spec"]["initContainers"] = []
    assert not refused_by_policy(OFFICE, first)


def test_a_name_of_its_own_is_no_member_of_the_family() -> None:
    config = rules(
        "{name: keys, match: {class: ukey}, resource: 'ukey-{id8}', to: {namespaces: [a]}},"
        "{name: alice, match: {class: ukey, serial: A}, resource: ukey-alicebob, to: {namespaces: [b]}}"
    )
    for namespace, name, fine in (
        ("a", "ukey-22334455", True),
        ("b", "ukey-22334455", False),
        ("b", "ukey-alicebob", True),
        ("a", "ukey-alicebob", False),
        ("c", "ukey-2233445", True),
        ("c", "ukey-11111111", True),  # base32 has no 1
    ):
        refused = refused_by_policy(config, pod(namespace, {f"opencdi.io/{name}": "1"}))
        assert (not refused) == fine, (namespace, name, refused)


def test_a_rule_reserves_every_name_it_may_offer() -> None:
    to = Audience(namespaces=("x",))
    several = Rule(name="r", match=Match(class_="ukey"), resource=("ukey", "ukey-{id8}"), to=to)
    token = Rule(name="token", match=Match(class_="storage"), as_=DeviceClass.UKEY, to=to)
    any_class = Rule(name="all", match=Match(), to=to)
    found = {r.name: r.rules for r in reserved(DevicesConfig(domain="d.io", rules=(several, token, any_class)))}
    assert found == {
        "d.io/ukey": ("r", "token", "all"),
        "d.io/ukey-{id8}": ("r",),
        "d.io/printer": ("all",),
        "d.io/audio": ("all",),
        "d.io/usb-storage": ("all",),
        "d.io/usb": ("all",),
    }
    assert [r.name for r in reserved(DevicesConfig(rules=(token,)))] == ["opencdi.io/ukey"], (
        "not the stick it looks like"
    )


def test_rules_that_let_everybody_in_make_no_policy() -> None:
    assert policy(DevicesConfig()) == ()
    assert (
        policy(rules("{name: r, match: {class: printer}, to: {namespaces: [a, '*'], service_accounts: ['*']}}")) == ()
    )


def test_messages_are_one_line_and_not_endless() -> None:
    many = tuple(
        Rule(name=f"{n}\n" + "x" * 60, match=Match(class_="printer"), to=Audience(namespaces=("a",)))
        for n in range(200)
    )
    refused = refused_by_policy(DevicesConfig(rules=many), pod("b", {"opencdi.io/printer": "1"}))
    for message, said in refused:
        assert message.isprintable() and said.isprintable() and "and others" in message
        assert len(message) <= MAX_MESSAGE and len(said) <= 3 * MAX_MESSAGE


@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=8))
def test_text_is_read_back(value: str) -> None:
    literal = text(value)
    assert evaluate(literal) == value
    assert literal.isascii() and literal.isprintable()


def test_half_a_surrogate_pair_is_no_text() -> None:
    assert text("\ud83d") == '"\\ufffd"'


def test_the_objects_are_what_the_api_server_takes() -> None:
    made, binding = policy(OFFICE, name="desk", failure_policy="Fail", action="Audit")
    assert {made["apiVersion"], binding["apiVersion"]} == {"admissionregistration.k8s.io/v1"}
    assert made["metadata"]["name"] == binding["spec"]["policyName"] == "desk"
    assert made["spec"]["failurePolicy"] == "Fail" and binding["spec"]["validationActions"] == ["Audit"]
    assert json.loads(json.dumps(made)) == made and yaml.safe_load(yaml.safe_dump(made)) == made
    assert policy(OFFICE)[0]["spec"]["failurePolicy"] == "Ignore"
