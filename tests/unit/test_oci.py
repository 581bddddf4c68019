"""OCI specs have the shape that containerd's CRI gives them."""

from __future__ import annotations

import json

import pytest

from nodeagent.demo.oci import Desktop, Mount, Node, bind_mounts, spec
from nodeagent.model import PodRef

POD = PodRef("team-a", "desk-a", "0b1e")


def desktop(**changes: object) -> Desktop:
    plain: dict[str, object] = {
        "pod": POD,
        "sandbox_id": "sandbox",
        "name": "desktop",
        "args": ("sleep", "1"),
        "root": "/bundle/rootfs",
        "cgroup": "/demo/pod0b1e/c",
    }
    return Desktop(**(plain | changes))  # type: ignore[arg-type]


def mount_at(document: dict, destination: str) -> dict:
    (found,) = [m for m in document["mounts"] if m["destination"] == destination]
    return found


def destinations(document: dict) -> list[str]:
    return [m["destination"] for m in document["mounts"]]


def test_is_json() -> None:
    document = spec(
        desktop(mounts=(Mount(destination="/x", source="/y"),), nodes=(Node(path="/dev/n", major=4, minor=2),))
    )
    assert json.loads(json.dumps(document)) == document


@pytest.mark.parametrize(("readonly", "word"), [(True, "ro"), (False, "rw")])
def test_a_kubelet_mount_is_private(readonly: bool, word: str) -> None:
    """`rprivate`: what is mounted below the slot on the host later must not show up inside."""
    document = spec(desktop(mounts=(Mount(destination="/run/opencdi/p", source="/slot", readonly=readonly),)))
    assert mount_at(document, "/run/opencdi/p") == {
        "destination": "/run/opencdi/p",
        "type": "bind",
        "source": "/slot",
        "options": ["rbind", "rprivate", word],
    }


def test_the_first_of_two_mounts_with_one_destination_wins() -> None:
    twice = desktop(
        mounts=(
            Mount(destination="/a/b", source="/first"),
            Mount(destination="/a/b/", source="/second", readonly=False),
        )
    )
    assert [m["source"] for m in spec(twice)["mounts"] if m["type"] == "bind"] == ["/first"]
    assert [m.source for m in bind_mounts(twice)] == ["/first"]


def test_a_kubelet_mount_replaces_a_default_one() -> None:
    document = spec(desktop(mounts=(Mount(destination="/dev/shm", source="/shm", readonly=False),)))
    assert mount_at(document, "/dev/shm")["source"] == "/shm"


def test_mounts_are_ordered_by_depth() -> None:
    """A deep mount that came before its parent would be covered by it."""
    document = spec(
        desktop(mounts=(Mount(destination="/run/opencdi/p", source="/p"), Mount(destination="/data", source="/d")))
    )
    order = destinations(document)
    assert order.index("/run") < order.index("/run/opencdi/p")
    assert order.index("/data") < order.index("/dev/pts")
    assert [len(d.strip("/").split("/")) for d in order] == sorted(len(d.strip("/").split("/")) for d in order)


def test_the_first_of_two_variables_with_one_name_wins_also_over_the_image() -> None:
    environment = spec(desktop(env=(("A", "1"), ("A", "2"), ("HOME", "/elsewhere"))))["process"]["env"]
    assert [e for e in environment if e.startswith("A=")] == ["A=1"]
    assert [e for e in environment if e.startswith("HOME=")] == ["HOME=/elsewhere"]
    assert "HOSTNAME=desk-a" in environment
    assert any(e.startswith("PATH=") for e in environment)


def test_an_unprivileged_process_on_a_read_only_root() -> None:
    document = spec(desktop())
    process = document["process"]
    assert document["root"] == {"path": "/bundle/rootfs", "readonly": True}
    assert process["user"] == {"uid": 1000, "gid": 1000}
    assert process["noNewPrivileges"] is True
    assert set(process["capabilities"]) == {"bounding", "effective", "permitted", "inheritable", "ambient"}
    assert not any(process["capabilities"].values())
    assert document["hostname"] == "desk-a"


def test_own_namespaces_and_no_network() -> None:
    """A network namespace without a path is a fresh one: there is nothing in it but a loopback."""
    linux = spec(desktop())["linux"]
    assert {"type": "network"} in linux["namespaces"]
    assert {n["type"] for n in linux["namespaces"]} == {"pid", "ipc", "uts", "mount", "network"}
    assert linux["cgroupsPath"] == "/demo/pod0b1e/c"


def test_scratch_places_are_tmpfs() -> None:
    document = spec(desktop())
    for place in ("/tmp", "/run", "/dev/shm"):
        assert mount_at(document, place)["type"] == "tmpfs"


def test_kernel_secrets_are_masked() -> None:
    linux = spec(desktop())["linux"]
    assert {"/proc/kcore", "/proc/keys", "/sys/firmware"} <= set(linux["maskedPaths"])
    assert {"/proc/sys", "/proc/sysrq-trigger"} <= set(linux["readonlyPaths"])


def test_hidden_places_are_empty_inside() -> None:
    document = spec(desktop(hidden=("/var/lib/nodeagent", "/root")))
    for place in ("/var/lib/nodeagent", "/root"):
        assert mount_at(document, place)["type"] == "tmpfs"
        assert "mode=555" in mount_at(document, place)["options"]


def test_what_is_covered_already_is_not_hidden_again() -> None:
    """A second mount below /run or below another hidden place would show the name of what it hides."""
    order = destinations(spec(desktop(hidden=("/run/nodeagent", "/tmp/state", "/home", "/home/user"))))
    assert "/home" in order
    assert not {"/run/nodeagent", "/tmp/state", "/home/user"} & set(order)


def test_a_device_node_is_made_and_allowed() -> None:
    linux = spec(desktop(nodes=(Node(path="/dev/bus/usb/001/002", major=189, minor=1, permissions="rw", mode=0o664),)))[
        "linux"
    ]
    assert linux["devices"] == [
        {"path": "/dev/bus/usb/001/002", "type": "c", "major": 189, "minor": 1, "fileMode": 0o664, "uid": 0, "gid": 0}
    ]
    rules = linux["resources"]["devices"]
    assert rules[0] == {"allow": False, "access": "rwm"}
    assert rules[-1] == {"allow": True, "type": "c", "major": 189, "minor": 1, "access": "rw"}
    assert {"allow": True, "type": "c", "major": 136, "access": "rwm"} in rules


def test_cri_annotations() -> None:
    annotations = spec(desktop(kind="container"))["annotations"]
    assert annotations["io.kubernetes.cri.container-type"] == "container"
    assert annotations["io.kubernetes.cri.sandbox-id"] == "sandbox"
    assert annotations["io.kubernetes.cri.sandbox-name"] == "desk-a"
    assert annotations["io.kubernetes.cri.sandbox-namespace"] == "team-a"
    assert annotations["io.kubernetes.cri.sandbox-uid"] == "0b1e"
    assert annotations["io.kubernetes.cri.container-name"] == "desktop"
