"""A fake udevd over a tree: it knows the one kind of line that claims are, and notes what they set."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Literal

from nodeagent.devices.udevd import CONTROL, RULES, RUN, Udevd
from nodeagent.host import Finished, HostRoot
from nodeagent.model import UsbDevice

LINE = re.compile(r'KERNELS=="([^"]+)", ATTRS\{idVendor\}=="(\w+)", ATTRS\{idProduct\}=="(\w+)", (.*)')


class FakeUdevd(Udevd):
    """`heard` are the events it got. It reads its rules when told to, or at the `looks_at`-th event without having been told."""

    def __init__(self, host: HostRoot, *, told: bool = True, looks_at: int = 1 << 30) -> None:
        super().__init__(host, run=self._reload)
        self.heard: list[tuple[str, str]] = []
        self.reloads = 0
        self._host_root, self._told, self._looks_at = host, told, looks_at
        self._rules: list[tuple[str, str, str, dict[str, str]]] = []
        host.path(RUN).mkdir(parents=True, exist_ok=True)
        host.path(CONTROL).touch()
        boot = host.path("/proc/sys/kernel/random/boot_id")
        boot.parent.mkdir(parents=True, exist_ok=True)
        boot.write_text(HostRoot().boot_id())

    async def _reload(self, argv: Sequence[str]) -> Finished:
        if not self._told:
            raise FileNotFoundError("nsenter")
        assert argv[-3:] == ["udevadm", "control", "--reload"]
        self.reloads += 1
        self._read()
        return Finished(0, "", "")

    def _read(self) -> None:
        self._rules = []
        for path in sorted(self._host_root.path(RULES).glob("*.rules")):
            for match in LINE.finditer(path.read_text()):
                marks = dict(re.findall(r'ENV\{(\w+)\}="(\w+)"', match[4]))
                self._rules.append((match[1], match[2], match[3], marks))

    def trigger(self, usb: UsbDevice, action: Literal["add", "change"]) -> int:
        events = super().trigger(usb, action)
        self.heard.append((usb.port, action))
        if len(self.heard) >= self._looks_at:
            self._read()
        self.note(usb)
        return events

    def note(self, usb: UsbDevice) -> None:
        """What it does with any event of the device, one of plugging in too."""
        node = next(n for n in usb.nodes if n.subsystem == "usb" and n.interface < 0)
        marks: dict[str, str] = {"ID_BUS": "usb"}
        for port, vendor, product, env in self._rules:
            if (port, vendor, product) == (usb.port, f"{usb.vendor:04x}", f"{usb.product:04x}"):
                marks |= env
        place = self._host_root.path(f"{RUN}/data/c{node.major}:{node.minor}")
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text("I:1\n" + "".join(f"E:{k}={v}\n" for k, v in marks.items()) + "G:seat\n")
