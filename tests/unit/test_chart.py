"""The chart: what its templates make of its values is what the daemon and the kubelet expect.

The templates keep to a small part of Go's template language, and `render` knows no more than that part.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from charts.schema import TARGET, schema
from nodeagent.config import DevicesConfig, Match, Rule, parse
from nodeagent.model import Audience
from nodeagent.seats.policy import policy

CHART = Path(__file__).parents[2] / "charts" / "nodeagent"
VALUES: dict[str, Any] = yaml.safe_load((CHART / "values.yaml").read_text())
RELEASE = {"Name": "desk", "Namespace": "agents"}


def render(template: str, values: dict[str, Any]) -> str:
    """Go templates as far as ours go: values, `quote`, `toYaml`, `nindent`, `range` over a list or (key, value), and `if` with
    a path, `or` of paths, or `eq (path | default "a") "b"`."""
    top = {"Values": values, "Release": RELEASE, "Chart": {"AppVersion": "0.1.0"}}
    template = re.sub(r"\s*\{\{-", "{{", template)
    tokens = re.split(r"\{\{\s*(.*?)\s*\}\}", template)
    return "".join(_block(iter(tokens), {"$": top, ".": top}))


def _block(tokens: Iterator[str], scope: dict[str, Any]) -> Iterator[str]:
    for text in tokens:
        yield text
        action = next(tokens, "end")
        if action == "end":
            return
        if action.startswith("if "):
            inside = list(_capture(tokens))
            if _holds(action.removeprefix("if "), scope):
                yield from _block(iter(inside), scope)
            continue
        if not action.startswith("range "):
            yield _value(action, scope)
            continue
        names, _, path = action.removeprefix("range ").rpartition(":=")
        inside = list(_capture(tokens))
        found = _look_up(path.strip(), scope)
        for key, item in found.items() if names else enumerate(found):
            named = (
                dict(zip((n.strip() for n in names.split(",")), (key, item), strict=False)) if names else {".": item}
            )
            yield from _block(iter(inside), {**scope, **named})


def _capture(tokens: Iterator[str]) -> Iterator[str]:
    """The tokens up to the `end` that belongs to this range or condition, with it."""
    depth = 1
    while depth:
        yield next(tokens)
        action = next(tokens)
        depth += action.startswith(("range ", "if ")) - (action == "end")
        yield action


def _holds(condition: str, scope: dict[str, Any]) -> bool:
    if equal := re.fullmatch(r'eq \((\S+) \| default "(.*?)"\) "(.*?)"', condition):
        path, default, wanted = equal.groups()
        return (_optional(path, scope) or default) == wanted
    return any(_optional(path, scope) for path in condition.removeprefix("or ").split())


def _optional(path: str, scope: dict[str, Any]) -> Any:
    """As Go: a key that its map does not have is nothing, but a map that is not there is an error."""
    above, _, name = path.rpartition(".")
    return _look_up(above, scope).get(name)


def _value(action: str, scope: dict[str, Any]) -> str:
    first, *pipes = (part.strip() for part in action.split("|"))
    value = _look_up(first.removeprefix("toYaml "), scope)
    text = yaml.safe_dump(value, sort_keys=True).rstrip("\n") if first.startswith("toYaml ") else str(value)
    for pipe in pipes:
        if pipe == "quote":
            text = json.dumps(text)
        else:
            indent = int(pipe.removeprefix("nindent "))
            text = "\n" + "\n".join(" " * indent + line for line in text.splitlines())
    return text


def _look_up(path: str, scope: dict[str, Any]) -> Any:
    start, *names = path.split(".")
    value = scope[start or "."]
    for name in names:
        value = value[name]
    return value


def objects(values: dict[str, Any] = VALUES) -> list[dict[str, Any]]:
    rendered = [render(path.read_text(), values) for path in sorted((CHART / "templates").glob("*.yaml"))]
    return [found for text in rendered for found in yaml.safe_load_all(text) if found]


def only(kind: str, values: dict[str, Any] = VALUES) -> dict[str, Any]:
    found = [o for o in objects(values) if o["kind"] == kind]
    assert len(found) == 1, f"{len(found)} of {kind}"
    return found[0]


def daemonset() -> dict[str, Any]:
    return only("DaemonSet", {**VALUES, "architectures": [{"name": "amd64", "image": "somewhere/nodeagent:1"}]})


def test_one_daemonset_for_each_architecture() -> None:
    sets = {o["metadata"]["name"]: o["spec"]["template"]["spec"] for o in objects() if o["kind"] == "DaemonSet"}
    assert {n: s["nodeSelector"] for n, s in sets.items()} == {
        "desk-amd64": {"kubernetes.io/arch": "amd64"},
        "desk-arm64": {"kubernetes.io/arch": "arm64"},
    }


def test_configuration_in_the_chart_is_one_the_daemon_takes() -> None:
    rules = [{"name": "all", "match": {"class": "printer"}, "to": {"namespaces": ["desk*"], "labels": {"a": "b"}}}]
    values = {**VALUES, "config": {**VALUES["config"], "devices": {"rules": rules}}}
    config = parse(only("ConfigMap", values)["data"]["config.yaml"])
    assert config.host_root == "/host"
    assert config.http.listen == f"0.0.0.0:{VALUES['port']}"
    assert config.devices.rules[0].to.labels == {"a": "b"}


def test_every_mount_has_its_volume_and_slots_keep_the_path_of_the_host() -> None:
    pod = daemonset()["spec"]["template"]["spec"]
    config = parse(only("ConfigMap")["data"]["config.yaml"])
    volumes = {v["name"]: v.get("hostPath", {}).get("path") for v in pod["volumes"]}
    mounts = {m["name"]: m["mountPath"] for m in pod["containers"][0]["volumeMounts"]}
    assert volumes.keys() == mounts.keys()
    for name, path in {
        "run": config.run_dir,
        "state": config.state_dir,
        "device-plugins": config.kubelet.device_plugin_dir,
        "pod-resources": str(config.pod_resources_socket.parent),
    }.items():
        assert volumes[name] == mounts[name] == path, name
    assert (volumes["host"], mounts["host"]) == ("/", config.host_root)


def test_an_update_overlaps_two_daemons() -> None:
    found = daemonset()["spec"]
    assert found["updateStrategy"]["rollingUpdate"] == {"maxSurge": 1, "maxUnavailable": 0}
    pod = found["template"]["spec"]
    assert pod["hostPID"] is True
    assert "hostNetwork" not in pod  # two daemons would fight for the port
    assert all("hostPort" not in p for p in pod["containers"][0]["ports"])


def test_selectors_and_accounts_fit() -> None:
    found = daemonset()["spec"]
    assert found["selector"]["matchLabels"].items() <= found["template"]["metadata"]["labels"].items()
    account = only("ServiceAccount")["metadata"]
    assert found["template"]["spec"]["serviceAccountName"] == account["name"]
    assert only("ClusterRoleBinding")["subjects"] == [
        {"kind": "ServiceAccount", "name": account["name"], "namespace": account["namespace"]}
    ]


def test_node_selector_of_the_user_is_added() -> None:
    values = {**VALUES, "architectures": VALUES["architectures"][:1], "nodeSelector": {"desktops": "yes"}}
    selector = only("DaemonSet", values)["spec"]["template"]["spec"]["nodeSelector"]
    assert selector == {"kubernetes.io/arch": "amd64", "desktops": "yes"}


def granted(config: dict[str, Any]) -> dict[str, list[str]]:
    """Resource -> verbs of the daemon's role."""
    role = only("ClusterRole", {**VALUES, "config": {**VALUES["config"], **config}})
    return {resource: rule["verbs"] for rule in role["rules"] for resource in rule["resources"]}


@pytest.mark.parametrize(
    ("config", "more"),
    [
        ({}, {}),
        ({"devices": {"on_refusal": "report"}, "kubernetes": {"startup_taint": "", "ready_label": ""}}, {}),
        ({"devices": {"on_refusal": "evict"}}, {"pods/eviction": ["create"]}),
        ({"kubernetes": {"startup_taint": "opencdi.io/not-ready:NoSchedule"}}, {"nodes": ["get", "patch"]}),
        ({"kubernetes": {"startup_taint": "", "ready_label": "opencdi.io/devices=ready"}}, {"nodes": ["get", "patch"]}),
    ],
)
def test_the_role_grants_no_more_than_the_configuration_needs(
    config: dict[str, Any], more: dict[str, list[str]]
) -> None:
    assert granted(config) == {"events": ["create", "patch"], "pods": ["get"], **more}


def test_the_admission_policy_is_shipped_as_it_is_given() -> None:
    rule = Rule(name="it's", match=Match(class_="printer"), to=Audience(namespaces=("{{ x }}", "desk-*")))
    made = policy(DevicesConfig(rules=(rule,)))
    manifest = yaml.safe_dump_all(json.loads(json.dumps(made)))
    values = {**VALUES, "admissionPolicy": {"manifest": manifest}}
    assert [o for o in objects(values) if "AdmissionPolicy" in o["kind"]] == list(made)
    assert not [o for o in objects() if "AdmissionPolicy" in o["kind"]]


def test_schema_is_up_to_date() -> None:
    assert json.loads(TARGET.read_text()) == schema(), "make schema"


def test_schema_knows_every_value() -> None:
    assert VALUES.keys() <= schema()["properties"].keys()


@pytest.mark.parametrize("path", sorted((CHART / "templates").iterdir()), ids=lambda p: p.name)
def test_templates_use_only_values_that_exist(path: Path) -> None:
    """Also NOTES.txt: an unknown name raises KeyError."""
    render(path.read_text(), VALUES)
