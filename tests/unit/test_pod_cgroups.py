"""Pods by their cgroups, in the layouts of drivers, versions and nested clusters."""

from pathlib import Path

import pytest

from nodeagent.devices import pod_cgroups
from nodeagent.devices.pod_cgroups import pods_with_cgroups
from nodeagent.host import HostRoot

UID = "0c3f5bd4-8a3e-4c5e-9a0f-3f0d9b1e2a77"
MIRROR = "5d1f0c6d3c2f4c6a8b1e9d7f6a5b4c3d"


@pytest.mark.parametrize(
    ("path", "uid"),
    [
        (f"systemd/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod{UID.replace('-', '_')}.slice", UID),
        (f"kubepods.slice/kubepods-pod{UID.replace('-', '_')}.slice/cri-containerd-abc.scope", UID),
        (f"memory/kubepods/besteffort/pod{UID}", UID),
        (f"kubepods/pod{MIRROR}", MIRROR),
        (f"kubelet/kubepods/burstable/pod{UID}/abc", UID),
        (f"system.slice/k3s.service/kubepods/burstable/pod{UID}", UID),
    ],
)
def test_layouts(tmp_path: Path, path: str, uid: str) -> None:
    (tmp_path / "sys/fs/cgroup" / path).mkdir(parents=True)
    assert pods_with_cgroups(HostRoot(tmp_path)) == {uid}


@pytest.mark.parametrize(
    "path", ["user.slice/podcast.service", f"kubepods/x{UID}", "kubepods/burstable", "machine.slice/pod1234"]
)
def test_nothing_says_nothing(tmp_path: Path, path: str) -> None:
    (tmp_path / "sys/fs/cgroup" / path).mkdir(parents=True)
    assert pods_with_cgroups(HostRoot(tmp_path)) is None
    assert pods_with_cgroups(HostRoot(tmp_path / "nowhere")) is None


def test_the_search_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pod_cgroups, "MAX_DIRECTORIES", 10)
    for n in range(50):
        (tmp_path / f"sys/fs/cgroup/a{n}/b").mkdir(parents=True)
    assert pods_with_cgroups(HostRoot(tmp_path)) is None
