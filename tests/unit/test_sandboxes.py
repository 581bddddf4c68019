"""What a sandbox has mounted, read from a fake /proc: runc's own process, gVisor's gofer."""

from pathlib import Path

from nodeagent.host import HostRoot
from nodeagent.model import Container
from nodeagent.sandboxes import mounted

LINE = "111 88 0:24 {root} {point} ro,relatime - tmpfs tmpfs rw\n"
POINT = "/run/opencdi/printer"


def process(root: Path, pid: int, *, mountinfo: str = "", cmdline: str = "", cgroup: str = "") -> None:
    directory = root / "proc" / str(pid)
    directory.mkdir(parents=True)
    (directory / "mountinfo").write_text(mountinfo)
    (directory / "cmdline").write_text(cmdline)
    (directory / "cgroup").write_text(cgroup)


def container(pid: int) -> Container:
    return Container(id="c", sandbox_id="s", name="app", running=True, pid=pid)


def test_runc_reads_the_process_itself_and_the_last_mount_wins(tmp_path: Path) -> None:
    text = LINE.format(root="/nodeagent/slots/old", point=POINT) + LINE.format(root="/nodeagent/slots/abc", point=POINT)
    process(tmp_path, 7, mountinfo=LINE.format(root="/x", point="/y") + text)
    assert mounted(HostRoot(tmp_path), "runc", container(7), POINT) == "/nodeagent/slots/abc"
    assert mounted(HostRoot(tmp_path), "runc", container(7), "/elsewhere") is None


def test_gvisor_finds_the_gofer_beside_the_sentry(tmp_path: Path) -> None:
    cgroup = "8:pids:/\n4:memory:/kubepods/pod1/c1\n0::/\n"
    gone = LINE.format(root="/nodeagent/slots/abc//deleted", point=POINT)
    process(tmp_path, 40, cmdline="runsc-sandbox\0boot\0", cgroup=cgroup)
    process(tmp_path, 39, cmdline="runsc-gofer\0gofer\0--bundle\0x\0", mountinfo=gone)
    procs = tmp_path / "sys/fs/cgroup/memory/kubepods/pod1/c1/cgroup.procs"
    procs.parent.mkdir(parents=True)
    procs.write_text("40\n39\n")
    assert mounted(HostRoot(tmp_path), "gvisor", container(40), POINT) == "/nodeagent/slots/abc//deleted"


def test_unknown_where_nothing_can_be_read(tmp_path: Path) -> None:
    host = HostRoot(tmp_path)
    assert mounted(host, "runc", container(0), POINT) is None
    assert mounted(host, "runc", container(99), POINT) is None
    assert mounted(host, "gvisor", container(99), POINT) is None
