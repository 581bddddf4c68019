"""Claiming devices from the host: while a device is offered, the host's daemons and drivers keep off it.

What is claimed follows from what is offered and what is plugged in; whether udevd has understood is read from its own
database, so a killed agent leaves nothing that the next one would not find. One rules file says all of it (`rules`). It
names ports and USB ids, never a serial number.

The file is read between `50-udev-default` and everything that would act on a device: later rules ask for what it sets. So
one file is enough; nothing has to be taken back that a later rule gave (a TAG or ENV cannot be made final, udev(7)).
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import re
from collections.abc import Awaitable, Callable, Iterable, Mapping
from functools import partial

import msgspec

from nodeagent.devices import drivers
from nodeagent.devices.conflicts import Conflict, conflicts, node_uses
from nodeagent.devices.slow_calls import SlowCalls
from nodeagent.devices.udevd import OWN_LOOK_S, Udevd
from nodeagent.documents import Problem
from nodeagent.errors import AgentError
from nodeagent.host import HostRoot
from nodeagent.model import Device, Give, Offer

log = logging.getLogger(__name__)

MARK = "NODEAGENT_CLAIM"
"""The udev property that says whose a device is; its value is the owner, so that two agents of a node do not quarrel."""
SEAT = "seat-nodeagent"
DRIVERS_MARK = "NODEAGENT_DRIVERS"
"""Set where drivers have to be taken away, so that whoever gives the device back knows to let them find it again."""
MAX_CLAIMS = 1024
MAX_REMEMBERED = 64
"""Ports whose device was unplugged and keeps its rule, so that it is claimed from its first event when it comes back."""
PORT = re.compile(r"[0-9]{1,3}-[0-9]{1,3}(\.[0-9]{1,3}){0,6}")
"""A bus and at most seven tiers (USB 2.0, 4.1.1); no character that means something in a udev pattern."""
POLL_S = 0.1
LOOK_S = 300.0
"""Between two looks for programs of the host that use a claimed device: every process is looked at."""
UNBIND_TIMEOUT_S = 5.0


class KeepOff(msgspec.Struct, frozen=True):
    """One udev property, whom it keeps off, and where that is written."""

    property: str
    value: str
    whom: str
    source: str


KEEP_OFF = (
    KeepOff("ID_SEAT", SEAT, "local users and their sessions: node ACLs, input", "73-seat-late.rules, libinput"),
    KeepOff("SYSTEMD_READY", "0", "units that plugging in starts: ipp-usb, printer.target", "systemd.device(5)"),
    KeepOff("UDEV_DISABLE_PERSISTENT_STORAGE_RULES_FLAG", "1", "udev's SCSI probes", "60-persistent-storage.rules"),
    KeepOff("UDEV_DISABLE_PERSISTENT_STORAGE_BLKID_FLAG", "1", "udev's blkid, so LVM, md, btrfs", "69-lvm.rules"),
    KeepOff("UDISKS_IGNORE", "1", "desktops' lists of disks", "udisks(8)"),
    KeepOff("UDISKS_AUTO", "0", "automatic mounting", "udisks(8)"),
    KeepOff("ID_MM_DEVICE_IGNORE", "1", "ModemManager, whole devices", "ModemManager-tags.h"),
    KeepOff("ID_MM_PORT_IGNORE", "1", "ModemManager, single ports", "ModemManager-tags.h"),
    KeepOff("PCSCLITE_IGNORE", "1", "pcscd from 2.3.2 on, which looks at plugging in", "pcscd(8)"),
    KeepOff("PULSE_IGNORE", "1", "PulseAudio", "module-udev-detect.c"),
    KeepOff("ACP_IGNORE", "1", "PipeWire", "spa/plugins/alsa/alsa-udev.c"),
    KeepOff("MTP_NO_PROBE", "1", "mtp-probe, which opens vendor devices", "69-libmtp.rules"),
    KeepOff("NM_UNMANAGED", "1", "NetworkManager", "NetworkManager(8)"),
    KeepOff("ID_NET_MANAGED_BY", "nodeagent", "systemd-networkd from 255 on", "systemd-networkd.service(8)"),
)
"""What a claimed device and everything below it carries.

An ID_SEAT of a seat that does not exist is what takes a device from the local user: the udev builtin `uaccess` then finds no
session on that seat and clears the node's ACL, logind and compositors pass over it. Modes and groups of nodes stay, because
runc gives a container's node the mode and owner of the host's.

DM_UDEV_DISABLE_OTHER_RULES_FLAG is not set: udisks then passes over the event itself and goes on offering what it knew of a
disk (seen with 2.9.4). Not kept off by any property, so found by `conflicts`: pcscd before 2.3.2 (it can only leave out
readers by name, PCSCLITE_FILTER_IGNORE_READER_NAMES), the usb back end of a host's own cupsd, an ipp-usb that already runs
for another printer, fwupd. Nobody keeps the kernel's own console from a keyboard but unbinding usbhid.
"""


class Claim(msgspec.Struct, frozen=True, kw_only=True):
    """A device that belongs to the agent for now, and how it is given."""

    device: Device
    give: Give

    @property
    def rule(self) -> Rule:
        usb = self.device.usb
        return Rule(usb.port, usb.vendor, usb.product, drivers=drivers.has_needless(self.device.cls, self.give))


class Rule(msgspec.Struct, frozen=True, order=True):
    """What the rules file knows of a claim."""

    port: str
    vendor: int
    product: int
    drivers: bool = False
    """Its interfaces are taken from their kernel drivers."""

    def marks(self, owner: str) -> dict[str, str]:
        """The properties that are this device's own."""
        return {MARK: owner, **({DRIVERS_MARK: "1"} if self.drivers else {})}


def owner(state_dir: str) -> str:
    """Whose claims, or cgroups, these are: eight hexadecimal digits that follow from the state directory."""
    return hashlib.sha256(state_dir.encode()).hexdigest()[:8]


def rules_file(owner: str) -> str:
    """Its name; 59 comes after the defaults of udev and before whatever acts on a device."""
    return f"59-nodeagent-{owner}.rules"


def rules(claims: Iterable[Rule], owner: str) -> str:
    """The rules file; empty without claims. Rules of ports that are no kernel bus path are left out."""
    lines = [
        ", ".join(
            (
                f'SUBSYSTEMS=="usb", KERNELS=="{r.port}"',
                f'ATTRS{{idVendor}}=="{r.vendor:04x}", ATTRS{{idProduct}}=="{r.product:04x}"',
                *(f'ENV{{{key}}}="{value}"' for key, value in r.marks(owner).items()),
            )
        )
        for r in sorted(set(claims))
        if PORT.fullmatch(r.port)
    ][:MAX_CLAIMS]
    if not lines:
        return ""
    end = f"nodeagent_{owner}_end"
    return "\n".join(
        (
            "# Made by nodeagent while it gives these devices away; gone when it lets go of them.",
            f'ACTION=="remove", GOTO="{end}"',
            *lines,
            f'ENV{{{MARK}}}!="{owner}", GOTO="{end}"',
            *(f'ENV{{{k.property}}}="{k.value}"' for k in KEEP_OFF),
            f'LABEL="{end}"',
            "",
        )
    )


class Claims:
    """Keeps the host's rules, and the drivers of claimed devices, what they should be: `set` says what, `run` does it."""

    def __init__(
        self,
        host: HostRoot,
        owner: str,
        slow: SlowCalls,
        *,
        udevd: Udevd | None = None,
        sleep: Callable[[float], Awaitable[object]] = asyncio.sleep,
    ) -> None:
        self.problems: tuple[Problem, ...] = ()
        """What keeps claims from being whole, since the last time they were applied."""
        self._host, self._owner, self._slow, self._sleep = host, owner, slow, sleep
        self._udevd = udevd or Udevd(host)
        self._devices: dict[str, Device] = {}
        self._claims: dict[str, Claim] = {}
        self._remembered: dict[str, Rule] = {}
        self._changed = asyncio.Event()

    def set(self, offers: Iterable[Offer], devices: Mapping[str, Device]) -> None:
        """These are offered, and these are known (by id). Simulated and absent devices need no claim. Never waits."""
        self._devices = {i: d for i, d in devices.items() if d.present and d.usb.sysfs and not d.usb.simulated}
        wanted = (o for o in offers if o.device.id in self._devices)
        self._claims = {o.device.id: Claim(device=self._devices[o.device.id], give=o.give) for o in wanted}
        self._changed.set()

    async def run(self) -> None:
        """Until cancelled. What cannot be done, and who on the host uses a device all the same, is a problem, never an error."""
        while True:
            self._changed.clear()
            problems = await self.apply()
            users = await asyncio.to_thread(conflicts, self._host, tuple(c.device for c in self._claims.values()))
            known = {p.message for p in problems}
            self.problems = (*problems, *(c.problem for c in users if c.problem.message not in known))
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(LOOK_S):
                    await self._changed.wait()

    async def apply(self) -> list[Problem]:
        """Bring the host up to date with the last `set`, and say what is in the way."""
        claims, devices = dict(self._claims), dict(self._devices)
        if not await asyncio.to_thread(self._udevd.present):
            return []  # without udevd no daemon of the host hears of a device
        in_use = await asyncio.to_thread(self._in_use, claims)
        for conflict in in_use:
            claims.pop(conflict.device_id, None)
        problems = [c.problem for c in in_use]
        refusal = await asyncio.to_thread(self._udevd.out_of_reach)
        if refusal is not None:
            return [*problems, refusal]
        text = rules(self._kept(claims, devices), self._owner)
        try:
            changed = await asyncio.to_thread(self._udevd.write, rules_file(self._owner), text)
        except (OSError, ValueError) as error:
            return [*problems, Problem(message=f"the rules that keep the host's daemons off were not written: {error}")]
        if changed:
            await self._udevd.reload()
        problems += await self._convince(claims, devices)
        problems += await self._unbind(claims)
        return problems

    async def close(self, held: Iterable[str] = ()) -> None:
        """Give back to the host whatever nobody holds (ids); the rest stays claimed while a successor takes over.

        Does not wait for udevd. Call it after `run` was cancelled.
        """
        kept = {i: self._claims[i] for i in held if i in self._claims}
        self._remembered.clear()
        try:
            if not await asyncio.to_thread(self._udevd.present):
                return
            text = rules((c.rule for c in kept.values()), self._owner)
            if await asyncio.to_thread(self._udevd.write, rules_file(self._owner), text):
                await self._udevd.reload()
            wanted = self._wanted(kept)
            for device in await asyncio.to_thread(self._unlike, kept, self._devices.values()):
                await asyncio.to_thread(self._tell, device, wanted.get(device.usb.port))
        except OSError as error:
            log.warning("the host did not get its devices back: %s", error)

    def _in_use(self, claims: Mapping[str, Claim]) -> list[Conflict]:
        """Disks that the host has in use. SYSTEMD_READY=0 makes systemd unmount what /etc/fstab mounts from a device."""
        fresh = (c.device for c in claims.values() if MARK not in self._marks(c.device))
        return [conflict for device in fresh for conflict in node_uses(self._host, device)]

    def _kept(self, claims: Mapping[str, Claim], devices: Mapping[str, Device]) -> list[Rule]:
        """The rules of these claims, and those of ports that are empty now."""
        now = [c.rule for c in claims.values()]
        taken = {d.usb.port for d in devices.values()}
        empty = [r for port, r in self._remembered.items() if port not in taken][-MAX_REMEMBERED:]
        self._remembered = {r.port: r for r in [*empty, *now]}
        return [*empty, *now]

    def _marks(self, device: Device) -> dict[str, str]:
        """Our marks in udevd's database; none where another agent has the device."""
        node = device.usb.bus_node
        noted = self._udevd.properties(node) if node is not None else {}
        return {k: noted[k] for k in (MARK, DRIVERS_MARK) if k in noted} if noted.get(MARK) == self._owner else {}

    def _unlike(self, claims: Mapping[str, Claim], devices: Iterable[Device]) -> list[Device]:
        """The devices of which udevd's database does not say what it should."""
        wanted = self._wanted(claims)
        return [d for d in devices if self._marks(d) != wanted.get(d.usb.port, {})]

    def _wanted(self, claims: Mapping[str, Claim]) -> dict[str, dict[str, str]]:
        """Port -> the marks of its device. udev knows whole devices: one part of it that is offered claims the others too."""
        wanted: dict[str, dict[str, str]] = {}
        for claim in claims.values():
            wanted.setdefault(claim.device.usb.port, {}).update(claim.rule.marks(self._owner))
        return wanted

    async def _convince(self, claims: Mapping[str, Claim], devices: Mapping[str, Device]) -> list[Problem]:
        """Trigger the devices that udevd has not seen under these rules, once more where it read the rules too late."""
        wanted = self._wanted(claims)
        unlike = await asyncio.to_thread(self._unlike, claims, devices.values())
        for _ in range(2):
            for device in unlike:
                await asyncio.to_thread(self._tell, device, wanted.get(device.usb.port))
            for _ in range(round(OWN_LOOK_S / POLL_S)):
                if not (unlike := await asyncio.to_thread(self._unlike, claims, unlike)):
                    return []
                await self._sleep(POLL_S)
        return [
            Problem(
                message=f"the host's udevd did not take up the rules for {', '.join(sorted(d.id for d in unlike)[:8])}",
                hint=f"udevadm control --reload && udevadm test {unlike[0].usb.sysfs} 2>&1 | grep NODEAGENT",
            )
        ]

    def _tell(self, device: Device, marks: Mapping[str, str] | None) -> None:
        """Let udevd look at the device again. One that is given back comes to the host's daemons as if just plugged in."""
        if DRIVERS_MARK in self._marks(device) and DRIVERS_MARK not in (marks or {}):
            drivers.probe(self._host, device.usb)
        self._udevd.trigger(device.usb, "change" if marks else "add")

    async def _unbind(self, claims: Mapping[str, Claim]) -> list[Problem]:
        problems = []
        for claim in claims.values():
            device = claim.device
            in_the_way = await asyncio.to_thread(drivers.in_the_way, self._host, device, claim.give)
            if in_the_way and (uses := await asyncio.to_thread(node_uses, self._host, device)):
                problems += [use.problem for use in uses]
                continue
            for bound in in_the_way:
                call = partial(drivers.unbind, self._host, device.usb, bound)
                try:
                    await self._slow(f"taking {bound.interface} from {bound.driver}", call, timeout_s=UNBIND_TIMEOUT_S)
                except AgentError as error:
                    problems.append(Problem.of(error))
        return problems
