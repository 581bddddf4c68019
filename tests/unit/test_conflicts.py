"""Who on the host uses a device: mounts, swap, volumes, queues, programs. /dev/null and /dev/zero stand for device nodes."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import msgspec
import pytest

from nodeagent.devices import conflicts as looking
from nodeagent.devices.conflicts import Kind, conflicts, node_uses
from nodeagent.host import HostRoot
from nodeagent.model import Device, DeviceClass, DeviceNode, Interface, UsbDevice
from tests import machines
from tests.unit.test_claims import devices

READER = Device(
    id="ukey-1",
    cls=DeviceClass.UKEY,
    usb=UsbDevice(
        port="1-3",
        vendor=1,
        product=2,
        interfaces=(Interface(0, 0x0B, 0, 0),),
        nodes=(DeviceNode("/dev/bus/usb/001/003", "usb", 1, 3),),
    ),
)


@dataclasses.dataclass
class Process:
    """Of a fake host. A descriptor is a link to something of this machine: what counts are the numbers of its node."""

    pid: int
    comm: str
    fds: tuple[str, ...] = ()
    cgroup: str = "0::/system.slice/x.service"
    parent: int = 1


def host_of(root: Path, *processes: Process, me: int = 0) -> HostRoot:
    for p in processes:
        place = root / "proc" / str(p.pid)
        (place / "fd").mkdir(parents=True)
        for number, target in enumerate(p.fds):
            (place / "fd" / str(number)).symlink_to(target)
        (place / "comm").write_text(f"{p.comm}\n")
        (place / "cgroup").write_text(f"{p.cgroup}\n")
        (place / "stat").write_text(f"{p.pid} ({p.comm}) S {p.parent} {p.pid} {p.pid} 0 -1\n")
    if me:
        (root / "proc/self").symlink_to(str(me))
    return HostRoot(root)


def test_a_program_of_the_host_that_has_the_device_open(tmp_path: Path) -> None:
    cgroup = "0::/system.slice/pcscd.service"
    host = host_of(
        tmp_path, Process(700, "pcscd", ("/dev/zero", "/dev/null"), cgroup), Process(701, "sh", ("/dev/zero",))
    )
    (found,) = conflicts(host, [READER])
    assert (found.device_id, found.kind, found.who) == ("ukey-1", Kind.PROCESS, "pcscd (pid 700)")
    assert found.sentence == "pcscd (pid 700) of the host has ukey-1 at port 1-3 open"
    assert found.remedy == "systemctl disable --now pcscd.socket pcscd.service"
    assert (found.problem.message, found.problem.hint) == (found.sentence, found.remedy)


@pytest.mark.parametrize(
    "cgroup",
    [
        "0::/kubepods.slice/kubepods-besteffort.slice/kubepods-besteffort-pod1.slice/cri-containerd-2.scope",
        "4:memory:/kubepods/besteffort/pod12/34",
        "0::/system.slice/docker-0123.scope",
        "0::/machine.slice/libpod-0123.scope/container",
        "0::/nodeagent-seats-01234567/seat-3",
    ],
)
def test_containers_and_seats_are_no_programs_of_the_host(tmp_path: Path, cgroup: str) -> None:
    assert conflicts(host_of(tmp_path, Process(700, "pcscd", ("/dev/null",), cgroup)), [READER]) == ()


def test_the_agent_and_its_children_are_no_conflict(tmp_path: Path) -> None:
    host = host_of(
        tmp_path,
        Process(50, "nodeagent", ("/dev/null",)),
        Process(60, "a) S 1 (b", parent=50),
        Process(61, "cupsd", ("/dev/null",), parent=60),
        Process(62, "cupsd", ("/dev/null",), parent=1),
        me=50,
    )
    assert [c.who for c in conflicts(host, [READER])] == ["cupsd (pid 62)"]


@pytest.mark.parametrize(
    ("comm", "cgroup", "remedy"),
    [
        ("fwupd", "0::/system.slice/fwupd.service", "systemctl stop fwupd.service && systemctl mask fwupd.service"),
        ("scand", "0::/system.slice/scand.service", "systemctl stop scand.service"),
        ("scand", "1:name=systemd:/system.slice/scand.service/sub", "systemctl stop scand.service"),
        ("gqrx", "0::/user.slice/user-1000.slice/user@1000.service/app.slice/app-gqrx.service", "kill 700"),
        ("minicom", "0::/user.slice/user-1000.slice/session-3.scope", "kill 700"),
    ],
)  # fmt: skip
def test_remedies(tmp_path: Path, comm: str, cgroup: str, remedy: str) -> None:
    (found,) = conflicts(host_of(tmp_path, Process(700, comm, ("/dev/null",), cgroup)), [READER])
    assert found.remedy == remedy


def test_processes_and_descriptors_that_vanish_and_odd_ones(tmp_path: Path) -> None:
    host = host_of(tmp_path, Process(700, "pcscd", ("/dev/gone", "socket:[1]", "/tmp", "/dev/null")))
    (tmp_path / "proc/701").mkdir()
    (tmp_path / "proc/702").write_text("no directory")
    assert len(conflicts(host, [READER])) == 1


def test_the_look_at_descriptors_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(looking, "MAX_DESCRIPTORS", 3)
    host = host_of(tmp_path, *(Process(700 + n, "x", ("/dev/null",)) for n in range(8)))
    assert len(conflicts(host, [READER])) == 3


def test_absent_and_simulated_devices_have_no_conflicts(tmp_path: Path) -> None:
    host = host_of(tmp_path, Process(700, "pcscd", ("/dev/null",)))
    assert conflicts(host, [msgspec.structs.replace(READER, present=False)]) == ()
    simulated = msgspec.structs.replace(READER.usb, simulated=True)
    assert conflicts(host, [msgspec.structs.replace(READER, usb=simulated)]) == ()


# ---- disks


def stick(root: Path, **tables: str) -> tuple[HostRoot, Device]:
    host = machines.machine(root, "stick")
    (root / "proc/1").mkdir(parents=True)
    for name, text in tables.items():
        (root / "proc" / {"mountinfo": "1/mountinfo"}.get(name, name)).write_text(text)
    return host, devices(host)["id-2-1"]


MOUNTINFO = r"""22 28 0:21 / /proc rw,nosuid - proc proc rw
36 22 8:17 / /media/a\040stick rw,noatime shared:1 - vfat /dev/sdb1 rw
37 22 8:1 / / rw - ext4 /dev/sda1 rw
38 22 0:44 / /data rw - btrfs /dev/sdb1 rw
a broken line
39 22 8:xx / /x rw - ext4 /dev/sdx rw
"""


def test_mounts_by_number_and_by_name(tmp_path: Path) -> None:
    host, device = stick(tmp_path, mountinfo=MOUNTINFO)
    first, second = node_uses(host, device)
    assert first.sentence == "id-2-1 (/dev/sdb1) is mounted by the host at /media/a stick"
    assert first.remedy == "umount '/media/a stick'"
    assert (second.who, second.system) == ("/data", False)


@pytest.mark.parametrize("place", ["/", "/boot", "/var/lib/kubelet", "/var"])
def test_a_disk_of_the_node_itself(tmp_path: Path, place: str) -> None:
    host, device = stick(tmp_path, mountinfo=f"36 22 8:17 / {place} rw - ext4 /dev/sdb1 rw\n")
    (found,) = node_uses(host, device)
    assert found.system
    assert found.remedy == "take port 2-1 out of devices.rules"


def test_swap(tmp_path: Path) -> None:
    host, device = stick(
        tmp_path,
        swaps="Filename\t\t\t\tType\t\tSize\t\tUsed\t\tPriority\n"
        "/dev/sdb1                               partition\t1\t0\t-2\n/dev/sda2    partition\t1\t0\t-3\n",
    )
    (found,) = node_uses(host, device)
    assert (found.kind, found.remedy) == (Kind.SWAP, "swapoff /dev/sdb1")


@pytest.mark.parametrize(
    ("name", "uuid", "who", "remedy"),
    [
        ("dm-0", "CRYPT-LUKS2-1-secret", "secret", "cryptsetup close secret"),
        ("dm-0", "LVM-abc", "vg-home", "lvchange -an /dev/mapper/vg-home"),
        ("dm-0", "", "plain", "dmsetup remove plain"),
        ("md127", "", "md127", "mdadm --stop /dev/md127"),
    ],
)
def test_volumes(tmp_path: Path, name: str, uuid: str, who: str, remedy: str) -> None:
    host, device = stick(tmp_path)
    (tmp_path / "sys/class/block/sdb1/holders").mkdir(parents=True)
    (tmp_path / f"sys/class/block/sdb1/holders/{name}").touch()
    if name.startswith("dm"):
        dm = tmp_path / f"sys/class/block/{name}/dm"
        dm.mkdir(parents=True)
        (dm / "name").write_text(who)
        (dm / "uuid").write_text(uuid)
    (found,) = node_uses(host, device)
    assert (found.kind, found.who, found.remedy) == (Kind.HOLDER, who, remedy)


def test_a_hostile_mount_point_stays_one_word_of_a_shell(tmp_path: Path) -> None:
    host, device = stick(tmp_path, mountinfo="36 22 8:17 / /media/';reboot;' rw - vfat /dev/sdb1 rw\n")
    (found,) = node_uses(host, device)
    assert found.remedy == "umount '/media/'\\'';reboot;'\\'''"


# ---- print queues


QUEUES = """NextPrinterId 3
<DefaultPrinter office>
PrinterId 1
DeviceURI usb://HP/LaserJet%20P2055dn?serial=S1
</DefaultPrinter>
<Printer far>
DeviceURI ipp://10.0.0.1/ipp/print
</Printer>
<Printer other>
DeviceURI usb://Pantum/P2500
</Printer>
"""


@pytest.mark.parametrize("model", ["LaserJet P2055dn", "HP LaserJet P2055dn", "Hewlett-Packard LaserJet P2055dn"])
def test_a_queue_of_the_host_s_own_cups(tmp_path: Path, model: str) -> None:
    host = machines.machine(tmp_path, "laserjet")
    (tmp_path / "etc/cups").mkdir(parents=True)
    (tmp_path / "etc/cups/printers.conf").write_text(QUEUES)
    (device,) = devices(host).values()
    usb = msgspec.structs.replace(device.usb, ieee1284_id=f"MFG:Hewlett-Packard;CMD:PJL,PCL;MDL:{model};CLS:PRINTER;")
    (found,) = conflicts(host, [msgspec.structs.replace(device, usb=usb)])
    assert (found.kind, found.remedy) == (Kind.QUEUE, "lpadmin -x office")
