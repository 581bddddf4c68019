"""SELinux labels of slots, over a fake selinuxfs: this machine's kernel has none. Class and permission numbers are made up."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from nodeagent.host import HostRoot
from nodeagent.transports import labels
from nodeagent.transports.labels import Labels, allows, question

SPC = "system_u:system_r:spc_t:s0"
BITS = {
    "dir": ("7", "search", "30"),
    "sock_file": ("11", "write", "3"),
    "unix_stream_socket": ("23", "connectto", "23"),
}


class FakeSELinux:
    """A host with a policy; `denied` are the classes that containers may not use."""

    def __init__(self, root: Path, *, enforce: str = "1", domain: str = SPC, denied: tuple[str, ...] = ()) -> None:
        self.root, self.denied = root, denied
        self.labels: dict[str, bytes] = {}
        self.asked: list[str] = []
        self.refuse: OSError | None = None
        self._write("sys/fs/selinux/enforce", enforce)
        for name, (index, permission, number) in BITS.items():
            self._write(f"sys/fs/selinux/class/{name}/index", index)
            self._write(f"sys/fs/selinux/class/{name}/perms/{permission}", number)
        self._write("proc/self/attr/current", f"{domain}\0")
        self._write("etc/selinux/config", "# a comment\nSELINUX=enforcing\nSELINUXTYPE=mls\n")

    def _write(self, path: str, text: str) -> None:
        (self.root / path).parent.mkdir(parents=True, exist_ok=True)
        (self.root / path).write_text(text)

    def policy(self, text: str) -> None:
        self._write("etc/selinux/mls/contexts/lxc_contexts", text)

    def set(self, path: Path, name: str, value: bytes) -> None:
        if self.refuse:
            raise self.refuse
        assert name == "security.selinux"
        self.labels[path.name] = value

    def get(self, path: Path, name: str) -> bytes:
        if path.name not in self.labels:
            raise OSError(errno.ENODATA, "No data available")
        return self.labels[path.name]

    def ask(self, path: Path, text: bytes) -> bytes:
        assert path == self.root / "sys/fs/selinux/access"
        self.asked.append(text.decode())
        number = text.split()[2].decode()
        cls = next(name for name, (index, _, _) in BITS.items() if index == number)
        return b"0 ffffffff 0 ffffffff 12 0" if cls in self.denied else b"ffffffff ffffffff 0 ffffffff 12 0"

    def opened(self) -> Labels:
        return Labels(HostRoot(self.root), set_xattr=self.set, get_xattr=self.get, ask=self.ask)


def test_without_selinux_nothing_happens(tmp_path: Path) -> None:
    def never(*_: object) -> bytes:
        pytest.fail("touched")

    without = Labels(HostRoot(tmp_path), set_xattr=never, get_xattr=never, ask=never)
    assert not without.enabled
    assert without.apply(tmp_path) is None
    assert without.probe(tmp_path) is None
    assert list(tmp_path.iterdir()) == []


def test_the_label_is_the_policy_s_own(tmp_path: Path) -> None:
    fake = FakeSELinux(tmp_path)
    assert fake.opened().file == "system_u:object_r:container_file_t:s0"
    fake.policy('process = "system_u:system_r:svirt_lxc_net_t:s0"\nfile="system_u:object_r:svirt_sandbox_file_t:s0"\n')
    opened = fake.opened()
    assert opened.file == "system_u:object_r:svirt_sandbox_file_t:s0"
    assert opened.process == "system_u:system_r:svirt_lxc_net_t:s0"
    fake.policy('file = "not a context; rm -rf"\n')
    assert fake.opened().file == "system_u:object_r:container_file_t:s0"


def test_a_slot_is_labelled(tmp_path: Path) -> None:
    fake = FakeSELinux(tmp_path)
    slot = tmp_path / "slot"
    slot.mkdir()
    assert fake.opened().apply(slot) is None
    assert fake.labels == {"slot": b"system_u:object_r:container_file_t:s0\0"}


def test_the_probe_makes_labels_connects_asks_and_leaves_nothing(tmp_path: Path) -> None:
    fake = FakeSELinux(tmp_path)
    run_dir = tmp_path / ("run" + "x" * 120)
    run_dir.mkdir()
    assert fake.opened().probe(run_dir) is None
    assert set(fake.labels) == {"label-probe", "probe.sock"}
    assert list(run_dir.iterdir()) == []
    container, file = "system_u:system_r:container_t:s0:c1,c2", "system_u:object_r:container_file_t:s0"
    assert fake.asked == [
        f"{container} {file} 7 20000000",
        f"{container} {file} 11 4",
        f"{container} {SPC} 23 400000",
    ]


def test_a_daemon_that_containers_may_not_connect_to(tmp_path: Path) -> None:
    domain = "system_u:system_r:unconfined_service_t:s0"
    problem = FakeSELinux(tmp_path, domain=domain, denied=("unix_stream_socket",)).opened().probe(tmp_path)
    assert problem is not None
    assert "a container (container_t) may not connect to this daemon's domain (unconfined_service_t" in problem.message
    assert "(allow container_t unconfined_service_t (unix_stream_socket (connectto)))" in problem.hint
    assert "semodule -i" in problem.hint


def test_permissive_says_so(tmp_path: Path) -> None:
    opened = FakeSELinux(tmp_path, enforce="0", denied=("sock_file",)).opened()
    assert opened.enabled
    assert not opened.enforcing
    problem = opened.probe(tmp_path)
    assert problem is not None
    assert "permissive" in problem.message


def test_a_policy_that_cannot_be_asked_is_no_problem_by_itself(tmp_path: Path) -> None:
    fake = FakeSELinux(tmp_path)
    (tmp_path / "sys/fs/selinux/class/dir/index").unlink()
    assert fake.opened().probe(tmp_path) is None
    assert len(fake.asked) == 2


@pytest.mark.parametrize("code", [errno.EOPNOTSUPP, errno.EPERM, errno.EINVAL, errno.EROFS])
def test_a_refused_label_is_a_problem_and_no_error(tmp_path: Path, code: int) -> None:
    fake = FakeSELinux(tmp_path)
    fake.refuse = OSError(code, os.strerror(code))
    opened = fake.opened()
    problem = opened.apply(tmp_path)
    assert problem is not None
    assert os.strerror(code) in problem.message
    assert opened.probe(tmp_path) is not None


def test_a_file_system_with_one_label_for_all_may_have_the_right_one(tmp_path: Path) -> None:
    fake = FakeSELinux(tmp_path)
    fake.refuse = OSError(errno.EOPNOTSUPP, "no")
    fake.labels["slot"] = b"system_u:object_r:container_file_t:s0:c0.c1023\0"
    assert fake.opened().apply(tmp_path / "slot") is None


def test_a_label_that_does_not_stick_is_a_problem(tmp_path: Path) -> None:
    fake = FakeSELinux(tmp_path)
    opened = Labels(HostRoot(tmp_path), set_xattr=lambda *_: None, get_xattr=fake.get, ask=fake.ask)
    problem = opened.probe(tmp_path)
    assert problem is not None
    assert "has the SELinux type of nothing" in problem.message


def test_the_real_kernel_without_selinux_refuses_or_takes_it(tmp_path: Path) -> None:
    """The real setxattr: without SELinux a kernel takes any label of root (commoncap) or refuses; neither may raise."""
    FakeSELinux(tmp_path)
    Labels(HostRoot(tmp_path), ask=lambda *_: b"ffffffff").probe(tmp_path)
    assert not (tmp_path / labels.PROBE).exists()


def test_questions_and_answers() -> None:
    assert question("a:b:c:s0:c1,c2", "d:e:f:s0", 23, 1 << 22) == b"a:b:c:s0:c1,c2 d:e:f:s0 23 400000"
    assert allows(b"400002 ffffffff 0 ffffffff 7 0", 0x400000)
    assert not allows(b"400002 ffffffff 0 ffffffff 7 0", 0x400004)
    for garbage in (b"", b"zz", b"\xff\xff"):
        with pytest.raises(ValueError, match=r".*"):
            allows(garbage, 1)
