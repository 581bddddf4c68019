"""Recordings: what is taken and what is left out, that no serial number stays, and that giving one out writes nowhere else."""

from __future__ import annotations

import json
import os
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nodeagent.devices import recorder, recording, serials, sysfs
from nodeagent.devices.recorder import Event, Recorder
from nodeagent.devices.recording import Recording, Tree, Uevent
from nodeagent.errors import AgentError, Reason
from nodeagent.host import HostRoot
from nodeagent.model import UsbDevice
from tests import machines

TOP = "/sys/devices/pci0000:00/0000:00:14.0/usb1"
SECRET = "AB123456"


def read(host: HostRoot) -> tuple[UsbDevice, ...]:
    return sysfs.read_devices(host, sysfs.usb_paths(host), {})


def taken(host: HostRoot, *ports: str) -> Tree:
    return Recorder(host).tree(ports)


def with_secrets(root: Path) -> HostRoot:
    """A printer, a key and a network adapter, each with its serial number in every place where one was seen to stand."""
    host = machines.materialise(root, machines.tree("laserjet"), machines.tree("dock"))
    lan = f"{TOP[:-1]}2/2-1/2-1.2"
    more: Tree = {
        f"{TOP}/1-4": {"serial": SECRET, "product": f"LaserJet ({SECRET.lower()})"},
        f"{TOP}/1-4/1-4:1.0": {
            "ieee1284_id": f"MFG:HP;MDL:LaserJet;SN:{SECRET};SERN:{SECRET}; CMD:PCL;OWNER:Alice;UUID:1234;DES:{SECRET} x;"
        },
        f"{TOP}/1-4/1-4:1.1/0003:03F0:1D17.0001": {
            "uevent": f"DRIVER=x\nHID_NAME=HP {SECRET}\nHID_UNIQ={SECRET}\nHID_PHYS=usb-0000:00:14.0-4/input1\nSECRET=x"
        },
        f"{TOP}/1-4/1-4:1.1/0003:03F0:1D17.0001/input/input9": {"uevent": f'NAME="HP {SECRET}"\nUNIQ="{SECRET}"\nEV=3'},
        f"{TOP}/1-4/1-4:1.2/host0/target0:0:0/0:0:0:0/block/sda/sda1": {
            "dev": "8:1",
            "uevent": "MAJOR=8\nMINOR=1\nDEVNAME=sda1\nPARTN=1\nPARTNAME=Alice\nPARTUUID=01234567-89ab-cdef",
            "wwid": SECRET,
            "size": "1",
        },
        lan: {"serial": "00E04C6B1289", "product": "LAN 00:e0:4c:6b:12:89"},
        f"{lan}/2-1.2:1.0/net/enx00e04c6b1289": {
            "uevent": "INTERFACE=enx00e04c6b1289\nIFINDEX=3",
            "address": "00:e0:4c:6b:12:89",
        },
    }
    return machines.materialise(root, more) and host


def test_no_serial_number_stays(tmp_path: Path) -> None:
    text = json.dumps(taken(with_secrets(tmp_path))).lower()
    for secret in (SECRET, "00e04c6b1289", "00:e0:4c", "alice", "01234567-89ab", "secret=x", "uuid"):
        assert secret.lower() not in text, secret


def test_one_number_has_one_stand_in_wherever_it_stood(tmp_path: Path) -> None:
    tree = taken(with_secrets(tmp_path))
    printer = tree[f"{TOP}/1-4"]
    stand_in = printer["serial"]
    assert stand_in.startswith("SERIAL-") and printer["product"] == f"LaserJet ({stand_in})"
    assert tree[f"{TOP}/1-4/1-4:1.0"]["ieee1284_id"] == (
        f"MFG:HP;MDL:LaserJet;SN:{stand_in};SERN:{stand_in};CMD:PCL;DES:{stand_in} x;"
    )
    hid = f"{TOP}/1-4/1-4:1.1/0003:03F0:1D17.0001"
    assert tree[hid]["uevent"].splitlines() == [
        "DRIVER=x",
        f"HID_NAME=HP {stand_in}",
        f"HID_UNIQ={stand_in}",
        "HID_PHYS=usb-0000:00:14.0-4/input1",
    ]
    assert tree[f"{hid}/input/input9"]["uevent"].splitlines() == [f'NAME="HP {stand_in}"', f'UNIQ="{stand_in}"']
    net, other = (directory for directory in sorted(tree, reverse=True) if "/net/" in directory)
    assert net.endswith("/net/usbnet1") and tree[net] == {"uevent": "INTERFACE=usbnet1\nIFINDEX=3"}
    assert other.endswith("/net/eth1")


def test_twins_stay_twins_and_what_has_none_has_none(tmp_path: Path) -> None:
    host = machines.machine(tmp_path, "twins")
    for port, serial in (("1-1", "7"), ("1-2", "7"), ("1-5", "K1"), ("1-6", "K2")):
        (host.path(f"{TOP}/{port}") / "serial").write_text(f"{serial}\n")
    tree = taken(host)
    numbers = {port: tree[f"{TOP}/{port}"].get("serial") for port in ("1-1", "1-2", "1-3", "1-4", "1-5", "1-6")}
    assert numbers["1-1"] == numbers["1-2"] and numbers["1-3"] is numbers["1-4"] is None
    assert len({numbers["1-1"], numbers["1-5"], numbers["1-6"]}) == 3
    assert tree[f"{TOP}/1-1"]["busnum"] == "1", "a number that is somebody's serial number is still a number elsewhere"


def test_an_empty_serial_number_stays_empty(tmp_path: Path) -> None:
    host = machines.machine(tmp_path, "laserjet")
    (host.path(f"{TOP}/1-4") / "serial").write_text("\n")
    assert taken(host)[f"{TOP}/1-4"]["serial"] == ""


@given(
    st.text(min_size=5, max_size=40, alphabet=st.characters(blacklist_categories=["Cs", "Cc"])).filter(str.strip),
    st.text(max_size=40),
)
def test_a_serial_number_is_in_no_text(secret: str, around: str) -> None:
    stand_ins = serials.StandIns()
    serials.learn("1-1", {"serial": secret}, stand_ins)
    cleaned = serials.remove("1-1", {"serial": secret, "product": f"{around}{secret}{around}"}, stand_ins)
    assert cleaned["serial"] == "SERIAL-1"
    kept = cleaned["product"].replace("SERIAL-1", "\0")
    assert len(secret.strip()) < serials.MIN_SECRET_CHARS or secret.strip() not in kept


# ---- what is taken


@pytest.mark.parametrize("machine", machines.NAMES)
def test_what_is_taken_and_given_out_again_is_the_same_devices(machine: str, tmp_path: Path) -> None:
    first = machines.machine(tmp_path / "first", machine)
    tree = taken(first)
    recording.materialise(tmp_path / "second", tree)
    assert read(HostRoot(tmp_path / "second")) == read(first)
    assert taken(HostRoot(tmp_path / "second")) == tree


@pytest.mark.parametrize("machine", machines.NAMES)
def test_a_recording_is_what_the_recorder_makes(machine: str, tmp_path: Path) -> None:
    """Nothing in tests/machines is what `nodeagent record` would have left out, and no serial number is anybody's."""
    written = recording.load(machines.HERE / f"{machine}.json")
    made = taken(machines.machine(tmp_path, machine))
    assert {d: set(f) for d, f in written.tree.items()} == {d: set(f) for d, f in made.items()}
    numbers = {f["serial"] for d, f in written.tree.items() if "serial" in f and "/usb" not in d[-6:]}
    assert numbers <= {f"SERIAL-{n}" for n in range(1, 9)}
    assert written.about and not written.kernel and not written.recorded


def test_only_what_is_on_the_list(tmp_path: Path) -> None:
    host = machines.machine(tmp_path, "laserjet")
    for name in ("power_secret", "quirks", "configuration", "id"):
        (host.path(f"{TOP}/1-4") / name).write_text("x")
    (host.path(f"{TOP}/1-4") / "firmware_node").symlink_to("/etc/passwd")
    (host.path(f"{TOP}/1-4/1-4:1.0") / "driver").unlink()
    (host.path(f"{TOP}/1-4/1-4:1.0") / "driver").symlink_to("/etc")
    tree = taken(host)
    assert set(tree[f"{TOP}/1-4"]) <= recorder.DEVICE_FILES | recorder.LINKS
    assert "driver" not in tree[f"{TOP}/1-4/1-4:1.0"]
    assert "->" not in json.dumps(tree).replace('"->/', "")


def test_one_port_comes_with_its_hubs_and_nothing_else(tmp_path: Path) -> None:
    host = machines.machine(tmp_path, "hub-tree")
    tree = taken(host, "1-1.2.1")
    assert [d.rpartition("/")[2] for d, f in tree.items() if "idVendor" in f] == ["usb1", "1-1", "1-1.2", "1-1.2.1"]
    recording.materialise(tmp_path / "out", tree)
    (key,) = read(HostRoot(tmp_path / "out"))
    assert key.port == "1-1.2.1" and key.connect_type == "hotplug"


def test_a_hub_comes_with_what_is_plugged_into_it(tmp_path: Path) -> None:
    host = machines.machine(tmp_path, "hub-tree")
    recording.materialise(tmp_path / "out", taken(host, "1-1.2"))
    assert [u.port for u in read(HostRoot(tmp_path / "out"))] == ["1-1.2.1", "1-1.2.3.1", "1-1.2.3.4"]
    assert taken(host, "usb1") == taken(host)


def test_no_such_port(tmp_path: Path) -> None:
    with pytest.raises(AgentError, match="no USB device at port 1-9") as refused:
        taken(machines.machine(tmp_path, "laserjet"), "1-4", "1-9")
    assert refused.value.reason is Reason.DEVICE_UNKNOWN and "1-4, usb1" in refused.value.hint


def test_no_usb_at_all(tmp_path: Path) -> None:
    assert taken(HostRoot(tmp_path)) == {}


def test_what_a_device_says_cannot_be_more_than_text(tmp_path: Path) -> None:
    host = machines.machine(tmp_path, "laserjet")
    for name, said in (("product", b"->/../../etc"), ("manufacturer", b"hex:00"), ("serial", b"\xff\x1b[2J\n\n")):
        (host.path(f"{TOP}/1-4") / name).write_bytes(said)
    before = read(host)
    recording.materialise(tmp_path / "out", taken(host))
    (after,) = read(HostRoot(tmp_path / "out"))
    assert (after.name, after.manufacturer) == (before[0].name, before[0].manufacturer) == ("->/../../etc", "hex:00")


def test_too_much_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recorder, "MAX_TAKEN_BYTES", 100)
    with pytest.raises(AgentError) as refused:
        taken(machines.machine(tmp_path, "laserjet"))
    assert refused.value.reason is Reason.TOO_LARGE


def test_a_deep_tree_and_a_wide_one_are_cut(tmp_path: Path) -> None:
    host = machines.machine(tmp_path, "laserjet")
    wide = {f"{TOP}/1-4/1-4:1.0/x/n{n}": {"dev": "1:1", "uevent": ""} for n in range(1000)}
    machines.materialise(tmp_path, wide, {f"{TOP}/1-4/1-4:1.0" + "/d" * 40: {"dev": "1:1"}})
    assert len(taken(host)) < sysfs.MAX_DIRECTORIES + 20


def test_files_that_vanish_while_they_are_recorded(tmp_path: Path) -> None:
    host = machines.machine(tmp_path, "yubikey")
    whole = taken(host)
    for directory, _, names in [*os.walk(tmp_path / "sys/devices")]:
        for name in names:
            path = Path(directory) / name
            content = None if path.is_symlink() else path.read_bytes()
            target = os.readlink(path) if path.is_symlink() else ""
            path.unlink()
            assert set(taken(host)) <= set(whole)
            if content is None:
                path.symlink_to(target)
            else:
                path.write_bytes(content)
    assert taken(host) == whole


# ---- giving one out


def refuse(root: Path, tree: Tree) -> None:
    outside = sorted(path for path in root.parent.rglob("*") if root not in (path, *path.parents))
    with pytest.raises(AgentError) as refused:
        recording.materialise(root, tree)
    assert refused.value.reason is Reason.MALFORMED
    assert sorted(path for path in root.parent.rglob("*") if root not in (path, *path.parents)) == outside


@pytest.mark.parametrize(
    "tree",
    [
        pytest.param({"/sys/devices/../../../x": {"a": "b"}}, id="up"),
        pytest.param({"/sys/devices/./x": {"a": "b"}}, id="here"),
        pytest.param({"/etc": {"passwd": "b"}}, id="elsewhere"),
        pytest.param({"/sys/devices": {"a": "b"}}, id="the top itself"),
        pytest.param({"/sys/bus/usb/devices/x": {"a": "b"}}, id="the bus"),
        pytest.param({"/sys/devices//x": {"a": "b"}}, id="no name"),
        pytest.param({"/sys/devices/x": {"../a": "b"}}, id="file up"),
        pytest.param({"/sys/devices/x": {"a/b": "b"}}, id="file below"),
        pytest.param({"/sys/devices/x": {"": "b"}}, id="file without a name"),
        pytest.param({"/sys/devices/x": {"a\0": "b"}}, id="NUL"),
        pytest.param({"/sys/devices/x": {"a": "->/../../etc"}}, id="link up"),
        pytest.param({"/sys/devices/x": {"a": "->"}}, id="link to nothing"),
        pytest.param({"/sys/devices/x": {"a": "hex:0g"}}, id="no hexadecimal"),
        pytest.param({"/sys/devices/x": {"a": "->/devices"}, "/sys/devices/x/a/b": {"c": "d"}}, id="through a link"),
        pytest.param({"/sys/devices/x": {"a": "1"}, "/sys/devices/x/a/b": {"c": "d"}}, id="through a file"),
        pytest.param({"/sys/devices/x/a": {"c": "d"}, "/sys/devices/x": {"a": "1"}}, id="file over a directory"),
        pytest.param({f"/sys/devices/{'x' * 300}": {"a": "b"}}, id="long name"),
    ],
)
def test_a_hostile_recording_writes_nowhere_else(tree: Tree, tmp_path: Path) -> None:
    (tmp_path / "root").mkdir()
    refuse(tmp_path / "root", tree)


def test_a_link_that_is_there_already_is_not_followed(tmp_path: Path) -> None:
    root = tmp_path / "root"
    (root / "sys/devices").mkdir(parents=True)
    (tmp_path / "outside").mkdir()
    (root / "sys/devices/x").symlink_to(tmp_path / "outside")
    refuse(root, {"/sys/devices/x": {"a": "b"}})
    (root / "sys/devices/y").mkdir()
    (root / "sys/devices/y/a").symlink_to(tmp_path / "outside/b")
    recording.materialise(root, {"/sys/devices/y": {"a": "b"}})
    assert (root / "sys/devices/y/a").read_text() == "b\n" and not [*(tmp_path / "outside").iterdir()]


@given(
    st.dictionaries(
        st.lists(st.sampled_from(["sys", "devices", "..", ".", "a", "b", "", "/", "~"]), max_size=6).map("/".join),
        st.dictionaries(
            st.sampled_from(["a", "b", "..", "a/b", "idVendor"]),
            st.sampled_from(["1", "->/a", "->/../..", "->/devices/a", "hex:00", "hex:x", "->//", "->a"]),
            max_size=3,
        ),
        max_size=4,
    )
)
def test_whatever_a_recording_says(tmp_path_factory: pytest.TempPathFactory, tree: Tree) -> None:
    top = tmp_path_factory.mktemp("any")
    root = top / "deep/er/root"
    root.mkdir(parents=True)
    try:
        recording.materialise(root, tree)
    except AgentError as refused:
        assert refused.reason is Reason.MALFORMED
    assert [*top.iterdir()] == [top / "deep"] and [*(top / "deep/er").iterdir()] == [root]
    for directory, names, files in os.walk(root):
        for name in (*names, *files):
            path = Path(directory) / name
            assert not path.is_symlink() or (path.parent / os.readlink(path)).resolve().is_relative_to(root)


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"{}",
        b"[]",
        b"\xff\xfe",
        b'{"tree": {}}x',
        b'{"schema": "nodeagent.recording/v2", "tree": {}}',
        b'{"tree": {"/sys/devices/x": {"a": 1}}}',
        b'{"tree": {}, "uevents": [{"at_s": 0, "action": "../x", "devpath": "/devices/x"}]}',
        b'{"tree":' + b"[" * 10_000,
    ],
)
def test_a_file_that_is_no_recording(text: bytes, tmp_path: Path) -> None:
    file = tmp_path / "r.json"
    file.write_bytes(text)
    with pytest.raises(AgentError, match=r"r\.json is no recording") as refused:
        recording.load(file)
    assert refused.value.reason is Reason.MALFORMED


def test_a_file_that_is_too_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recording, "MAX_FILE_BYTES", 100)
    file = tmp_path / "r.json"
    file.write_bytes(b" " * 101)
    with pytest.raises(AgentError, match="longer than"):
        recording.load(file)


# ---- events


def plugged(root: Path, *ports: str) -> HostRoot:
    """The hub tree with these ports plugged."""
    host = machines.machine(root, "hub-tree")
    for usb in read(host):
        if usb.port not in ports:
            recording.play(root, Uevent(at_s=0, action="remove", devpath=usb.sysfs.removeprefix("/sys")))
    return host


def test_events_play_what_happened(tmp_path: Path) -> None:
    """A stick is unplugged, and plugged in elsewhere: recorded at one tree, played at another."""
    here = plugged(tmp_path / "here", "1-1.1")
    made = Recorder(here)
    tree = made.tree()
    assert [u.port for u in read(here)] == ["1-1.1"]
    after = machines.machine(tmp_path / "after", "hub-tree")
    elsewhere = Recorder(after)
    elsewhere.tree()
    stick = "/devices/pci0000:00/0000:00:14.0/usb1/1-1/1-1.2/1-1.2.3/1-1.2.3.1"
    paths = sorted(d for d in machines.tree("hub-tree") if d.startswith(f"/sys{stick}"))
    events = [
        recorder.uevent(made, Event(0.1, "remove", "/devices/pci0000:00/0000:00:14.0/usb1/1-1/1-1.1")),
        *(recorder.uevent(elsewhere, Event(0.2 + n / 100, "add", p.removeprefix("/sys"))) for n, p in enumerate(paths)),
    ]
    assert events[0].files == {} and events[1].files["idVendor"] == "0951"
    text = msgspec.json.encode(Recording(tree=tree, uevents=tuple(events)))
    again = recording.take_recording(text)
    host = HostRoot(tmp_path / "out")
    recording.materialise(host.root, again.tree)
    seen = []
    for event in again.uevents:
        recording.play(host.root, event)
        seen.append([u.port for u in read(host)])
    assert seen[0] == [] and seen[-1] == ["1-1.2.3.1"]
    (found,), (there,) = read(host), [u for u in read(after) if u.port == "1-1.2.3.1"]
    assert msgspec.structs.replace(found, serial="") == msgspec.structs.replace(there, serial="")


def test_a_driver_that_lets_go_takes_its_files_away(tmp_path: Path) -> None:
    host = machines.machine(tmp_path, "laserjet")
    interface = f"{TOP}/1-4/1-4:1.0"
    files = {n: v for n, v in machines.tree("laserjet")[interface].items() if n not in ("driver", "ieee1284_id")}
    (before,) = read(host)
    recording.play(tmp_path, Uevent(at_s=0, action="unbind", devpath=interface.removeprefix("/sys"), files=files))
    (after,) = read(host)
    assert before.ieee1284_id and not after.ieee1284_id and after.nodes == before.nodes


@pytest.mark.parametrize("devpath", ["/..", "/devices/../../x", "/class/net", "/devices", ""])
def test_an_event_stays_below_the_devices(devpath: str, tmp_path: Path) -> None:
    host = machines.machine(tmp_path / "root", "laserjet")
    for action, files in (("remove", {}), ("add", {"a": "b"})):
        with pytest.raises(AgentError, match="cannot be given out"):
            recording.play(host.root, Uevent(at_s=0, action=action, devpath=devpath, files=files))
    assert read(host)


def test_what_is_gone_again_before_it_could_be_read(tmp_path: Path) -> None:
    made = Recorder(machines.machine(tmp_path, "laserjet"))
    event = recorder.uevent(made, Event(1.0, "add", "/devices/pci0000:00/0000:00:14.0/usb1/1-9"))
    assert event.files == {}
    recording.play(tmp_path, event)
