"""The rules that claims write, read by the real udev of this machine. Its `test` does what udevd does with an event, and
runs nothing. As there may be no USB here, the lines that name a port are made to name a device that every machine has."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from nodeagent.devices.claims import KEEP_OFF, Rule, rules, rules_file

pytestmark = pytest.mark.root

OWNER = "0123abcd"
FILE = rules_file(OWNER)
SCRIPT = f"""
    mount -t tmpfs tmpfs /run && mkdir -p /run/udev/rules.d && touch /run/udev/control
    cat >/run/udev/rules.d/{FILE}
    exec udevadm --debug test --action=add "$0" 2>&1
"""


def udevadm_test(sysfs: str, text: str) -> str:
    """What udev says about one device under these rules and those of the system, in a /run of its own."""
    argv = ["unshare", "--mount", "sh", "-ec", SCRIPT, sysfs]
    return subprocess.run(argv, input=text, capture_output=True, text=True, check=True, timeout=60).stdout


def properties(said: str) -> dict[str, str]:
    return dict(re.findall(r"^([A-Z_]+)=(.*)$", said, re.MULTILINE))


def naming(kernel: str, subsystem: str) -> str:
    """The rules of one claim, for a device that is here."""
    line = 'SUBSYSTEMS=="usb", KERNELS=="2-1", ATTRS{idVendor}=="0781", ATTRS{idProduct}=="5581"'
    text = rules([Rule("2-1", 0x0781, 0x5581, drivers=True)], OWNER)
    assert line in text
    return text.replace(line, f'SUBSYSTEMS=="{subsystem}", KERNELS=="{kernel}"')


def complaints(said: str) -> list[str]:
    return [line for line in said.splitlines() if FILE in line and "Reading rules file" not in line and ":" in line]


def test_udev_reads_every_line_without_a_complaint() -> None:
    said = udevadm_test("/sys/class/mem/null", rules([Rule("2-1", 0x0781, 0x5581), Rule("1-1.4", 1, 2, True)], OWNER))
    assert f"Reading rules file: /run/udev/rules.d/{FILE}" in said
    assert complaints(said) == []
    assert "NODEAGENT_CLAIM" not in properties(said)
    said = udevadm_test("/sys/class/mem/null", 'ENV{SYSTEMD_READY}-="0"\n')
    assert complaints(said), "this test would not see a complaint"


def test_a_claimed_device_carries_all_of_it_to_the_end_of_the_rules() -> None:
    said = properties(udevadm_test("/sys/class/mem/null", naming("null", "mem")))
    assert said["NODEAGENT_CLAIM"] == OWNER
    assert said["NODEAGENT_DRIVERS"] == "1"
    assert {k.property: said.get(k.property) for k in KEEP_OFF} == {k.property: k.value for k in KEEP_OFF}


@pytest.fixture
def loop(tmp_path: Path) -> Iterator[str]:
    """A loop device with a file system, by its path in sysfs: 60-persistent-storage.rules probes it."""
    image = tmp_path / "image"
    image.touch()
    os.truncate(image, 8 << 20)
    subprocess.run(["mke2fs", "-q", "-t", "ext4", "-L", "by-label", str(image)], check=True)
    attach = ["losetup", "--find", "--show", str(image)]
    node = subprocess.run(attach, check=True, capture_output=True, text=True).stdout.strip()
    try:
        yield f"/sys/class/block/{Path(node).name}"
    finally:
        subprocess.run(["losetup", "--detach", node], check=False)


def test_a_claimed_disk_is_not_probed_and_is_no_device_of_systemd(loop: str) -> None:
    free = properties(udevadm_test(loop, ""))
    assert free["ID_FS_LABEL"] == "by-label"
    assert free.get("SYSTEMD_READY") != "0"
    claimed = properties(udevadm_test(loop, naming(Path(loop).name, "block")))
    assert not [key for key in claimed if key.startswith("ID_FS_")]
    assert claimed["SYSTEMD_READY"] == "0"
