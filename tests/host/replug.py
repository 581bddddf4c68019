"""A replug in a running runc container, from its first open to the attacks. Runs under cgroup v1 and v2, as root.

`await replug(directory)` is what tests/host/test_device_nodes.py runs on this machine; `python -m tests.host.replug` does the
same anywhere, prints one JSON line and exits 0. The devices are /dev/fuse (10:229) and /dev/autofs (10:235) under other names:
opening them needs no capability and does nothing. They stand for one USB device before and after its replug. (10:200 would not
do: runc lets every container open /dev/net/tun.)
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import stat
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from nodeagent.demo.oci import DESKTOP_UID
from nodeagent.demo.pods import ContainerSpec, NodeSpec, PodSpec
from nodeagent.demo.runtime import StandInRuntime
from nodeagent.devices.cri import Cri
from nodeagent.errors import AgentError, Reason
from nodeagent.host import HostRoot
from nodeagent.model import Container, DeviceNode
from nodeagent.sandboxes import bpf, device_cgroup
from nodeagent.sandboxes.device_program import put_program, take_program
from nodeagent.sandboxes.nodes import grant, revoke

HOST = HostRoot("/")
LIVE = ("sh", "-c", "trap 'exit 0' TERM; while :; do sleep 3600 & wait $!; done")
BUS = f"/dev/nodeagent-replug-{os.getpid()}"
OLD = DeviceNode(f"{BUS}/001/005", "usb", 10, 229)
NEW = DeviceNode(f"{BUS}/002/006", "usb", 10, 235)
CYCLES = 20
OPEN = """
import errno, os, sys
for path in sys.argv[1:]:
    try:
        os.close(os.open(path, os.O_RDWR))
        print("open")
    except OSError as error:
        print(errno.errorcode[error.errno])
"""


@contextlib.contextmanager
def plugged(node: DeviceNode) -> Iterator[None]:
    """The host's node, only for the user of the desktop, so that owner and mode are seen to be copied."""
    path = Path(node.path)
    path.parent.mkdir(parents=True, exist_ok=True)
    os.mknod(path, stat.S_IFCHR | 0o600, os.makedev(node.major, node.minor))
    os.chown(path, DESKTOP_UID, 5)
    try:
        yield
    finally:
        shutil.rmtree(BUS, ignore_errors=True)


class Desk:
    """A container that runs, as the daemon sees it (`container`) and as its tenant does."""

    def __init__(self, runtime: StandInRuntime, container: Container) -> None:
        self.container = container
        self._runtime = runtime
        self.dev = Path(f"/proc/{container.pid}/root/dev")

    def at(self, node: DeviceNode) -> Path:
        """Where the container's node is, from outside and through its root: for tests, which are not attacked."""
        return self.dev / node.path.removeprefix("/dev/")

    async def opens(self, *nodes: DeviceNode) -> list[str]:
        return (await self.run("/usr/bin/python3", "-c", OPEN, *(n.path for n in nodes))).split()

    async def run(self, *argv: str, user: int = DESKTOP_UID) -> str:
        """As a process of the tenant; user 0 is root without capabilities, who owns /dev."""
        words = [
            word.replace(f"{DESKTOP_UID}:{DESKTOP_UID}", f"{user}:{user}")
            for word in self._runtime.command(self.container.id, *argv)
        ]
        process = await asyncio.create_subprocess_exec(
            *words, stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
        )
        out, err = await process.communicate()
        assert process.returncode == 0, (argv, out, err)
        return out.decode()

    async def grant(self, *nodes: DeviceNode) -> None:
        await asyncio.to_thread(grant, HOST, self.container, nodes)

    async def revoke(self, *nodes: DeviceNode) -> None:
        await asyncio.to_thread(revoke, HOST, self.container, nodes)

    async def permissions(self) -> list[str]:
        return await asyncio.to_thread(self._permissions)

    def _permissions(self) -> list[str]:
        """All that the container's device cgroups say, in text: the list of v1, the programs of v2."""
        places = device_cgroup.find(HOST, self.container.id, Path(f"/proc/{self.container.pid}/cgroup").read_text())
        said = [(directory / "devices.list").read_text() for directory in places.v1]
        if places.v2 is not None:
            with opened_directory(places.v2) as cgroup:
                for program_id in bpf.attached(cgroup).ids:
                    program = bpf.opened(program_id)
                    said.append(put_program(take_program(bpf.instructions(program))).hex())
                    os.close(program)
        return said


@contextlib.contextmanager
def opened_directory(path: Path) -> Iterator[int]:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield fd
    finally:
        os.close(fd)


@contextlib.asynccontextmanager
async def desk(directory: Path, *nodes: DeviceNode) -> AsyncIterator[Desk]:
    """A desktop that was given `nodes` when it started."""
    pod = PodSpec(
        name="desk",
        uid="11111111-2222-3333-4444-555555555555",
        handler="runc",
        containers=(ContainerSpec(name="desktop", args=LIVE),),
    )
    async with (
        StandInRuntime(directory / "rt", directory / "cri.sock") as runtime,
        Cri(HOST, str(runtime.socket)) as cri,
    ):
        await runtime.run_pod(pod)
        given = [NodeSpec(container_path=n.path, host_path=n.path, permissions="rw") for n in nodes]
        await runtime.start_container(pod, pod.containers[0], nodes=given)
        (container,) = await cri.containers()
        yield Desk(runtime, container)


async def replug(directory: Path) -> dict[str, object]:
    """The whole story; raises AssertionError where it goes wrong. The answer says what was there to be changed."""
    with plugged(OLD):
        async with desk(directory, OLD) as one:
            assert await one.opens(OLD) == ["open"]
            at_start = await one.permissions()
            await one.grant(OLD)
            assert await one.permissions() == at_start, "what is allowed already is left alone"
            shutil.rmtree(BUS)
            with plugged(NEW):
                summary = await _replugged(one)
                await _attacked(one, directory)
                await _storm(one)
            return summary


async def _replugged(one: Desk) -> dict[str, object]:
    await one.revoke(OLD)
    assert await one.opens(OLD) == ["ENOENT"]
    _forge(one, OLD)
    _forge(one, NEW)
    found = await one.opens(OLD, NEW)
    assert found == ["EPERM", "EPERM"], f"a node without permission opens nothing: {found}"
    await one.revoke(OLD, NEW)
    assert not one.at(OLD).exists(), "forged, but a node of exactly this device"
    revoked = await one.permissions()

    await one.grant(NEW)
    assert await one.opens(NEW) == ["open"]
    made, host = one.at(NEW).lstat(), Path(NEW.path).lstat()
    assert (made.st_mode, made.st_uid, made.st_gid, made.st_rdev) == (
        host.st_mode,
        host.st_uid,
        host.st_gid,
        host.st_rdev,
    )
    assert stat.S_IMODE(one.at(NEW).parent.lstat().st_mode) == 0o755
    assert os.listdir(one.at(NEW).parent) == ["006"], "nothing of the making is left"
    granted, inode = await one.permissions(), made.st_ino
    await one.grant(NEW)
    await one.revoke(OLD)
    assert (await one.permissions(), one.at(NEW).lstat().st_ino) == (granted, inode)

    await one.revoke(NEW)
    _forge(one, NEW)
    assert await one.opens(NEW) == ["EPERM"]
    await one.revoke(NEW)
    assert await one.permissions() == revoked, "what we allowed is gone without a trace"
    assert await one.opens(DeviceNode("/dev/zero", "mem", 1, 5), DeviceNode("/dev/full", "mem", 1, 7)) == ["open"] * 2
    return {"cgroup": "v2" if not any("*" in p for p in granted) else "v1"}


def _forge(one: Desk, node: DeviceNode) -> None:
    """What a tenant with CAP_MKNOD can do: runc lets every container make every node."""
    one.at(node).parent.mkdir(parents=True, exist_ok=True)
    os.mknod(one.at(node), stat.S_IFCHR | 0o666, os.makedev(node.major, node.minor))
    one.at(node).chmod(0o666)


async def _attacked(one: Desk, directory: Path) -> None:
    """The tenant is root in its container and has put something else where the node is to be."""
    outside = directory / "outside" / "002"
    outside.mkdir(parents=True)
    bus, above = BUS, f"{BUS}/002"
    attacks = {
        "a link out of /dev": f"ln -s {outside} {above}",
        "a link to the host's directory": f"ln -s /proc/1/root{above} {above}",
        "a link above": f"rm -rf {bus}; ln -s {outside.parent} {bus}",
        "a link for a node": f"mkdir -p {above}; ln -s {outside}/006 {NEW.path}",
        "a file for a node": f"mkdir -p {above}; echo mine >{NEW.path}",
        "a file for a directory": f"echo mine >{above}",
    }
    await one.revoke(NEW)
    before = await one.permissions()
    for name, script in attacks.items():
        await one.run("sh", "-ec", f"rm -rf {bus}; mkdir {bus}; {script}", user=0)
        with pytest.raises(AgentError) as refusal:
            await one.grant(NEW)
        assert refusal.value.reason is Reason.NOT_SUPPORTED, name
        assert refusal.value.hint, name
        await one.revoke(NEW)
        assert await one.permissions() == before, name
        assert not list(outside.iterdir()), name
        assert stat.S_ISCHR(os.lstat(NEW.path).st_mode), f"{name}: the host's own node is touched"
    await one.run("sh", "-ec", f"rm -rf {bus}", user=0)
    await _mounted_over(one, directory)


async def _mounted_over(one: Desk, directory: Path) -> None:
    """Something is mounted below /dev or on it, as a volume or a tenant with CAP_SYS_ADMIN does it."""
    below, above = f"{BUS}/002", f"/proc/{one.container.pid}/root"
    enter = ("nsenter", "--mount", "--target", str(one.container.pid), "sh", "-ec")
    for target, kind in ((below, "tmpfs"), ("/dev", "tmpfs"), ("/dev", "nodev")):
        options = "-o nodev" if kind == "nodev" else ""
        await _ran(*enter, f"mkdir -p {target}; mount -t tmpfs {options} over {target}; mkdir -p {below}")
        own_tmpfs = target == "/dev" and kind == "tmpfs"
        if own_tmpfs:  # its own /dev, made anew by itself: the node is its own affair and harmless
            await one.grant(NEW)
            await one.revoke(NEW)
        else:
            with pytest.raises(AgentError) as refusal:
                await one.grant(NEW)
            assert refusal.value.reason is Reason.NOT_SUPPORTED
        assert not os.listdir(f"{above}{below}")
        await _ran(*enter, f"umount {target}")
    # The host's own devtmpfs: the kernel's nodes are there already, and are not ours to remove.
    devtmpfs = f"mkdir -p {BUS}; mount -t devtmpfs devtmpfs /tmp; mount --bind {BUS.replace('/dev', '/tmp')} {BUS}; umount /tmp"
    await _ran(*enter, devtmpfs)
    await one.grant(NEW)
    assert await one.opens(NEW) == ["open"]
    await one.revoke(NEW)
    assert Path(NEW.path).exists()
    assert await one.opens(NEW) == ["EPERM"]
    await _ran(*enter, f"umount {BUS}")


async def _ran(*argv: str) -> None:
    process = await asyncio.create_subprocess_exec(*argv)
    assert await process.wait() == 0, argv


async def _storm(one: Desk) -> None:
    """Many replugs while the tenant exchanges the directory under our hands; permissions do not grow."""
    before, tmp = await one.permissions(), one.dev.parent / "tmp"
    steps = f"mkdir -p {BUS}/002; mv {BUS}/002 {BUS}/x; ln -s /tmp {BUS}/002; rm -rf {BUS}/002 {BUS}/x"
    race = f"mkdir -p {BUS}; touch /tmp/racing; while [ ! -e /tmp/enough ]; do {steps}; done 2>/dev/null"
    racing = asyncio.create_task(one.run("sh", "-c", race, user=0))
    try:
        while not (tmp / "racing").exists():
            assert not racing.done(), racing.result()
            await asyncio.sleep(0.01)
        for _ in range(CYCLES):
            with contextlib.suppress(AgentError):
                await one.grant(NEW)
            await one.revoke(NEW)
        assert await one.permissions() == before
    finally:
        (tmp / "enough").touch()
        await racing
    found = sorted(os.listdir(tmp))
    assert found == ["enough", "racing"], f"a link has led out of /dev: {found}"


def main() -> int:
    directory = Path(tempfile.mkdtemp(prefix="/tmp/na-replug-"))
    try:
        print(json.dumps(asyncio.run(replug(directory))))
    finally:
        shutil.rmtree(directory)
    return 0


if __name__ == "__main__":
    sys.exit(main())
