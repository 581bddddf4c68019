"""CDI in the stand-in runtime: which files count, which devices are found, what they change in an OCI spec."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from nodeagent.demo import bundles, oci
from nodeagent.demo.cdi import CdiEdits, CdiNode, inject, resolve, take_spec
from nodeagent.errors import AgentError, Reason
from nodeagent.model import PodRef

NODE = {"path": "/dev/bus/usb/001/009", "hostPath": "/dev/bus/usb/001/009", "permissions": "rw"}


def spec(**changes: Any) -> dict[str, Any]:
    plain: dict[str, Any] = {
        "cdiVersion": "0.5.0",
        "kind": "opencdi.io/ukey",
        "devices": [{"name": "ukey-a", "containerEdits": {"deviceNodes": [NODE]}}],
    }
    return plain | changes


def put(directory: Path, document: dict[str, Any], name: str = "opencdi.io-ukey.json") -> None:
    directory.mkdir(exist_ok=True)
    (directory / name).write_text(json.dumps(document))


def device(**edits: Any) -> list[dict[str, Any]]:
    return [{"name": "ukey-a", "containerEdits": edits}]


def test_a_good_file() -> None:
    taken = take_spec(json.dumps(spec()), "a.json")
    assert (taken.kind, taken.devices[0].container_edits.device_nodes[0].host_path) == (
        "opencdi.io/ukey",
        "/dev/bus/usb/001/009",
    )
    assert take_spec(json.dumps(spec()), "a.yaml") == taken, "JSON is YAML"


@pytest.mark.parametrize(
    ("document", "why"),
    [
        (spec(color="red"), "unknown field `color`"),
        (spec(devices=device(deviceNodes=[NODE | {"colour": 1}])), "unknown field `colour`"),
        (spec(devices=[]), "length >= 1"),
        (spec(devices=[{"name": "ukey-a", "containerEdits": {}}]), "a device without edits"),
        (spec(devices=[{"name": "a b", "containerEdits": {"env": ["A=1"]}}]), "bad device name 'a b'"),
        (spec(devices=[*device(env=["A=1"]), *device(env=["A=2"])]), "two devices of one name"),
        (spec(devices=device(env=["A"])), "bad variable 'A'"),
        (spec(kind="ukey"), "bad kind 'ukey'"),
        (spec(cdiVersion="9.0.0"), "unknown version '9.0.0'"),
        (spec(cdiVersion="0.3.0"), "must be at least v0.5.0"),
        (spec(devices=device(env=["A=1"], additionalGids=[5])), "must be at least v0.7.0"),
        (spec(annotations={"a": "b"}), "must be at least v0.6.0"),
        (spec(cdiVersion="0.3.0", devices=device(mounts=[{"hostPath": "/a", "containerPath": "/b", "type": "bind"}])), "v0.4.0"),
        (spec(devices=device(deviceNodes=[{"path": "/dev/x", "permissions": "rx"}])), "matching regex"),
        (spec(devices=device(hooks=[{"hookName": "never", "path": "/x"}])), "Invalid enum value"),
    ],
)  # fmt: skip
def test_a_bad_file_is_refused_with_the_reason(document: dict[str, Any], why: str) -> None:
    with pytest.raises(AgentError, match=why) as refused:
        take_spec(json.dumps(document), "a.json")
    assert refused.value.reason is Reason.MALFORMED


def test_a_file_that_is_no_document(tmp_path: Path) -> None:
    for text in ("", "[", "[1]", "{" * 100_000, "a: b: c"):
        for name in ("a.json", "a.yaml"):
            with pytest.raises(AgentError):
                take_spec(text, name)


def test_an_unknown_name_fails(tmp_path: Path) -> None:
    put(tmp_path / "dynamic", spec())
    put(
        tmp_path / "dynamic", spec(color="red", devices=[{"name": "b", "containerEdits": {"env": ["A=1"]}}]), "bad.json"
    )
    (tmp_path / "dynamic/notes.txt").write_text("no specification")
    directories = (tmp_path / "nowhere", tmp_path / "dynamic")
    assert len(resolve(["opencdi.io/ukey=ukey-a"], directories)) == 2
    assert resolve([], directories) == ()
    for names in (["opencdi.io/ukey=ukey-a", "opencdi.io/ukey=gone"], ["opencdi.io/ukey=b"], ["ukey-a"]):
        with pytest.raises(AgentError, match=f"unresolvable CDI devices {names[-1]}$") as refused:
            resolve(names, directories)
        assert refused.value.reason is Reason.DEVICE_UNKNOWN


def test_a_later_directory_wins_and_two_files_of_one_directory_conflict(tmp_path: Path) -> None:
    static, dynamic = tmp_path / "static", tmp_path / "dynamic"
    put(static, spec(devices=device(env=["WHO=static"])))
    put(dynamic, spec(devices=device(env=["WHO=dynamic"])))
    assert resolve(["opencdi.io/ukey=ukey-a"], (static, dynamic))[-1].env == ("WHO=dynamic",)
    put(dynamic, spec(devices=device(env=["WHO=another"])), "second.json")
    with pytest.raises(AgentError, match="unresolvable"):
        resolve(["opencdi.io/ukey=ukey-a"], (static, dynamic))


def test_the_edits_of_a_file_come_once(tmp_path: Path) -> None:
    two = [{"name": n, "containerEdits": {"env": [f"{n.upper()}=1"]}} for n in ("a", "b")]
    put(tmp_path / "d", spec(devices=two, containerEdits={"env": ["ALL=1"]}))
    edits = resolve(["opencdi.io/ukey=b", "opencdi.io/ukey=a"], (tmp_path / "d",))
    assert [e.env for e in edits] == [("ALL=1",), ("B=1",), ("A=1",)]


def test_what_the_edits_change() -> None:
    desktop = oci.Desktop(
        pod=PodRef("n", "p", "u"), sandbox_id="s", name="d", args=("true",), root="/r", cgroup="/c", env=(("A", "old"),),
        mounts=(oci.Mount(destination="/data", source="/old"),), nodes=(oci.Node(path="/dev/x", major=1, minor=2),),
    )  # fmt: skip
    document = spec(
        cdiVersion="0.7.0",
        devices=device(
            env=["A=new", "B=1"],
            mounts=[{"hostPath": "/new", "containerPath": "/data", "options": ["bind", "ro"]}],
            hooks=[{"hookName": "createContainer", "path": "/hook", "args": ["hook", "x"], "timeout": 5}],
            additionalGids=[0, 44],
        ),
    )
    edits = take_spec(json.dumps(document), "a.json").devices[0].container_edits
    before = oci.spec(desktop)
    after = inject(before, [edits], [oci.Node(path="/dev/x", major=7, minor=8, permissions="r")])
    assert {v for v in after["process"]["env"] if v[0] in "AB"} == {"A=new", "B=1"}
    assert after["process"]["user"]["additionalGids"] == [44]
    (mount,) = [m for m in after["mounts"] if m["destination"] == "/data"]
    assert mount == {"destination": "/data", "source": "/new", "options": ["bind", "ro"]}
    assert [(d["path"], d["major"]) for d in after["linux"]["devices"]] == [("/dev/x", 7)]
    assert after["linux"]["resources"]["devices"][-1] == {
        "allow": True, "type": "c", "major": 7, "minor": 8, "access": "r",
    }  # fmt: skip
    assert after["hooks"] == {"createContainer": [{"path": "/hook", "args": ["hook", "x"], "env": [], "timeout": 5}]}
    assert "hooks" not in inject(before, [CdiEdits()], [])
    assert before["process"]["env"] == oci.spec(desktop)["process"]["env"], "the given document stays as it is"


def test_a_node_takes_from_the_host_what_is_not_said() -> None:
    desktop = oci.Desktop(pod=PodRef("n", "p", "u"), sandbox_id="s", name="d", args=(), root="/r", cgroup="/c")
    node = bundles.take_cdi_node(CdiNode(path="/dev/mine", host_path="/dev/null"), desktop)
    assert (node.path, node.kind, node.major, node.minor, node.permissions) == ("/dev/mine", "c", 1, 3, "rwm")
    assert (node.uid, node.gid) == (1000, 1000)
    said = CdiNode(path="/dev/null", uid=0, gid=5, file_mode=0o600, permissions="none", major=9, minor=9, type="c")
    node = bundles.take_cdi_node(said, desktop)
    assert (node.uid, node.gid, node.mode, node.permissions, node.major) == (0, 5, 0o600, "", 9)
    with pytest.raises(AgentError, match="/dev/gone"):
        bundles.take_cdi_node(CdiNode(path="/dev/gone"), desktop)
