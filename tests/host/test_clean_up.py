"""Flushing a real block device and detaching what is mounted from it: a loop device stands for the stick."""

from __future__ import annotations

import os
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from nodeagent.devices.clean_up import clean_up, flush
from nodeagent.devices.slow_calls import SlowCalls
from nodeagent.errors import AgentError, Reason
from nodeagent.host import HostRoot
from nodeagent.model import Device, DeviceClass, DeviceNode, UsbDevice

pytestmark = pytest.mark.root

MARKER = b"left by the last holder " * 64


def run(*argv: str) -> str:
    return subprocess.run(argv, check=True, capture_output=True, text=True, timeout=60).stdout.strip()


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "stick.img"
    path.touch()
    os.truncate(path, 8 << 20)
    run("mke2fs", "-q", "-t", "ext4", "-O", "^has_journal", str(path))
    return path


@pytest.fixture
def stick(image: Path) -> Iterator[UsbDevice]:
    node = run("losetup", "--find", "--show", str(image))
    rdev = os.stat(node).st_rdev
    try:
        yield UsbDevice(
            port="1-1",
            vendor=1,
            product=2,
            nodes=(DeviceNode(node, "block", os.major(rdev), os.minor(rdev), 0),),
            sysfs=f"/sys/devices/virtual/block/{Path(node).name}",
        )
    finally:
        subprocess.run(["losetup", "--detach", node], check=False)


def host_of(tmp_path: Path, pid: int | str) -> HostRoot:
    """A host whose first process is this one."""
    root = tmp_path / "host"
    (root / "proc").mkdir(parents=True)
    (root / "proc/1").symlink_to(f"/proc/{pid}")
    for name in ("sys", "dev"):
        (root / name).symlink_to(f"/{name}")
    return HostRoot(root)


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Path]:
    place = tmp_path / "mounted here"
    place.mkdir()
    yield place
    subprocess.run(["umount", "-q", str(place)], check=False, stderr=subprocess.DEVNULL)


async def test_what_was_written_is_on_the_stick_and_the_mount_is_gone(
    tmp_path: Path, image: Path, stick: UsbDevice, place: Path
) -> None:
    run("mount", stick.nodes[0].path, str(place))
    (place / "secret").write_bytes(MARKER)
    device = Device(id="storage-1", cls=DeviceClass.STORAGE, usb=stick)
    host = host_of(tmp_path, os.getpid())
    (report,) = await clean_up(host, device, "node", SlowCalls(), timeout_s=30)
    assert report.error is None
    assert report.did == f"detached {place}; flushed {stick.nodes[0].path}"
    assert not os.path.ismount(place)
    assert MARKER in image.read_bytes()
    (report,) = await clean_up(host, device, "node", SlowCalls(), timeout_s=30)
    assert report.did == f"flushed {stick.nodes[0].path}", "a second time there is nothing to detach"


def test_nothing_stays_in_the_cache(tmp_path: Path, image: Path, stick: UsbDevice) -> None:
    def first() -> bytes:
        with open(stick.nodes[0].path, "rb") as file:
            return file.read(4)

    with open(stick.nodes[0].path, "rb") as keeps_the_cache:
        assert keeps_the_cache.read(4) == b"\0" * 4
        run("dd", "if=/dev/zero", f"of={image}", "bs=4096", "count=1", "conv=notrunc", "status=none")
        with open(image, "r+b") as file:
            file.write(b"next")
            os.fsync(file.fileno())
        assert first() == b"\0" * 4, "the block device did not cache, so this test shows nothing"
        flush(host_of(tmp_path, os.getpid()), stick)
        assert first() == b"next"


def test_a_mount_in_the_host_s_own_namespace(tmp_path: Path, stick: UsbDevice, place: Path) -> None:
    script = f'mount {stick.nodes[0].path} "$0" && echo mounted && read _'
    there = subprocess.Popen(
        ["unshare", "--mount", "sh", "-c", script, str(place)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        assert there.stdout is not None and there.stdout.readline() == b"mounted\n"
        host = host_of(tmp_path, there.pid)
        assert str(place).replace(" ", "\\040") in Path(f"/proc/{there.pid}/mountinfo").read_text()
        done: list[str] = []
        before = os.stat("/proc/self/ns/mnt").st_ino
        thread = threading.Thread(target=lambda: done.append(flush(host, stick)))
        thread.start()
        thread.join()
        assert done == [f"detached {place}; flushed {stick.nodes[0].path}"]
        assert stick.nodes[0].path not in Path(f"/proc/{there.pid}/mountinfo").read_text()
        assert os.stat("/proc/self/ns/mnt").st_ino == before, "only that thread moved"
    finally:
        there.communicate(b"\n", timeout=30)


def test_a_place_where_something_else_lies_on_top_keeps_it(tmp_path: Path, stick: UsbDevice, place: Path) -> None:
    run("mount", stick.nodes[0].path, str(place))
    run("mount", "-t", "tmpfs", "tmpfs", str(place))
    try:
        assert flush(host_of(tmp_path, os.getpid()), stick) == f"flushed {stick.nodes[0].path}"
        assert os.path.ismount(place)
    finally:
        run("umount", str(place))


def test_a_loop_device_that_another_disk_has_become_is_not_touched(tmp_path: Path, stick: UsbDevice) -> None:
    other = msgspec.structs.replace(stick, sysfs="/sys/devices/virtual/block/loop-of-somebody-else")
    with pytest.raises(AgentError) as caught:
        flush(host_of(tmp_path, os.getpid()), other)
    assert caught.value.reason is Reason.DEVICE_UNPLUGGED
