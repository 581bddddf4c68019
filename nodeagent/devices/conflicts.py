"""Who on the host uses a device that is given away: programs, mounts, swap, volumes, print queues.

Looked for on demand, never in the flow of events. `node_uses` is cheap and is asked before a disk is claimed; `conflicts`
also looks into every process. All of it reads /proc and /sys below the host's root and blocks: call it in a thread.
"""

from __future__ import annotations

import contextlib
import os
import re
import stat
from collections.abc import Iterable, Mapping, Sequence
from enum import StrEnum
from urllib.parse import unquote

import msgspec

from nodeagent.devices.sysfs import clean
from nodeagent.documents import Problem
from nodeagent.host import HostRoot
from nodeagent.model import Device, DeviceClass, DeviceNode, UsbDevice

MAX_PROCESSES = 65536
MAX_DESCRIPTORS = 1 << 20
"""Of all processes; 80,000 descriptors are read in a tenth of a second."""
MAX_MOUNTS = 100_000
"""fs.mount-max, the kernel's own limit for one namespace."""
MAX_TABLE_BYTES = 32 << 20
MAX_HOLDERS = 256
MAX_CONFLICTS = 256
PRINTERS_CONF = "/etc/cups/printers.conf"

SYSTEM_PLACES = ("/", "/boot", "/boot/efi", "/efi", "/etc", "/home", "/opt", "/root", "/usr", "/var")
"""A disk with one of these, or anything below /var/lib, is a disk of the node itself."""
CONTAINERS = re.compile(r"kubepods|cri-containerd|crio-|docker[-/]|libpod|machine\.slice|lxc[./]|nodeagent-seats-")
"""In the cgroup of a process that belongs to a container or a seat, by kubelet, runtimes and ourselves."""
UNIT = re.compile(r"([A-Za-z0-9:_.\\@-]+\.service)(?:/|$)")
USER_UNIT = re.compile(r"/user@[0-9]+\.service/")


class Kind(StrEnum):
    PROCESS = "process"
    MOUNT = "mount"
    SWAP = "swap"
    HOLDER = "holder"
    QUEUE = "queue"


class Conflict(msgspec.Struct, frozen=True, kw_only=True):
    """One use of one device by the host. `who`: a program with its pid, a directory, a volume, a queue."""

    device_id: str
    kind: Kind
    who: str
    sentence: str
    remedy: str
    """A command that ends the use."""
    system: bool = False
    """The node itself lives on the device: it must not be given away at all."""

    @property
    def problem(self) -> Problem:
        return Problem(message=self.sentence, hint=self.remedy)


REMEDIES: Mapping[str, str] = {
    "pcscd": "systemctl disable --now pcscd.socket pcscd.service",
    "ipp-usb": "systemctl disable --now ipp-usb.service && systemctl mask ipp-usb.service",
    "cupsd": "systemctl disable --now cups.socket cups.path cups.service cups-browsed.service",
    "usb": "systemctl disable --now cups.socket cups.path cups.service cups-browsed.service",
    "ModemManager": "systemctl restart ModemManager.service",
    "udisksd": "systemctl restart udisks2.service",
    "fwupd": "systemctl stop fwupd.service && systemctl mask fwupd.service",
    "pulseaudio": "systemctl --global disable --now pulseaudio.socket pulseaudio.service; pkill -x pulseaudio",
    "wireplumber": "systemctl --global disable --now wireplumber.service; pkill -x wireplumber",
    "pipewire": "systemctl --global disable --now pipewire.socket pipewire.service; pkill -x pipewire",
    "scdaemon": "gpgconf --kill scdaemon",
    "usbmuxd": "systemctl stop usbmuxd.service",
    "usbguard-daemon": "",
}
"""comm of a host program -> what makes it let go. ModemManager and udisksd pass over a claimed device when they start
again; pcscd before 2.3.2 and ipp-usb do not. `usb` is the back end of CUPS. USBGuard only watches."""


def conflicts(host: HostRoot, devices: Iterable[Device]) -> tuple[Conflict, ...]:
    """Every use of these devices by the host, at most MAX_CONFLICTS; processes of containers and of the agent are none."""
    devices = [d for d in devices if d.present and not d.usb.simulated]
    found = [c for d in devices for c in node_uses(host, d)]
    found += _processes(host, devices)
    found += [c for d in devices if d.cls is DeviceClass.PRINTER for c in _queues(host, d)]
    return tuple(found[:MAX_CONFLICTS])


class Mount(msgspec.Struct, frozen=True):
    """A line of mountinfo: where, from what, and the numbers of its device."""

    place: str
    source: str
    major: int
    minor: int


def mounts(host: HostRoot, usb: UsbDevice) -> tuple[Mount, ...]:
    """What the host's first process sees mounted from the block devices of this device, in the order of mounting."""
    numbers, paths = _block(usb)
    if not numbers:
        return ()
    found = (_mount(line) for line in _lines(host, "/proc/1/mountinfo", MAX_MOUNTS))
    # btrfs shows a number of its own, so the name counts as well.
    return tuple(m for m in found if m is not None and ((m.major, m.minor) in numbers or m.source in paths))


def lies_on_top(mount: Mount) -> bool:
    """In the mount namespace of the calling thread, this mount is what its place shows."""
    here = (_mount(line) for line in _lines(HostRoot(), "/proc/thread-self/mountinfo", MAX_MOUNTS))
    last = [m for m in here if m is not None and m.place == mount.place][-1:]
    return last == [mount]


def is_system(place: str) -> bool:
    """The node itself lives in what is mounted there."""
    return place in SYSTEM_PLACES or place.startswith("/var/lib/")


def node_uses(host: HostRoot, device: Device) -> list[Conflict]:
    """Mounts, swap and volumes on the block devices of a device."""
    _, paths = _block(device.usb)
    if not paths:
        return []
    found = []
    for mount in mounts(host, device.usb):
        system = is_system(mount.place)
        found.append(
            Conflict(
                device_id=device.id,
                kind=Kind.MOUNT,
                who=mount.place,
                sentence=f"{device.id} ({mount.source}) is mounted by the host at {mount.place}"
                + (", so it is a disk of the node itself" if system else ""),
                remedy=f"take port {device.usb.port} out of devices.rules"
                if system
                else f"umount {_quoted(mount.place)}",
                system=system,
            )
        )
    for line in _lines(host, "/proc/swaps", MAX_HOLDERS):
        path = _unescaped(line.split(" ", 1)[0].split("\t", 1)[0])
        if path in paths:
            found.append(
                Conflict(
                    device_id=device.id,
                    kind=Kind.SWAP,
                    who=path,
                    sentence=f"the host swaps to {path} of {device.id}",
                    remedy=f"swapoff {path}",
                    system=True,
                )
            )
    found += [c for node in device.usb.nodes if node.subsystem == "block" for c in _holders(host, device, node)]
    return found


def _holders(host: HostRoot, device: Device, node: DeviceNode) -> list[Conflict]:
    """Volumes made of a disk or partition (/sys/class/block/<name>/holders)."""
    found = []
    with contextlib.suppress(OSError):
        names = sorted(p.name for p in host.path(f"/sys/class/block/{node.path.rpartition('/')[2]}/holders").iterdir())
        for name in names[:MAX_HOLDERS]:
            mapped = clean(host.attribute(f"/sys/class/block/{name}/dm/name"))
            uuid = host.attribute(f"/sys/class/block/{name}/dm/uuid")
            if name.startswith("md"):
                remedy = f"mdadm --stop /dev/{name}"
            elif uuid.startswith("CRYPT-"):
                remedy = f"cryptsetup close {_quoted(mapped)}"
            elif uuid.startswith("LVM-"):
                remedy = f"lvchange -an /dev/mapper/{_quoted(mapped)}"
            else:
                remedy = f"dmsetup remove {_quoted(mapped or name)}"
            found.append(
                Conflict(
                    device_id=device.id,
                    kind=Kind.HOLDER,
                    who=mapped or name,
                    sentence=f"the host has put {node.path} of {device.id} into the volume {mapped or name}",
                    remedy=remedy,
                )
            )
    return found


def _processes(host: HostRoot, devices: Sequence[Device]) -> list[Conflict]:
    """Programs of the host that have a node of these devices open."""
    owners = {(n.subsystem == "block", n.major, n.minor): d for d in devices for n in d.usb.nodes}
    found: list[Conflict] = []
    if not owners:
        return found
    ours = _own_pid(host)
    budget = MAX_DESCRIPTORS
    for pid in _pids(host):
        device, seen = _first_open(host, pid, owners, budget)
        budget -= seen
        if device is None or _is_container(host, pid) or _descends(host, pid, ours):
            continue
        found.append(_process(host, device, pid))
        if budget <= 0 or len(found) >= MAX_CONFLICTS:
            break
    return found


def _process(host: HostRoot, device: Device, pid: int) -> Conflict:
    name = clean(host.attribute(f"/proc/{pid}/comm"), 16) or "?"
    cgroup = host.attribute(f"/proc/{pid}/cgroup")
    units = UNIT.findall(cgroup)
    remedy = REMEDIES.get(name)
    if remedy is None:
        stop = f"systemctl stop {_quoted(units[-1])}" if units and not USER_UNIT.search(cgroup) else f"kill {pid}"
        remedy = stop
    return Conflict(
        device_id=device.id,
        kind=Kind.PROCESS,
        who=f"{name} (pid {pid})",
        sentence=f"{name} (pid {pid}) of the host has {device.id} at port {device.usb.port} open",
        remedy=remedy,
    )


def _first_open(
    host: HostRoot, pid: int, owners: Mapping[tuple[bool, int, int], Device], budget: int
) -> tuple[Device | None, int]:
    """The first of these devices that the process has open, and how many descriptors were looked at."""
    seen = 0
    with contextlib.suppress(OSError), os.scandir(host.path(f"/proc/{pid}/fd")) as entries:
        for entry in entries:
            seen += 1
            if seen > budget:
                break
            with contextlib.suppress(OSError):
                # A name is compared first, because a stat of a file on a dead network share hangs.
                if not os.readlink(entry.path).startswith("/dev/"):  # noqa: PTH115 - a Path for each of 80,000 is slow
                    continue
                status = os.stat(entry.path)  # noqa: PTH116
                kind = stat.S_ISBLK(status.st_mode)
                if kind or stat.S_ISCHR(status.st_mode):
                    device = owners.get((kind, os.major(status.st_rdev), os.minor(status.st_rdev)))
                    if device is not None:
                        return device, seen
    return None, seen


def _pids(host: HostRoot) -> list[int]:
    try:
        with os.scandir(host.path("/proc")) as entries:
            return sorted(int(e.name) for e in entries if e.name.isdecimal())[:MAX_PROCESSES]
    except OSError:
        return []


def _own_pid(host: HostRoot) -> int:
    """Our number where the host's /proc counts, 0 when we are not in it (a captured tree)."""
    try:
        return int(host.path("/proc/self").readlink().name)
    except (OSError, ValueError):
        return 0


def _is_container(host: HostRoot, pid: int) -> bool:
    return CONTAINERS.search(host.attribute(f"/proc/{pid}/cgroup")) is not None


def _descends(host: HostRoot, pid: int, ancestor: int) -> bool:
    """The process is `ancestor` or comes from it: our own cupsd has the printer open, too."""
    for _ in range(64):
        if pid == ancestor and ancestor:
            return True
        # The name of a process may hold anything, so the fields are counted from its end (proc(5)).
        fields = host.attribute(f"/proc/{pid}/stat").rpartition(")")[2].split()
        if len(fields) < 2 or not fields[1].isdecimal() or pid <= 1:
            return False
        pid = int(fields[1])
    return False


def _queues(host: HostRoot, device: Device) -> list[Conflict]:
    """Queues of the host's own CUPS for this printer: its usb back end takes the printer away from usblp when it prints."""
    fields = dict(p.partition(":")[::2] for p in device.usb.ieee1284_id.split(";") if ":" in p)
    maker = fields.get("MFG") or fields.get("MANUFACTURER") or device.usb.manufacturer
    model = fields.get("MDL") or fields.get("MODEL") or device.usb.name
    name = _plain(maker) + _plain(model).removeprefix(_plain(maker))
    found, queue = [], ""
    for line in _lines(host, PRINTERS_CONF, 100_000):
        if opened := re.match(r"<(?:Default)?Printer ([^\s>/#]{1,127})>", line):
            queue = opened[1]
            continue
        uri = re.match(r"DeviceURI usb://([^/?]+)/([^?\s]+)", line)
        if uri and queue and _plain(unquote(uri[1] + uri[2])) == name:
            found.append(
                Conflict(
                    device_id=device.id,
                    kind=Kind.QUEUE,
                    who=queue,
                    sentence=f"the host's own CUPS has the queue {queue} for {device.id} at port {device.usb.port}",
                    remedy=f"lpadmin -x {_quoted(queue)}",
                )
            )
    return found


def _plain(text: str) -> str:
    """CUPS writes HP for Hewlett-Packard into its URIs, and a maker's name only once (usb-libusb.c, make_device_uri)."""
    return re.sub(r"[^a-z0-9]", "", text.lower().replace("hewlett-packard", "hp"))


def _block(usb: UsbDevice) -> tuple[frozenset[tuple[int, int]], frozenset[str]]:
    nodes = [n for n in usb.nodes if n.subsystem == "block"]
    return frozenset((n.major, n.minor) for n in nodes), frozenset(n.path for n in nodes)


def _mount(line: str) -> Mount | None:
    """`36 35 98:0 /mnt1 /mnt2 rw,noatime master:1 - ext3 /dev/root rw` (proc(5))."""
    left, _, right = line.partition(" - ")
    fields, behind = left.split(" "), right.split(" ")
    if len(fields) < 6 or len(behind) < 2:
        return None
    numbers = re.fullmatch(r"(\d+):(\d+)", fields[2])
    if numbers is None:
        return None
    return Mount(_unescaped(fields[4]), _unescaped(behind[1]), int(numbers[1]), int(numbers[2]))


def _unescaped(text: str) -> str:
    """The kernel writes space, tab, newline and backslash as three octal digits (proc(5))."""
    return re.sub(r"\\([0-7]{3})", lambda m: chr(int(m[1], 8)), text)


def _quoted(text: str) -> str:
    """For a shell; a mount point's name is anybody's."""
    text = clean(text, 4096)
    return text if re.fullmatch(r"[A-Za-z0-9_./:@%+=-]+", text) else "'" + text.replace("'", "'\\''") + "'"


def _lines(host: HostRoot, path: str, limit: int) -> list[str]:
    try:
        with open(host.path(path), "rb") as file:
            return file.read(MAX_TABLE_BYTES).decode(errors="surrogateescape").splitlines()[:limit]
    except OSError:
        return []
