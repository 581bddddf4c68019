"""Finding our place in v1, v2 and hybrid trees, and what is written there. Real cgroups: tests/host/test_seat_cgroups.py."""

from __future__ import annotations

from pathlib import Path

import pytest

from nodeagent.errors import AgentError
from nodeagent.seats.cgroups import CgroupLimits, Hierarchy, SeatCgroups, find, settings

LIMITS = CgroupLimits(memory_bytes=384 << 20, pids=64, cpu_cores=1.5)


class Tree:
    """A fake /proc/self and cgroup file system. Files that a kernel would make are made beforehand."""

    def __init__(self, root: Path) -> None:
        self.root = root
        (root / "proc/self").mkdir(parents=True)
        (root / "proc/self/cgroup").touch()
        (root / "proc/self/mountinfo").touch()

    def mount(self, kind: str, point: str, *, top: str = "/", options: str = "rw") -> None:
        with (self.root / "proc/self/mountinfo").open("a") as file:
            file.write(f"42 36 0:30 {top} {point} rw,nosuid shared:9 - {kind} {kind} {options}\n")
        (self.root / point.lstrip("/")).mkdir(parents=True, exist_ok=True)

    def belongs(self, line: str) -> None:
        with (self.root / "proc/self/cgroup").open("a") as file:
            file.write(f"{line}\n")

    def group(self, path: str, **files: str) -> Path:
        directory = self.root / path.lstrip("/")
        directory.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            (directory / name.replace("__", ".", 1)).write_text(content)
        return directory


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    return Tree(tmp_path)


V1 = {
    "memory": {"memory__limit_in_bytes": "", "memory__memsw.limit_in_bytes": "", "cgroup__procs": ""},
    "pids": {"pids__max": "", "cgroup__procs": ""},
    "cpu": {"cpu__cfs_period_us": "", "cpu__cfs_quota_us": "", "cgroup__procs": ""},
}


async def test_v1_hybrid_as_systemd_has_it(tree: Tree) -> None:
    tree.belongs("9:pids:/system.slice/nodeagent.service")
    tree.belongs("4:memory:/")
    tree.belongs("3:cpu,cpuacct:/system.slice")
    tree.belongs("1:name=systemd:/system.slice/nodeagent.service")
    tree.belongs("0::/system.slice/nodeagent.service")
    tree.mount("cgroup2", "/sys/fs/cgroup/unified")
    tree.mount("cgroup", "/sys/fs/cgroup/systemd", options="rw,xattr,name=systemd")
    tree.mount("cgroup", "/sys/fs/cgroup/cpu,cpuacct", options="rw,cpu,cpuacct")
    tree.mount("cgroup", "/sys/fs/cgroup/memory", options="rw,memory")
    tree.mount("cgroup", "/sys/fs/cgroup/pids", options="rw,pids")
    tree.group("/sys/fs/cgroup/unified/system.slice/nodeagent.service", cgroup__controllers="")
    memory = tree.group("/sys/fs/cgroup/memory/nodeagent-seats/one", **V1["memory"])
    cpu = tree.group("/sys/fs/cgroup/cpu,cpuacct/system.slice/nodeagent-seats/one", **V1["cpu"])
    tree.group("/sys/fs/cgroup/pids/system.slice/nodeagent.service")
    cgroups = SeatCgroups(tree.root)
    found = {h.controllers: h.own.relative_to(tree.root) for h in find(tree.root)}
    assert found == {
        ("memory",): Path("sys/fs/cgroup/memory"),
        ("cpu",): Path("sys/fs/cgroup/cpu,cpuacct/system.slice"),
        ("pids",): Path("sys/fs/cgroup/pids/system.slice/nodeagent.service"),
    }
    cgroups._hierarchies = tuple(find(tree.root))  # without the sweep, which would wait for this fake to die
    pids = tree.group("/sys/fs/cgroup/pids/system.slice/nodeagent.service/nodeagent-seats/one", **V1["pids"])
    seat = cgroups.create("one", LIMITS)
    assert set(seat.procs) == {memory / "cgroup.procs", cpu / "cgroup.procs", pids / "cgroup.procs"}
    assert (memory / "memory.limit_in_bytes").read_text() == str(384 << 20)
    assert (memory / "memory.memsw.limit_in_bytes").read_text() == str(384 << 20)
    assert (pids / "pids.max").read_text() == "64"
    assert (cpu / "cpu.cfs_quota_us").read_text() == "150000"
    assert cgroups.missing == ()
    (memory / "memory.oom_control").write_text("oom_kill_disable 0\nunder_oom 0\noom_kill 3\n")
    assert seat.oom_kills() == 3


async def test_v2_moves_the_daemon_to_a_leaf_and_hands_its_controllers_down(
    tree: Tree, monkeypatch: pytest.MonkeyPatch
) -> None:
    def kernel(path: Path, value: str) -> None:
        """What the kernel makes of a write: controllers are added, a process leaves the cgroup it was in."""
        if path.name == "cgroup.subtree_control":
            words = [word for word in path.read_text().split() if word != value[1:]]
            path.write_text(" ".join([*words, value[1:]] if value[0] == "+" else words))
        elif path.name == "cgroup.procs":
            for each in tree.root.rglob("cgroup.procs"):
                each.write_text(each.read_text().replace(value, ""))
            path.write_text(value)
        else:
            path.write_text(value)

    monkeypatch.setattr("nodeagent.seats.cgroups._set", kernel)
    tree.belongs("0::/kubepods.slice/pod1/agent")
    tree.mount("cgroup2", "/sys/fs/cgroup")
    own = tree.group(
        "/sys/fs/cgroup/kubepods.slice/pod1/agent",
        cgroup__type="domain",
        cgroup__controllers="cpuset cpu io memory pids",
        cgroup__procs="17\n",
        cgroup__subtree_control="io memory",
    )
    leaf = tree.group("/sys/fs/cgroup/kubepods.slice/pod1/agent/nodeagent", cgroup__procs="")
    seats = tree.group("/sys/fs/cgroup/kubepods.slice/pod1/agent/nodeagent-seats", cgroup__subtree_control="")
    cgroups = SeatCgroups(tree.root)
    await cgroups.prepare()
    assert (leaf / "cgroup.procs").read_text() == "17"
    assert (own / "cgroup.subtree_control").read_text().split() == ["io", "memory", "pids", "cpu"]
    assert (seats / "cgroup.subtree_control").read_text().split() == ["memory", "pids", "cpu"]
    assert cgroups.missing == ()
    await cgroups.remove()
    assert (own / "cgroup.procs").read_text() == "17"
    assert (own / "cgroup.subtree_control").read_text().split() == ["io", "memory"]


async def test_a_daemon_that_is_in_its_leaf_already_uses_the_place_above(tree: Tree) -> None:
    tree.belongs("0::/agent/nodeagent")
    tree.mount("cgroup2", "/sys/fs/cgroup")
    tree.group("/sys/fs/cgroup/agent", cgroup__controllers="pids", cgroup__procs="", cgroup__subtree_control="pids")
    tree.group("/sys/fs/cgroup/agent/nodeagent", cgroup__controllers="pids")
    await SeatCgroups(tree.root).prepare()
    assert (tree.root / "sys/fs/cgroup/agent/nodeagent-seats").is_dir()
    assert not (tree.root / "sys/fs/cgroup/agent/nodeagent/nodeagent-seats").exists()


def test_v2_settings(tree: Tree) -> None:
    written = settings(Hierarchy(tree.root, 2, ("memory", "pids", "cpu")), LIMITS)
    assert written == [
        ("memory.max", str(384 << 20)),
        ("?memory.swap.max", "0"),
        ("?memory.oom.group", "0"),
        ("pids.max", "64"),
        ("cpu.max", "150000 100000"),
    ]


def test_a_container_whose_mount_begins_at_its_own_cgroup(tree: Tree) -> None:
    """runc without a cgroup namespace bind-mounts the container's part of each v1 hierarchy."""
    tree.belongs("4:memory:/kubepods/burstable/pod1/agent")
    tree.mount("cgroup", "/host/sys/fs/cgroup/memory", top="/somewhere/else", options="rw,memory")
    tree.mount("cgroup", "/sys/fs/cgroup/memory", top="/kubepods/burstable/pod1/agent", options="rw,memory")
    (hierarchy,) = find(tree.root)
    assert hierarchy.own == tree.root / "sys/fs/cgroup/memory"


def test_a_mount_outside_our_cgroup_namespace_shows_nothing_of_us(tree: Tree) -> None:
    tree.belongs("0::/")
    tree.mount("cgroup2", "/host/sys/fs/cgroup", top="/../../..")
    tree.group("/host/sys/fs/cgroup", cgroup__controllers="memory pids cpu")
    assert find(tree.root) == []
    tree.mount("cgroup2", "/sys/fs/cgroup")
    tree.group("/sys/fs/cgroup", cgroup__controllers="memory pids cpu")
    assert find(tree.root) == [Hierarchy(tree.root / "sys/fs/cgroup", 2, ("memory", "pids", "cpu"))]


async def test_without_cgroups_seats_run_without_limits_and_the_log_says_which(
    tree: Tree, caplog: pytest.LogCaptureFixture
) -> None:
    cgroups = SeatCgroups(tree.root)
    await cgroups.prepare()
    assert cgroups.missing == ("memory", "pids", "cpu")
    assert "no limit for memory, pids, cpu" in caplog.text
    seat = cgroups.create("one", LIMITS)
    assert seat.procs == () and seat.oom_kills() == 0
    await seat.destroy()


def test_a_limit_that_is_refused_is_an_error_with_its_file(tree: Tree) -> None:
    tree.belongs("4:memory:/")
    tree.mount("cgroup", "/sys/fs/cgroup/memory", options="rw,memory")
    tree.group("/sys/fs/cgroup/memory/nodeagent-seats")
    cgroups = SeatCgroups(tree.root)
    cgroups._hierarchies = tuple(find(tree.root))
    with pytest.raises(AgentError, match=r"cgroup of seat one: .*memory\.limit_in_bytes does not take 402653184"):
        cgroups.create("one", LIMITS)
    assert not (tree.root / "sys/fs/cgroup/memory/nodeagent-seats/one").exists()
