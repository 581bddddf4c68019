"""Hotplug with 256 devices: from the kernel's event to the kubelet's list, a storm of 10,000 events, and the memory it takes.

This machine may have no USB. Then the devices are directories as sysfs has them, and the events are the kernel's own, of a device
that can be made to repeat its event; all between them and the kubelet's stream is the real daemon in a process of its own.
"""

from __future__ import annotations

import asyncio
import os
import re
import statistics
import sys
import time
from pathlib import Path

from bench.node import Node, node
from bench.result import Result, alone, percentile
from nodeagent import daemon
from nodeagent.devices import udev
from tests import machines

BELL = Path("/sys/class/mem/null/uevent")
"""Writing here makes the kernel repeat the event of /dev/null (Documentation/ABI/testing/sysfs-uevent)."""
DEVICES = 256
PLUGS = 200
STORM = 10_000
RESOURCE = "opencdi.io/ukey"
RULES = [{"name": "keys", "match": {"class": "ukey"}, "give": "node"}]


async def measure() -> list[Result]:
    memory = []
    for _ in range(5):
        memory.append(await _rss_mib(DEVICES) - await _rss_mib(0))
    async with node(0, rules=RULES, program=(sys.executable, "-m", "bench.hotplug")) as made:
        devices = Devices(made, DEVICES)
        await made.start(RESOURCE)
        latencies = await _latencies(made, devices)
        cpu_s = await _storm(made, devices)
    bell = "kernel events of a stand-in device, sysfs of 256 keys as files"
    latency = (
        f"{PLUGS} unplugs and plugs with 256 devices, debounce included, median {statistics.median(latencies):.0f} ms"
    )
    storm = f"CPU of the daemon for {STORM} events, each after a plug or an unplug"
    rss = "VmRSS of the daemon with 256 devices, registered, less that of one without any"
    return [
        alone("hotplug_to_list_p99_ms", "ms", [percentile(latencies, 0.99)], f"p99 of {latency}; {bell}"),
        alone("storm_10k_cpu_s", "s", [cpu_s], f"{storm}; {bell}"),
        alone("inventory_rss_mib", "MiB", memory, rss),
    ]


class Devices:
    """`count` security keys, one at each port of as many buses as it takes; one of them is plugged and unplugged."""

    def __init__(self, made: Node, count: int) -> None:
        self.host = made.host
        (self.host / "sys/bus/usb/devices").mkdir(parents=True, exist_ok=True)
        key = {d: f for d, f in machines.tree("yubikey").items() if "/1-3" in d}
        for number in range(count):
            bus, port = divmod(number, 60)
            tree = {
                d.replace("/usb1/", f"/usb{bus + 1}/").replace("1-3", f"{bus + 1}-{port + 1}"): f
                for d, f in key.items()
            }
            machines.materialise(self.host, tree)
        self._links = self.host / "sys/bus/usb/devices"
        self._link = self._links / "1-1"
        self._target = os.readlink(self._link) if count else ""

    def toggle(self) -> None:
        """Unplug it, or plug it in again."""
        if self._link.is_symlink():
            self._link.unlink()
        else:
            self._link.symlink_to(self._target)


async def _latencies(made: Node, devices: Devices) -> list[float]:
    """Milliseconds from the event to the list that has it."""
    samples = []
    endpoint = made.kubelet.endpoints[RESOURCE]
    for number in range(PLUGS):
        before = len(endpoint.devices)
        devices.toggle()
        began = time.perf_counter()
        BELL.write_text("change")
        await made.kubelet.until(lambda before=before: len(endpoint.devices) != before)  # type: ignore[misc]
        samples.append((time.perf_counter() - began) * 1000)
        await asyncio.sleep(0.02 + number % 7 * 0.01)
    return samples


async def _storm(made: Node, devices: Devices) -> float:
    """CPU seconds of the daemon from the first event until its list is right again."""
    assert made.process is not None
    before = _cpu_s(made.process.pid)
    for number in range(STORM):
        devices.toggle()
        BELL.write_text("change")
        if number % 100 == 0:
            await asyncio.sleep(0)
    await asyncio.sleep(2)
    assert len(made.kubelet.allocatable(RESOURCE)) == DEVICES
    return _cpu_s(made.process.pid) - before


async def _rss_mib(count: int) -> float:
    async with node(0, rules=RULES, program=(sys.executable, "-m", "bench.hotplug")) as made:
        Devices(made, count)
        await made.start(RESOURCE if count else "")
        assert made.process is not None
        await asyncio.sleep(1)
        text = Path(f"/proc/{made.process.pid}/status").read_text()
        return int(text.partition("VmRSS:")[2].split()[0]) / 1024


def _cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


if __name__ == "__main__":  # the daemon, which takes the bell for a USB device
    udev.BELOW_USB = re.compile("/mem/null")
    udev.UdevHotplug.__init__.__defaults__ = (udev.BELOW_USB,)  # type: ignore[misc]
    sys.exit(daemon.main(Path(sys.argv[-1]), explicit=True))
