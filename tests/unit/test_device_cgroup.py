"""Where the device rules of a container are in v1, hybrid and v2 trees, and what is written there."""

from __future__ import annotations

from pathlib import Path

import pytest

from nodeagent.errors import AgentError, Reason
from nodeagent.host import HostRoot
from nodeagent.sandboxes.device_cgroup import DeviceCgroups, change, find
from nodeagent.sandboxes.device_program import DeviceNumbers, Rule

ID = "4f6ad1" * 10
KUBEPODS = f"/kubepods/burstable/pod0a1b/{ID}"
SCOPE = f"/kubepods.slice/kubepods-pod0a1b.slice/cri-containerd-{ID}.scope"
V1 = "36 31 0:33 {top} /sys/fs/cgroup/devices rw,relatime - cgroup cgroup rw,devices\n"
JOINED = "36 31 0:33 / /sys/fs/cgroup/devices,freezer rw shared:9 - cgroup cgroup rw,devices,freezer\n"
OTHERS = (
    "35 31 0:32 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n31 23 0:28 / /sys/fs/cgroup rw - tmpfs tmpfs rw\n"
)
HYBRID = "41 31 0:38 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw\n"
V2 = "41 31 0:38 / /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate\n"
FUSE = DeviceNumbers("c", 10, 229)
DEFAULTS = "c *:* m\nb *:* m\nc 1:3 rwm\nc 136:* rwm\n"


def host(root: Path, mountinfo: str) -> HostRoot:
    (root / "proc/1").mkdir(parents=True)
    (root / "proc/1/mountinfo").write_text(mountinfo)
    for line in mountinfo.splitlines():
        point = root / line.split()[4].lstrip("/")
        point.mkdir(parents=True, exist_ok=True)
        (point / "cgroup.procs").touch()
    return HostRoot(root)


def test_v1(tmp_path: Path) -> None:
    text = f"9:name=systemd:{KUBEPODS}\n6:devices:{KUBEPODS}\n4:memory:{KUBEPODS}\n0::/\n"
    found = find(host(tmp_path, OTHERS + V1.format(top="/")), ID, text)
    assert found == DeviceCgroups(v1=(tmp_path / f"sys/fs/cgroup/devices{KUBEPODS}",))


def test_v1_with_controllers_mounted_together_and_an_init_system_inside(tmp_path: Path) -> None:
    found = find(host(tmp_path, OTHERS + JOINED), ID, f"6:freezer,devices:{SCOPE}/init.scope/x\n")
    top = tmp_path / f"sys/fs/cgroup/devices,freezer{SCOPE}"
    assert found == DeviceCgroups(v1=(top, top / "init.scope", top / "init.scope/x"))


def test_hybrid_where_v1_guards_and_systemd_has_both(tmp_path: Path) -> None:
    found = find(
        host(tmp_path, V1.format(top="/") + HYBRID), ID, f"5:devices:{SCOPE}\n1:name=systemd:{SCOPE}\n0::{SCOPE}\n"
    )
    assert found == DeviceCgroups(
        v1=(tmp_path / f"sys/fs/cgroup/devices{SCOPE}",), v2=tmp_path / f"sys/fs/cgroup/unified{SCOPE}"
    )


def test_hybrid_where_the_runtime_uses_v2(tmp_path: Path) -> None:
    found = find(host(tmp_path, V1.format(top="/") + HYBRID), ID, f"5:devices:/\n0::{SCOPE}\n")
    assert found == DeviceCgroups(v2=tmp_path / f"sys/fs/cgroup/unified{SCOPE}")


def test_v2_stops_at_the_cgroup_that_the_runtime_has_made(tmp_path: Path) -> None:
    """What is below it is the container's, and may be called like anything, also like the container."""
    found = find(host(tmp_path, V2), ID, f"0::{SCOPE}/user.slice/{ID}/x\n")
    assert found == DeviceCgroups(v2=tmp_path / f"sys/fs/cgroup{SCOPE}")


def test_a_mount_that_begins_further_down(tmp_path: Path) -> None:
    found = find(host(tmp_path, V1.format(top="/kubepods")), ID, f"6:devices:{KUBEPODS}\n")
    assert found.v1 == (tmp_path / f"sys/fs/cgroup/devices{KUBEPODS.removeprefix('/kubepods')}",)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "0::/\n",
        "0::/kubepods.slice/cri-containerd-somebody-else.scope\n",
        f"4:memory:{KUBEPODS}\n6:devices:/user.slice\n",
        f"0::/../../{ID}\n",
    ],
)
def test_a_process_that_is_not_the_containers(tmp_path: Path, text: str) -> None:
    with pytest.raises(AgentError, match="named after container") as refusal:
        find(host(tmp_path, V2 + V1.format(top="/")), ID, text)
    assert refusal.value.reason is Reason.NOT_SUPPORTED


def test_no_id_matches_nothing(tmp_path: Path) -> None:
    with pytest.raises(AgentError, match="named after container"):
        find(host(tmp_path, V2), "", f"0::{SCOPE}\n")


def test_a_hierarchy_that_cannot_be_reached_is_no_container_that_has_ended(tmp_path: Path) -> None:
    there = host(tmp_path, V1.format(top="/"))
    (tmp_path / "sys/fs/cgroup/devices/cgroup.procs").unlink()
    with pytest.raises(AgentError, match="not mounted where the agent can see") as refusal:
        find(there, ID, f"6:devices:{KUBEPODS}\n")
    assert refusal.value.hint


class Written:
    """A v1 cgroup made of plain files; each write to one is kept whole, as the kernel takes it."""

    def __init__(self, directory: Path, listed: str) -> None:
        directory.mkdir(parents=True)
        self.directory = directory
        (directory / "devices.list").write_text(listed)
        for name in ("devices.allow", "devices.deny"):
            (directory / name).touch()

    def said(self) -> tuple[str, str]:
        return (self.directory / "devices.allow").read_text(), (self.directory / "devices.deny").read_text()


@pytest.mark.parametrize(
    ("listed", "rule", "said"),
    [
        (DEFAULTS, Rule(FUSE, True), ("c 10:229 rw", "")),
        (DEFAULTS + "c 10:229 r\n", Rule(FUSE, True), ("c 10:229 rw", "")),
        (DEFAULTS + "c 10:229 rw\n", Rule(FUSE, True), ("", "")),
        (DEFAULTS + "c 10:229 w\nc 10:229 rm\n", Rule(FUSE, True), ("", "")),
        (DEFAULTS + "c 10:229 rw\n", Rule(FUSE, False), ("", "c 10:229 rwm")),
        (DEFAULTS + "b 10:229 rw\n", Rule(FUSE, False), ("", "")),
        (DEFAULTS, Rule(FUSE, False), ("", "")),
        (DEFAULTS, Rule(DeviceNumbers("b", 8, 16), True), ("b 8:16 rw", "")),
        ("a *:* rwm\n", Rule(FUSE, False), ("", "")),
        ("a *:* rwm\n", Rule(FUSE, True), ("", "")),
    ],
)
def test_v1_is_told_what_it_does_not_have(tmp_path: Path, listed: str, rule: Rule, said: tuple[str, str]) -> None:
    outer, inner = Written(tmp_path / "c", listed), Written(tmp_path / "c/init.scope", listed)
    change(DeviceCgroups(v1=(outer.directory, inner.directory)), [rule])
    assert (outer.said(), inner.said()) == (said, said)


def test_a_container_that_has_ended_is_not_a_refusal(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        change(DeviceCgroups(v1=(tmp_path / "gone",)), [Rule(FUSE, False)])
    with pytest.raises(FileNotFoundError):
        change(DeviceCgroups(v2=tmp_path / "gone"), [Rule(FUSE, False)])
