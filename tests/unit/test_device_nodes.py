"""Nodes in a container's /dev against a tree that its tenant controls. The device is 0:0, which Linux lets everybody make (5.8).

A fake /proc over real directories: `root` is a link to a directory, its mounts are what the file says. Real mounts, real
devices, the real runc: tests/host/test_device_nodes.py.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from nodeagent.errors import AgentError, Reason
from nodeagent.host import HostRoot
from nodeagent.model import Container, DeviceNode
from nodeagent.sandboxes.container_dev import words
from nodeagent.sandboxes.nodes import MAX_NODES, grant, numbers_of, revoke

ID = "c0ffee" * 10
PID = 77
NODE = DeviceNode("/dev/bus/usb/001/006", "usb", 0, 0)
LIST = "c 1:3 rwm\n"


class FakeMachine:
    """A host with one container: `outside` is what the tenant must not reach, `dev` its /dev."""

    def __init__(self, root: Path) -> None:
        self.host = HostRoot(root / "host")
        self.dev, self.outside = root / "rootfs/dev", root / "outside"
        self.node = self.host.path(NODE.path)
        self.cgroup = self.host.path(f"/sys/fs/cgroup/devices/kubepods/{ID}")
        self.proc = self.host.path(f"/proc/{PID}")
        for directory in (self.dev, self.outside, self.cgroup, self.proc / "ns", self.node.parent):
            directory.mkdir(parents=True)
        self.host.path("/proc/1").mkdir()
        self.host.path("/proc/1/mountinfo").write_text(
            "36 31 0:33 / /sys/fs/cgroup/devices rw - cgroup cgroup rw,devices\n20 1 8:1 / / rw - ext4 /dev/sda1 rw\n"
        )
        (self.cgroup.parents[1] / "cgroup.procs").touch()
        (self.cgroup / "devices.list").write_text(LIST)
        (self.cgroup / "devices.allow").touch()
        (self.cgroup / "devices.deny").touch()
        (self.proc / "cgroup").write_text(f"6:devices:/kubepods/{ID}\n0::/\n")
        (self.proc / "root").symlink_to(root / "rootfs")
        (self.proc / "ns/user").symlink_to(os.readlink("/proc/self/ns/user"))
        self.mounted()
        self.plug()

    def mounted(self, kind: str = "tmpfs", options: str = "rw,nosuid", device: str = "0:57") -> None:
        fd = os.open(self.dev, os.O_PATH)
        text = Path(f"/proc/self/fdinfo/{fd}").read_text()
        os.close(fd)
        number = text.partition("mnt_id:")[2].split()[0]
        (self.proc / "mountinfo").write_text(f"{number} 88 {device} / /dev {options} - {kind} tmpfs rw,mode=755\n")

    def plug(self, kind: int = stat.S_IFCHR, mode: int = 0o640) -> None:
        try:
            os.mknod(self.node, kind | mode)
        except PermissionError:
            pytest.skip("this kernel lets only root make a node of 0:0 (Linux 5.8 and later: everybody)")
        self.node.chmod(mode)

    def allowed(self) -> str:
        return (self.cgroup / "devices.allow").read_text()

    def denied(self) -> str:
        return (self.cgroup / "devices.deny").read_text()

    @property
    def inside(self) -> Path:
        return self.dev / NODE.path.removeprefix("/dev/")

    def grant(self, *nodes: DeviceNode) -> None:
        grant(self.host, container(), nodes or (NODE,))

    def revoke(self, *nodes: DeviceNode) -> None:
        revoke(self.host, container(), nodes or (NODE,))


def container(pid: int = PID) -> Container:
    return Container(id=ID, sandbox_id="s", name="desktop", running=True, pid=pid)


@pytest.fixture
def machine(tmp_path: Path) -> FakeMachine:
    return FakeMachine(tmp_path)


def test_a_node_is_made_as_the_host_has_it_and_taken_again(machine: FakeMachine) -> None:
    machine.grant()
    made = machine.inside.lstat()
    assert (made.st_mode, made.st_rdev) == (stat.S_IFCHR | 0o640, 0)
    assert (made.st_uid, made.st_gid, made.st_nlink) == (os.geteuid(), machine.node.lstat().st_gid, 1)
    assert os.listdir(machine.inside.parent) == ["006"]
    assert stat.S_IMODE((machine.dev / "bus").lstat().st_mode) == 0o755
    assert machine.allowed() == "c 0:0 rw"
    machine.grant()
    assert machine.inside.lstat().st_ino == made.st_ino

    (machine.cgroup / "devices.list").write_text(LIST + "c 0:0 rw\n")
    machine.revoke()
    assert not machine.inside.exists()
    assert machine.denied() == "c 0:0 rwm"
    machine.revoke()


def test_the_umask_does_not_count(machine: FakeMachine) -> None:
    before = os.umask(0o077)
    try:
        machine.grant()
    finally:
        os.umask(before)
    assert stat.S_IMODE(machine.inside.lstat().st_mode) == 0o640
    assert stat.S_IMODE((machine.dev / "bus/usb").lstat().st_mode) == 0o755


@pytest.mark.parametrize("where", ["bus", "bus/usb", "bus/usb/001", "bus/usb/001/006"])
def test_a_link_is_never_followed(machine: FakeMachine, where: str) -> None:
    there = machine.dev / where
    there.parent.mkdir(parents=True, exist_ok=True)
    target = machine.outside / where
    target.parent.mkdir(parents=True, exist_ok=True)
    beyond = machine.outside / NODE.path.removeprefix("/dev/")
    beyond.parent.mkdir(parents=True, exist_ok=True)
    os.mknod(beyond, stat.S_IFCHR | 0o600)
    there.symlink_to(target)
    with pytest.raises(AgentError) as refusal:
        machine.grant()
    assert refusal.value.reason is Reason.NOT_SUPPORTED
    machine.revoke()
    assert stat.S_ISCHR(beyond.lstat().st_mode)
    assert os.listdir(beyond.parent) == ["006"]
    assert there.is_symlink()
    assert machine.allowed() == ""


def test_dev_itself_may_be_a_link(machine: FakeMachine) -> None:
    machine.dev.rmdir()
    machine.dev.symlink_to(machine.outside)
    with pytest.raises(AgentError, match="/dev cannot be changed"):
        machine.grant()
    machine.revoke()
    assert not os.listdir(machine.outside)


@pytest.mark.parametrize("thing", ["file", "directory", "fifo"])
def test_only_exactly_this_device_is_removed(machine: FakeMachine, thing: str) -> None:
    machine.inside.parent.mkdir(parents=True)
    if thing == "directory":
        machine.inside.mkdir()
    elif thing == "fifo":
        os.mkfifo(machine.inside)
    else:
        machine.inside.write_text("mine")
    with pytest.raises(AgentError, match="no device node"):
        machine.grant()
    machine.revoke()
    assert machine.inside.exists()
    assert machine.allowed() == ""


def test_a_node_of_another_device_is_left(machine: FakeMachine) -> None:
    machine.grant()
    machine.revoke(DeviceNode(NODE.path, "usb", 189, 5), DeviceNode(NODE.path, "block", 0, 0))
    assert machine.inside.exists()


@pytest.mark.parametrize(
    ("kind", "options", "device", "sentence"),
    [
        ("tmpfs", "rw,nosuid,nodev", "0:57", "mounted nodev"),
        ("tmpfs", "rw", "8:1", "not a tmpfs of its own"),
        ("overlay", "rw", "0:57", "not a tmpfs of its own"),
        ("fuse", "rw", "0:57", "not a tmpfs of its own"),
    ],
)
def test_a_dev_that_takes_no_nodes(machine: FakeMachine, kind: str, options: str, device: str, sentence: str) -> None:
    (machine.cgroup / "devices.list").write_text(LIST + "c 0:0 rw\n")
    machine.mounted(kind, options, device)
    with pytest.raises(AgentError, match=sentence) as refusal:
        machine.grant()
    assert refusal.value.reason is Reason.NOT_SUPPORTED
    assert not os.listdir(machine.dev)
    machine.revoke()
    assert (machine.allowed(), machine.denied()) == ("", "c 0:0 rwm")


def test_the_hosts_devtmpfs_is_left_to_the_kernel(machine: FakeMachine) -> None:
    machine.grant()
    machine.mounted("devtmpfs", "rw,nosuid", "0:6")
    machine.grant(NODE)
    machine.revoke()
    assert machine.inside.exists()
    assert machine.allowed() == "c 0:0 rw"


def test_a_user_namespace_is_refused_and_still_loses_the_permission(machine: FakeMachine) -> None:
    machine.grant()
    (machine.cgroup / "devices.list").write_text(LIST + "c 0:0 rw\n")
    (machine.proc / "ns/user").unlink()
    (machine.proc / "ns/user").symlink_to("user:[4026532999]")
    with pytest.raises(AgentError, match="user namespace") as refusal:
        machine.grant()
    assert refusal.value.reason is Reason.NOT_SUPPORTED
    machine.revoke()
    assert machine.denied() == "c 0:0 rwm"


def test_a_container_that_has_ended(machine: FakeMachine) -> None:
    for gone in (container(PID + 1), container(0)):
        with pytest.raises(AgentError) as refusal:
            grant(machine.host, gone, [NODE])
        assert refusal.value.reason in (Reason.NOT_RUNNING, Reason.NOT_SUPPORTED)
    revoke(machine.host, container(PID + 1), [NODE])
    (machine.proc / "root").unlink()  # a zombie
    revoke(machine.host, container(), [NODE])
    with pytest.raises(AgentError, match="has ended"):
        machine.grant()


def test_a_number_that_another_process_has_got(machine: FakeMachine) -> None:
    (machine.proc / "cgroup").write_text("6:devices:/system.slice/sshd.service\n")
    for act in (machine.grant, machine.revoke):
        with pytest.raises(AgentError, match="named after container"):
            act()
    assert not os.listdir(machine.dev)
    assert (machine.allowed(), machine.denied()) == ("", "")


def test_a_device_that_was_exchanged_meanwhile(machine: FakeMachine) -> None:
    stranger = DeviceNode(NODE.path, "usb", 189, 5)
    with pytest.raises(AgentError, match="not c 189:5 any more") as refusal:
        machine.grant(stranger)
    assert refusal.value.reason is Reason.DEVICE_UNPLUGGED
    machine.node.unlink()
    with pytest.raises(AgentError, match="No such file") as refusal:
        machine.grant()
    assert refusal.value.reason is Reason.DEVICE_UNPLUGGED
    assert not os.listdir(machine.dev)
    assert machine.allowed() == ""


def test_one_that_cannot_be_given_does_not_keep_the_others(machine: FakeMachine) -> None:
    bad = DeviceNode("/dev/hidraw0", "hidraw", 0, 0)
    os.mknod(machine.host.path(bad.path), stat.S_IFCHR | 0o600)
    (machine.dev / "hidraw0").write_text("mine")
    with pytest.raises(AgentError, match="hidraw0 is no device node"):
        machine.grant(bad, NODE)
    assert stat.S_ISCHR(machine.inside.lstat().st_mode)


def test_a_permission_without_a_node_is_taken_back(machine: FakeMachine, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tenant's /dev is full: found out only when the node is made."""

    def full(*_: object, **__: object) -> None:
        (machine.cgroup / "devices.list").write_text(LIST + machine.allowed() + "\n")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "mknod", full)
    with pytest.raises(AgentError, match="No space left"):
        machine.grant()
    assert (machine.allowed(), machine.denied()) == ("c 0:0 rw", "c 0:0 rwm")


NOT_BELOW_DEV = ("", "/dev", "/dev/", "dev/null", "/dev/../etc/passwd", "/etc/x", "/dev/a/../../x", "/dev/a\0b")


@pytest.mark.parametrize("path", [*NOT_BELOW_DEV, "/dev/" + "a/" * 9 + "b", "/dev/" + "x" * 256])
def test_a_path_that_is_not_plainly_below_dev(machine: FakeMachine, path: str) -> None:
    for act in (machine.grant, machine.revoke):
        with pytest.raises(AgentError) as refusal:
            act(DeviceNode(path, "usb", 0, 0))
        assert refusal.value.reason is Reason.MALFORMED


def test_bounds_and_kinds(machine: FakeMachine) -> None:
    with pytest.raises(AgentError) as refusal:
        machine.revoke(*[NODE] * (MAX_NODES + 1))
    assert refusal.value.reason is Reason.TOO_MANY
    assert words("/dev/bus/usb/001/006") == ("bus", "usb", "001", "006")
    assert str(numbers_of(DeviceNode("/dev/sdb", "block", 8, 16))) == "b 8:16"
    assert str(numbers_of(DeviceNode("/dev/sg1", "scsi_generic", 21, 1))) == "c 21:1"
