"""The host's udevd: a rules file below /run, what it is told, and what it has noted about a device.

Everything goes through files of the host, so that a pod needs no udev of its own. `/run` and `/sys` stay writable below a
read-only mount of the host's root, because such a mount is not recursive (Kubernetes, `recursiveReadOnly`).

udevd reads its rules again when it is told to (`udevadm control --reload`) and, when it is not, on the first event that
comes at least 3 s after it last compared the directories (manager_reload in systemd 219 to 258). So the command only saves
time, and where it cannot be run nothing is lost but those seconds.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Literal

from nodeagent.devices import sysfs
from nodeagent.documents import Problem
from nodeagent.host import Finished, HostRoot, run, write_atomically
from nodeagent.model import DeviceNode, UsbDevice

log = logging.getLogger(__name__)

RUN = "/run/udev"
RULES = f"{RUN}/rules.d"
"""Runtime rules: gone after a reboot, read in one order with those of /etc and /usr/lib, sorted by file name (udev(7))."""
CONTROL = f"{RUN}/control"
MAX_RULES_BYTES = 256 << 10
MAX_NOTED_BYTES = 64 << 10
"""A USB device's entry has about 2,000 bytes."""
RELOAD_TIMEOUT_S = 10.0
OWN_LOOK_S = 3.2
"""udevd compares its rules with the files at most every 3 s."""

Run = Callable[[Sequence[str]], Awaitable[Finished]]


async def _run(argv: Sequence[str]) -> Finished:
    return await run(argv, timeout_s=RELOAD_TIMEOUT_S)


class Udevd:
    """All calls but `reload` read and write a few small files of the host: call them in a thread."""

    def __init__(self, host: HostRoot, *, run: Run = _run) -> None:
        self._host = host
        self._run = run

    def present(self) -> bool:
        """A udevd runs on this host, and this is no captured tree: its events would go to another kernel."""
        return self._host.path(CONTROL).exists() and self._host.boot_id() == HostRoot().boot_id() != ""

    def out_of_reach(self) -> Problem | None:
        """Why no rules can be given to it; None when they can."""
        directory = self._host.path(RUN)
        if os.access(directory, os.W_OK):
            return None
        return Problem(
            message=f"{directory} cannot be written, so the host's daemons are not kept off the devices that are given away",
            hint=f"mount the host's {RUN} into the pod, writable, at {directory}; or set devices.claim to false",
        )

    def write(self, name: str, text: str) -> bool:
        """Put `text` into the rules file `name`, or delete it when there is no text. Returns whether anything changed.

        Raises OSError; ValueError for more than MAX_RULES_BYTES.
        """
        directory = self._host.path(RULES)
        path = directory / name
        for leftover in directory.glob(f".{name}.*.tmp"):  # of an agent that was killed while it wrote
            leftover.unlink(missing_ok=True)
        data = text.encode()
        if len(data) > MAX_RULES_BYTES:
            raise ValueError(f"{name}: {len(data)} bytes of rules")
        try:
            if path.read_bytes() == data:
                return False
        except FileNotFoundError:
            if not data:
                return False
        if data:
            directory.mkdir(mode=0o755, exist_ok=True)
            write_atomically(path, data, 0o644)
        else:
            path.unlink(missing_ok=True)
        return True

    async def reload(self) -> bool:
        """Tell udevd to read its rules now. False when it could not be told; it looks by itself within OWN_LOOK_S."""
        argv = ["udevadm", "control", "--reload"]
        if str(self._host.root) != "/":
            # The host's own udevadm: the protocol of the control socket belongs to one version of systemd. Not by chroot,
            # where udevadm does nothing and says so with code 0 (running_in_chroot).
            argv = ["nsenter", f"--mount={self._host.path('/proc/1/ns/mnt')}", "--", *argv]
        try:
            done = await self._run(argv)
        except OSError as error:
            log.info("udevd cannot be told to read its rules (%s); it looks by itself within 3 s", error)
            return False
        if done.code != 0:
            log.info("udevd cannot be told to read its rules (%s); it looks by itself within 3 s", done.stderr.strip())
        return done.code == 0

    def trigger(self, usb: UsbDevice, action: Literal["add", "change"]) -> int:
        """Make the kernel say once more what it said of the device and everything below it, parents first.

        This is what `udevadm trigger` does (Documentation/ABI/testing/sysfs-uevent). Returns how many events that made.
        """
        events = 0
        for directory in _devices_below(self._host.path(usb.sysfs)):
            with contextlib.suppress(OSError), open(f"{directory}/uevent", "wb", buffering=0) as file:
                events += bool(file.write(action.encode()))
        return events

    def properties(self, node: DeviceNode) -> dict[str, str]:
        """What udevd has noted about the device of a node (its database below /run/udev/data); empty when nothing."""
        try:
            with open(self._host.path(f"{RUN}/data/{node.kind}{node.major}:{node.minor}"), "rb") as file:
                text = file.read(MAX_NOTED_BYTES).decode(errors="replace")
        except OSError:
            return {}
        lines = (line[2:].partition("=") for line in text.splitlines() if line.startswith("E:"))
        return {key: value for key, _, value in lines}


def _devices_below(top: Path) -> list[str]:
    """The directories of this device and of what its drivers made, not those of devices plugged into it."""
    found: list[str] = []
    stack = [(str(top), 0)]
    looked = 0
    while stack and looked < sysfs.MAX_DIRECTORIES:
        directory, depth = stack.pop()
        looked += 1
        try:
            with os.scandir(directory) as entries:
                names = {entry.name: entry.is_dir(follow_symlinks=False) for entry in entries}
        except OSError:
            continue
        if depth and "idVendor" in names:
            continue
        if {"uevent", "subsystem"} <= names.keys():
            found.append(directory)
        if depth < sysfs.MAX_DEPTH:
            wanted = (n for n, is_directory in names.items() if is_directory and n not in sysfs.BUSY)
            stack.extend(
                (f"{directory}/{n}", depth + 1) for n in sorted(wanted, reverse=True) if not n.startswith("ep_")
            )
    return found
