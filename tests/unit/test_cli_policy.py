"""`nodeagent config policy` as its users meet it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from nodeagent import cli
from nodeagent.config import load
from nodeagent.seats.policy import policy
from tests.unit.test_cli import assert_no_traceback, nodeagent_

CONFIG = {"devices": {"rules": [{"name": "office", "match": {"class": "printer"}, "to": {"namespaces": ["desk-*"]}}]}}


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(CONFIG))
    return path


def test_it_prints_what_the_rules_say(config: Path, tmp_path: Path) -> None:
    made = list(policy(load(config).devices))
    done = nodeagent_("config", "policy", "--config", config)
    assert done.returncode == cli.FINE and done.stderr == ""
    assert list(yaml.safe_load_all(done.stdout)) == made
    assert "&id" not in done.stdout
    assert json.loads(nodeagent_("--config", config, "config", "policy", "-o", "json").stdout)["items"] == made
    values = tmp_path / "values.yaml"
    values.write_text(yaml.safe_dump({"config": CONFIG, "port": 9410}))
    assert nodeagent_("config", "policy", "--values", values).stdout == done.stdout


def test_its_options(config: Path) -> None:
    argv = ("config", "policy", "--config", config, "--name", "desk", "--failure-policy", "Fail", "--action", "Warn")
    made = list(policy(load(config).devices, name="desk", failure_policy="Fail", action="Warn"))
    assert list(yaml.safe_load_all(nodeagent_(*argv).stdout)) == made


@pytest.mark.parametrize("output", ["yaml", "json"])
def test_check_tells_whether_a_manifest_is_of_these_rules(config: Path, tmp_path: Path, output: str) -> None:
    kept = tmp_path / "policy"
    kept.write_text(nodeagent_("config", "policy", "--config", config, "-o", output).stdout)
    done = nodeagent_("config", "policy", "--config", config, "--check", kept)
    assert (done.returncode, done.stdout, done.stderr) == (cli.FINE, "", "")
    config.write_text(yaml.safe_dump(CONFIG).replace("desk-*", "kiosk-*"))
    done = nodeagent_("config", "policy", "--config", config, "--check", kept)
    assert done.returncode == cli.CHECK_FAILED and "is not what the rules say now" in done.stderr and done.stdout == ""


def test_rules_that_let_everybody_in_make_an_empty_manifest(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("devices: {rules: [{name: r, match: {class: printer}}]}")
    done = nodeagent_("config", "policy", "--config", path)
    assert done.returncode == cli.FINE and list(yaml.safe_load_all(done.stdout)) == []
    kept = tmp_path / "policy.yaml"
    kept.write_text(done.stdout)
    assert nodeagent_("config", "policy", "--config", path, "--check", kept).returncode == cli.FINE


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: [", "not valid YAML"),
        ("port: 1", "no `config` in these values"),
        ("config: {devices: {rules: [{name: r}]}}", "config.devices.rules[0].match: missing"),
        (None, "No such file"),
    ],
)
def test_values_that_cannot_be_used(tmp_path: Path, text: str | None, said: str) -> None:
    path = tmp_path / "values.yaml"
    if text is not None:
        path.write_text(text)
    done = nodeagent_("config", "policy", "--values", path)
    assert done.returncode == cli.CONFIG and said in done.stderr and str(path) in done.stderr
    assert_no_traceback(done)
