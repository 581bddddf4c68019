"""Device nodes of running containers: the real runc and its device cgroup; the programs of cgroup v2 on this kernel."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from nodeagent.errors import AgentError, Reason
from nodeagent.sandboxes import bpf
from nodeagent.sandboxes.device_cgroup import DeviceCgroups, change
from nodeagent.sandboxes.device_program import DeviceNumbers, Rule, parts, take_program
from tests.host.replug import OPEN, opened_directory, replug
from tests.unit.device_program_captures import RUNC

pytestmark = pytest.mark.root

FUSE, AUTOFS, ZERO = DeviceNumbers("c", 10, 229), DeviceNumbers("c", 10, 235), DeviceNumbers("c", 1, 5)
ALLOWS_ALL = bytes.fromhex("b7000000010000009500000000000000")


async def test_a_replug_in_a_running_container(short_tmp: Path) -> None:
    """With the attacks of a tenant; under the cgroup version that runc has on this machine."""
    await replug(short_tmp)


class Cgroup:
    """A cgroup v2 of our own, guarded by the program that runc was seen to make. It need not be runc's tree."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.places = DeviceCgroups(v2=directory)

    def guard(self, program: bytes = RUNC, flags: int = bpf.F_ALLOW_MULTI) -> None:
        with opened_directory(self.directory) as cgroup:
            fd = bpf.load(program, "runc_like")
            try:
                bpf.attach(cgroup, fd, flags)
            finally:
                os.close(fd)

    def programs(self) -> list[bytes]:
        shown = []
        with opened_directory(self.directory) as cgroup:
            for program_id in bpf.attached(cgroup).ids:
                fd = bpf.opened(program_id)
                try:
                    shown.append(bpf.instructions(fd))
                finally:
                    os.close(fd)
        return shown

    def rules(self) -> list[tuple[Rule, ...]]:
        return [parts(take_program(program))[0] for program in self.programs()]

    def opens(self, *paths: str) -> list[str]:
        """What a process in this cgroup hears."""
        join = f"open({str(self.directory / 'cgroup.procs')!r}, 'w').write('0')\n"
        ran = subprocess.run([sys.executable, "-Ic", join + OPEN, *paths], capture_output=True, text=True, check=True)
        return ran.stdout.split()


@pytest.fixture
def cgroup() -> Iterator[Cgroup]:
    with open("/proc/self/mountinfo") as table:
        points = [line.split()[4] for line in table if " - cgroup2 " in line]
    if not points:
        pytest.skip("no cgroup2 is mounted on this machine: mount -t cgroup2 none /mnt to include it")
    directory = Path(points[0]) / f"nodeagent-test-{os.getpid()}"
    directory.mkdir()
    try:
        yield Cgroup(directory)
    finally:
        directory.rmdir()


@pytest.fixture
def nodes(tmp_path: Path) -> tuple[str, str, str]:
    """Nodes of FUSE, AUTOFS and ZERO."""
    made = []
    for numbers in (FUSE, AUTOFS, ZERO):
        made.append(str(tmp_path / str(numbers.minor)))
        os.mknod(made[-1], 0o20666, os.makedev(numbers.major, numbers.minor))
    return made[0], made[1], made[2]


def test_programs_of_v2_are_exchanged(cgroup: Cgroup, nodes: tuple[str, str, str]) -> None:
    cgroup.guard()
    assert cgroup.opens(*nodes) == ["EPERM", "EPERM", "open"]
    change(cgroup.places, [Rule(FUSE, True)])
    assert cgroup.opens(*nodes) == ["open", "EPERM", "open"]
    change(cgroup.places, [Rule(FUSE, False), Rule(AUTOFS, True), Rule(ZERO, False)])
    assert cgroup.opens(*nodes) == ["EPERM", "open", "EPERM"]
    assert cgroup.rules() == [(Rule(ZERO, False), Rule(AUTOFS, True))]
    change(cgroup.places, [Rule(AUTOFS, False), Rule(ZERO, True)])
    assert cgroup.opens(*nodes) == ["EPERM", "EPERM", "open"]
    assert len(cgroup.programs()[0]) == len(RUNC), "nothing of ours is left"


def test_nothing_is_loaded_when_nothing_changes(cgroup: Cgroup) -> None:
    cgroup.guard()
    change(cgroup.places, [Rule(FUSE, True)])
    with opened_directory(cgroup.directory) as directory:
        before = bpf.attached(directory)
        change(cgroup.places, [Rule(FUSE, True), Rule(ZERO, True), Rule(AUTOFS, False)])
        assert bpf.attached(directory) == before


def test_every_program_must_allow(cgroup: Cgroup, nodes: tuple[str, str, str]) -> None:
    """systemd attaches one of its own where it manages the cgroup."""
    cgroup.guard()
    cgroup.guard()
    change(cgroup.places, [Rule(FUSE, True)])
    assert cgroup.opens(*nodes) == ["open", "EPERM", "open"]
    assert cgroup.rules() == [(Rule(FUSE, True),)] * 2
    cgroup.guard()  # `systemctl daemon-reload`
    assert cgroup.opens(nodes[0]) == ["EPERM"]
    change(cgroup.places, [Rule(FUSE, True)])
    assert cgroup.opens(nodes[0]) == ["open"]


def test_a_program_that_is_alone(cgroup: Cgroup, nodes: tuple[str, str, str]) -> None:
    cgroup.guard(flags=0)
    change(cgroup.places, [Rule(FUSE, True)])
    assert cgroup.opens(*nodes) == ["open", "EPERM", "open"]
    assert len(cgroup.programs()) == 1


def test_a_kernel_without_replace(cgroup: Cgroup, nodes: tuple[str, str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Before Linux 5.6: EINVAL for a flag that it does not know."""
    attach = bpf.attach

    def old_attach(cgroup_fd: int, program_fd: int, flags: int, replaced_fd: int = 0) -> None:
        if flags & bpf.F_REPLACE:
            raise OSError(22, "Invalid argument")
        attach(cgroup_fd, program_fd, flags)

    monkeypatch.setattr(bpf, "attach", old_attach)
    cgroup.guard()
    for allowed, heard in ((True, "open"), (False, "EPERM")):
        change(cgroup.places, [Rule(FUSE, allowed)])
        assert cgroup.opens(nodes[0]) == [heard]
        assert len(cgroup.programs()) == 1


def test_somebody_else_exchanges_it_meanwhile(cgroup: Cgroup, monkeypatch: pytest.MonkeyPatch) -> None:
    cgroup.guard()
    exchange, calls = bpf.exchange, []

    def beaten(cgroup_fd: int, old_fd: int, new_fd: int, flags: int) -> None:
        calls.append(old_fd)
        if len(calls) < 3:
            bpf.detach(cgroup_fd, old_fd)
            cgroup.guard()
        exchange(cgroup_fd, old_fd, new_fd, flags)

    monkeypatch.setattr(bpf, "exchange", beaten)
    change(cgroup.places, [Rule(FUSE, True)])
    assert cgroup.rules() == [(Rule(FUSE, True),)]
    assert len(calls) == 3

    monkeypatch.setattr(bpf, "exchange", lambda *_: (_ for _ in ()).throw(FileNotFoundError(2, "gone")))
    with pytest.raises(AgentError, match="somebody else keeps exchanging"):
        change(cgroup.places, [Rule(AUTOFS, True)])


def test_a_cgroup_without_a_guard_is_left_alone(cgroup: Cgroup, nodes: tuple[str, str, str]) -> None:
    change(cgroup.places, [Rule(FUSE, False)])
    assert cgroup.programs() == []
    assert cgroup.opens(nodes[0]) == ["open"]


def test_a_verifier_that_refuses_is_told(cgroup: Cgroup, monkeypatch: pytest.MonkeyPatch) -> None:
    """A real refusal: the program is damaged on its way into the kernel. The old one stays."""
    cgroup.guard()
    load = bpf.load
    monkeypatch.setattr(bpf, "load", lambda program, name: load(program[:-8], name))
    with pytest.raises(AgentError, match="does not take the device program") as refusal:
        change(cgroup.places, [Rule(FUSE, True)])
    assert refusal.value.reason is Reason.NOT_SUPPORTED
    assert "last insn is not an exit" in refusal.value.message
    assert "start the pod anew" in refusal.value.hint
    assert cgroup.rules() == [()]


def test_the_largest_front_is_taken_by_the_verifier(cgroup: Cgroup) -> None:
    cgroup.guard(ALLOWS_ALL)
    rules = [Rule(DeviceNumbers("c", 189, minor), False) for minor in range(64)]
    change(cgroup.places, rules)
    assert cgroup.rules() == [tuple(rules)]
