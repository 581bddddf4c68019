"""The unmodified daemon on a recording that was given out: it offers its devices, and follows the events that are played."""

from pathlib import Path

import pytest

from nodeagent.devices import recording
from nodeagent.devices.recording import Uevent
from tests import machines
from tests.daemon.house import House

pytestmark = pytest.mark.root
STICKS = "opencdi.io/usb-storage"
STICK = "/devices/pci0000:00/0000:00:14.0/usb1/1-1/1-1.1"
RULES = [{"name": "sticks", "match": {"class": "storage"}, "give": "node"}]


async def test_the_daemon_runs_on_a_recording_and_follows_its_events(short_tmp: Path) -> None:
    house = House(short_tmp, rules=RULES, simulated=[], resync=0.05)
    tree = machines.tree("hub-tree")
    recording.materialise(house.host, tree)
    async with house.kubelet, house.cri, house.life():
        await house.kubelet.until(lambda: len(house.kubelet.allocatable(STICKS)) == 2)
        recording.play(house.host, Uevent(at_s=0, action="remove", devpath=STICK))
        await house.kubelet.until(lambda: len(house.kubelet.allocatable(STICKS)) == 1)
        for directory, files in sorted(tree.items()):
            if f"{directory}/".startswith(f"/sys{STICK}/"):
                recording.play(
                    house.host, Uevent(at_s=1, action="add", devpath=directory.removeprefix("/sys"), files=files)
                )
        await house.kubelet.until(lambda: len(house.kubelet.allocatable(STICKS)) == 2)
        rows = house.view.document("devices").devices
        assert sorted((row.class_, row.port) for row in rows) == [
            ("printer", "1-1.2.3.4"),
            ("storage", "1-1.1"),
            ("storage", "1-1.2.3.1"),
            ("ukey", "1-1.2.1"),
            ("usb", "1-1.4"),
        ]
