"""Recording against the running kernel: its events are heard, and this machine's own devices leave no serial number."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from nodeagent.devices import recorder, recording, sysfs
from nodeagent.host import HostRoot

NULL = Path("/sys/class/mem/null/uevent")
"""Writing here makes the kernel repeat the event of /dev/null (Documentation/ABI/testing/sysfs-uevent): harmless, and no USB."""

pytestmark = pytest.mark.root


@pytest.mark.skipif(not os.access(NULL, os.W_OK), reason="/sys is read-only here: no kernel event can be provoked")
def test_events_are_heard_until_the_time_is_over() -> None:
    ours, others = recorder.KernelEvents(re.compile("/mem/null")), recorder.KernelEvents()
    NULL.write_text("change")
    heard = ours.heard(60)
    event = next(heard)
    assert (event.action, event.devpath) == ("change", "/devices/virtual/mem/null") and 0 <= event.at_s < 60
    NULL.write_text("change")
    assert next(heard).at_s >= event.at_s
    assert [*ours.heard(0)] == []
    assert [*others.heard(0.01)] == []


def test_this_machine(tmp_path: Path) -> None:
    host = HostRoot()
    made = recorder.Recorder(host)
    tree = made.tree()
    recording.materialise(tmp_path, tree)
    here = sysfs.read_devices(host, sysfs.usb_paths(host), {})
    there = sysfs.read_devices(HostRoot(tmp_path), sysfs.usb_paths(HostRoot(tmp_path)), {})
    assert [(u.port, u.types, u.nodes) for u in there] == [(u.port, u.types, u.nodes) for u in here]
    assert all(not u.serial or u.serial.startswith("SERIAL-") for u in there)
