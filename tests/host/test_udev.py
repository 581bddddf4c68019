"""Hotplug against the running kernel: its own events, lost events, and the host's network namespace."""

import asyncio
import fcntl
import os
import re
import select
import socket
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

from nodeagent.config import DevicesConfig
from nodeagent.devices import sysfs, udev
from nodeagent.devices.inventory import Inventory
from nodeagent.host import HostRoot

NULL = Path("/sys/class/mem/null/uevent")
"""Writing here makes the kernel repeat the event of /dev/null (Documentation/ABI/testing/sysfs-uevent): harmless, and no USB."""

pytestmark = [
    pytest.mark.root,
    pytest.mark.skipif(not os.access(NULL, os.W_OK), reason="/sys is read-only here: no kernel event can be provoked"),
]


@pytest.fixture
def hotplug() -> Iterator[udev.UdevHotplug]:
    found = udev.UdevHotplug(re.compile("/mem/null"))
    yield found
    found.close()


def readable(hotplug: udev.Hotplug, timeout_s: float = 5) -> bool:
    return bool(select.select([hotplug.fileno()], [], [], timeout_s)[0])


def test_an_event_is_heard_and_told_from_others(hotplug: udev.UdevHotplug) -> None:
    NULL.write_text("change")
    assert readable(hotplug)
    assert hotplug.take().usb
    other = udev.UdevHotplug()
    NULL.write_text("change")
    assert readable(other)
    assert not other.take().usb
    other.close()


def test_discard_leaves_nothing(hotplug: udev.UdevHotplug) -> None:
    for _ in range(200):
        NULL.write_text("change")
    hotplug.discard()
    assert not hotplug.take().usb


def test_lost_events_are_an_event_and_it_goes_on(hotplug: udev.UdevHotplug) -> None:
    duplicate = socket.socket(fileno=os.dup(hotplug.fileno()))
    duplicate.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    duplicate.close()
    for _ in range(200):
        NULL.write_text("change")
    assert readable(hotplug)
    assert hotplug.take().usb
    hotplug.discard()
    assert not hotplug.take().usb
    NULL.write_text("change")
    assert readable(hotplug)
    assert hotplug.take().usb


async def test_the_inventory_looks_when_the_kernel_speaks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    looked = asyncio.Event()
    loop = asyncio.get_running_loop()
    read = Inventory._read

    def noting(self: Inventory, known: object, touched: object) -> object:
        loop.call_soon_threadsafe(looked.set)
        return read(self, known, touched)  # type: ignore[arg-type]

    def opened(_: HostRoot) -> udev.Hotplug:
        return udev.UdevHotplug(re.compile("/mem/null"))

    async with Inventory(HostRoot("/"), DevicesConfig(debounce=0.01), bytes(32), open_hotplug=opened) as inventory:
        monkeypatch.setattr(Inventory, "_read", noting)
        async with asyncio.TaskGroup() as tasks:
            running = tasks.create_task(inventory.run())
            NULL.write_text("change")
            async with asyncio.timeout(5):
                await looked.wait()
            running.cancel()  # TaskGroup waits for it


async def test_the_real_root_opens(caplog: pytest.LogCaptureFixture) -> None:
    async with Inventory(HostRoot("/"), DevicesConfig(), bytes(32)) as inventory:
        assert inventory._hotplug is not None
        assert all(d.usb.sysfs.startswith("/sys/devices/") for d in inventory.devices.values())
    assert "no hotplug events" not in caplog.text


def test_walk_and_libudev_agree() -> None:
    walked = {str(Path(p).resolve()) for p in sysfs.usb_paths(HostRoot("/"))}
    assert walked == set(udev.usb_paths(HostRoot("/")))


SIOCGSKNS = 0x894C
"""ioctl: a descriptor of the network namespace a socket belongs to (linux/sockios.h)."""

INSIDE = """
    import fcntl, os, sys
    from nodeagent.devices import udev
    from nodeagent.host import HostRoot
    before = os.stat("/proc/self/ns/net").st_ino
    hotplug = udev.open_hotplug(HostRoot(sys.argv[1]))
    of_socket = os.fstat(fcntl.ioctl(hotplug.fileno(), 0x894C)).st_ino
    print(before, os.stat("/proc/self/ns/net").st_ino, of_socket)
"""


def in_another_namespace(host_root: Path) -> list[int]:
    """The network namespace of a fresh process before and after it opened hotplug events, and that of its socket."""
    program = ["unshare", "--net", sys.executable, "-c", textwrap.dedent(INSIDE), str(host_root)]
    done = subprocess.run(program, capture_output=True, text=True, check=True, timeout=60)
    return [int(word) for word in done.stdout.split()]


def host_root(path: Path) -> Path:
    """A host whose first process is this test."""
    (path / "proc/1/ns").mkdir(parents=True)
    (path / "proc/1/ns/net").symlink_to(f"/proc/{os.getpid()}/ns/net")
    (path / "proc/sys/kernel/random").mkdir(parents=True)
    (path / "proc/sys/kernel/random/boot_id").write_text(HostRoot().boot_id() + "\n")
    return path


def test_the_socket_belongs_to_the_hosts_network_namespace(tmp_path: Path) -> None:
    before, after, of_socket = in_another_namespace(host_root(tmp_path))
    assert before == after, "only the one-shot thread moves"
    assert of_socket == os.stat("/proc/self/ns/net").st_ino != before


def test_a_namespace_out_of_reach_is_no_reason_to_be_deaf(tmp_path: Path) -> None:
    (host_root(tmp_path) / "proc/1/ns/net").unlink()
    before, after, of_socket = in_another_namespace(tmp_path)
    assert before == after == of_socket


def test_a_socket_of_our_own_namespace(hotplug: udev.UdevHotplug) -> None:
    fd = fcntl.ioctl(hotplug.fileno(), SIOCGSKNS)
    try:
        assert os.fstat(fd).st_ino == os.stat("/proc/self/ns/net").st_ino
    finally:
        os.close(fd)


def test_without_libudev_there_are_only_periodic_looks(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def missing(*_: object) -> None:
        raise ImportError("No library named udev")

    monkeypatch.setattr(udev, "UdevHotplug", missing)
    assert udev.open_hotplug(HostRoot("/")) is None
    assert "periodic look only" in caplog.text
