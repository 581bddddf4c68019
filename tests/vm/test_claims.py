"""Claims, unbinding and clean-up against the real udevd, the real drivers and devices that this kernel enumerates."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
import pytest_asyncio

from nodeagent.devices.claims import KEEP_OFF
from tests.vm import gadgets as usb
from tests.vm import lab

pytestmark = [pytest.mark.root, pytest.mark.vm, pytest.mark.asyncio(loop_scope="module")]

IMAGE = "/tmp/claimed.img"
STICK, PRINTER = usb.stick(IMAGE, "claimed", serial="CLAIM1"), usb.printer("CLAIM2")
RULES = "/run/udev/rules.d/59-nodeagent-0123abcd.rules"


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def made(vm: lab.Vm, gadgets: usb.Bench) -> usb.Bench:
    await vm.sh(f"truncate -s 8M {IMAGE} && mke2fs -q -L claimed {IMAGE}")
    for gadget in (STICK, PRINTER):
        await gadgets.add(gadget)
    return gadgets


@pytest_asyncio.fixture(loop_scope="module")
async def stick(vm: lab.Vm, made: usb.Bench) -> AsyncIterator[str]:
    """Plugged in, its file system known to udev, not claimed; the port."""
    await step(vm, "claim", "node")
    port = await made.port(await made.plug(STICK))
    await until(vm, "test -e /dev/disk/by-label/claimed")
    yield port
    await vm.sh("umount -q /mnt || true")
    await step(vm, "claim", "node")
    if STICK in made.plugged:
        await made.unplug(STICK)


@pytest_asyncio.fixture(loop_scope="module")
async def printer(vm: lab.Vm, made: usb.Bench) -> AsyncIterator[str]:
    port = await made.port(await made.plug(PRINTER))
    await until(vm, "test -e /dev/usb/lp0")
    yield port
    await step(vm, "claim", "node")
    await made.unplug(PRINTER)


async def step(vm: lab.Vm, *words: str) -> Any:
    return json.loads(await vm.sh(f"python3 /repo/tests/vm/guest/claims.py {' '.join(words)}"))


async def until(vm: lab.Vm, test: str) -> None:
    """Until a shell command succeeds in the guest."""
    for _ in range(100):
        if not (await vm.run(["sh", "-c", test], check=False)).code:
            return
        await asyncio.sleep(0.1)
    pytest.fail(f"never came true in the guest: {test}")


async def properties(vm: lab.Vm, device: str) -> dict[str, str]:
    await vm.sh("udevadm settle --timeout=20")
    return dict(re.findall(r"^E: ([A-Z_]+)=(.*)$", await vm.sh(f"udevadm info {device}"), re.MULTILINE))


WANTED = {k.property: k.value for k in KEEP_OFF}


def kept_off(found: dict[str, str]) -> dict[str, str | None]:
    return {name: found.get(name) for name in WANTED}


async def test_a_claim_reaches_the_device_and_everything_below_it(
    vm: lab.Vm, stick: str, measured: Callable[[str], None]
) -> None:
    free = await properties(vm, "/dev/sda")
    assert free["ID_FS_LABEL"] == "claimed"
    problems, took_s = await step(vm, "claim", "node", stick)
    assert problems == []
    measured(f"a claim is in udevd's database after {took_s:.2f} s")
    for device in (f"/sys/bus/usb/devices/{stick}", f"/sys/bus/usb/devices/{stick}:1.0", "/dev/sda", "/dev/sg0"):
        assert kept_off(await properties(vm, device)) == WANTED, device
    claimed = await properties(vm, "/dev/sda")
    assert "ID_FS_LABEL" not in claimed
    assert (await vm.run(["test", "-e", "/dev/disk/by-label/claimed"], check=False)).code, "udev took the link away"
    assert (await vm.run(["grep", "-r", "CLAIM1", RULES], check=False)).code == 1, "no serial number in the rules"
    assert (await step(vm, "claim", "node"))[0] == []
    free = await properties(vm, "/dev/sda")
    assert free["ID_FS_LABEL"] == "claimed"
    assert "NODEAGENT_CLAIM" not in free
    assert (await vm.run(["test", "-e", RULES], check=False)).code, "the rules are gone with the last claim"


async def test_the_first_event_of_a_replug_is_claimed_already(vm: lab.Vm, made: usb.Bench, stick: str) -> None:
    await step(vm, "claim", "node", stick)
    await made.unplug(STICK)
    await until(vm, "! test -e /dev/sda")
    await vm.sh("udevadm settle; udevadm monitor --udev --property >/tmp/seen & echo $! >/tmp/monitor; sleep 0.5")
    controller = int(
        await vm.sh(f"basename $(dirname $(readlink -f /sys/bus/usb/devices/usb{stick[0]}))  | cut -d. -f2")
    )
    await made.plug(STICK, controller)
    await until(vm, "test -e /dev/sda")
    await vm.sh("udevadm settle --timeout=20; kill $(cat /tmp/monitor)")
    seen = (await vm.sh("cat /tmp/seen")).split("\n\n")
    disk = [event for event in seen if "DEVNAME=/dev/sda\n" in event and "ACTION=add" in event]
    assert disk, seen
    assert all("NODEAGENT_CLAIM=0123abcd" in event and "ID_FS_LABEL" not in event for event in disk)


async def test_udevd_reads_its_rules_by_itself_when_nobody_can_tell_it(
    vm: lab.Vm, stick: str, measured: Callable[[str], None]
) -> None:
    problems, took_s = await step(vm, "untold", "node", stick)
    assert problems == []
    measured(f"a claim of which udevd was not told is in its database after {took_s:.2f} s")
    assert kept_off(await properties(vm, "/dev/sda")) == WANTED


POD = """
    mkdir -p /host
    unshare --mount sh -ec '
        mount --rbind / /host && mount -o remount,bind,ro /host
        mount -t tmpfs none /run
        ! touch /host/tmp-file 2>/dev/null
        HOST_ROOT=/host python3 /repo/tests/vm/guest/claims.py "$@"
    ' pod """
"""A privileged pod: the host's root read-only at /host, what is mounted below that still writable, a /run of its own."""


async def test_from_a_pod(vm: lab.Vm, stick: str) -> None:
    problems, _ = json.loads(await vm.sh(f"{POD} claim node {stick}"))
    assert problems == []
    assert kept_off(await properties(vm, "/dev/sda")) == WANTED
    await vm.sh("mount /dev/sda /mnt")
    (conflict,) = json.loads(await vm.sh(f"{POD} conflicts {stick}"))
    assert conflict["who"] == "/mnt"
    (report,), _ = json.loads(await vm.sh(f"{POD} clean node {stick}"))
    assert report == ["detached /mnt; flushed /dev/sda", ""]
    assert not await vm.sh("grep /dev/sda /proc/1/mounts || true")
    assert json.loads(await vm.sh(f"{POD} clean usb {stick}"))[0] == [[f"reset port {stick}", ""]]
    assert json.loads(await vm.sh(f"{POD} claim node"))[0] == []
    assert (await properties(vm, "/dev/sda"))["ID_FS_LABEL"] == "claimed"


async def test_a_mounted_stick_is_not_claimed(vm: lab.Vm, stick: str) -> None:
    await vm.sh("mount /dev/sda /mnt")
    (problem,), _ = await step(vm, "claim", "node", stick)
    assert problem["message"] == f"{stick} (/dev/sda) is mounted by the host at /mnt"
    assert "NODEAGENT_CLAIM" not in await properties(vm, "/dev/sda")
    (conflict,) = await step(vm, "conflicts", stick)
    assert (conflict["kind"], conflict["remedy"]) == ("mount", "umount /mnt")
    await vm.sh(conflict["remedy"])
    assert (await step(vm, "claim", "node", stick))[0] == []


async def test_raw_usb_takes_the_driver_away_and_release_brings_it_back(vm: lab.Vm, stick: str) -> None:
    assert (await step(vm, "claim", "usb", stick))[0] == []
    driver = f"/sys/bus/usb/devices/{stick}:1.0/driver"
    assert (await vm.run(["test", "-e", driver], check=False)).code
    assert (await vm.run(["test", "-e", "/dev/sda"], check=False)).code
    assert (await step(vm, "claim", "node"))[0] == []
    assert (await vm.sh(f"basename $(readlink {driver})")).strip() == "usb-storage"
    await until(vm, "test -e /dev/disk/by-label/claimed")


async def test_a_stick_is_flushed_and_a_leftover_mount_detached(vm: lab.Vm, stick: str) -> None:
    await vm.sh("mount /dev/sda /mnt && echo something >/mnt/file")
    (report,), _ = await step(vm, "clean", "node", stick)
    assert report == ["detached /mnt; flushed /dev/sda", ""]
    assert not await vm.sh("grep /dev/sda /proc/mounts || true")


async def test_a_port_reset_is_a_reset(vm: lab.Vm, stick: str, measured: Callable[[str], None]) -> None:
    before = int(await vm.sh("dmesg | grep -c 'reset high-speed USB device' || true"))
    (report,), took_s = await step(vm, "clean", "usb", stick)
    assert report == [f"reset port {stick}", ""]
    measured(f"a port reset took {took_s:.2f} s")
    assert int(await vm.sh("dmesg | grep -c 'reset high-speed USB device'")) == before + 1
    assert (await vm.sh(f"cat /sys/bus/usb/devices/{stick}/serial")).strip() == "CLAIM1"
    assert len(await vm.sh("dd if=/dev/sda bs=4096 count=1 iflag=direct status=none | base64")) > 4096


async def test_a_program_that_has_the_printer_open(vm: lab.Vm, printer: str) -> None:
    await vm.sh("sleep 60 >/dev/usb/lp0 & echo $! >/tmp/holder")
    pid = (await vm.sh("cat /tmp/holder")).strip()
    (conflict,) = await step(vm, "conflicts", printer)
    assert (conflict["kind"], conflict["who"], conflict["remedy"]) == ("process", f"sleep (pid {pid})", f"kill {pid}")
    await vm.sh(conflict["remedy"])
    await until(vm, f"! test -e /proc/{pid}/fd/1")
    assert await step(vm, "conflicts", printer) == []
    assert (await step(vm, "claim", "service", printer))[0] == []
    assert (await vm.sh(f"basename $(readlink /sys/bus/usb/devices/{printer}:1.0/driver)")).strip() == "usblp"
