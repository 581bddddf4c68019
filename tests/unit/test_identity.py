"""Device ids against vectors made by openssl, and the node key's life."""

import os
import stat
import threading
from pathlib import Path

import msgspec
import pytest

from nodeagent.devices import identity
from nodeagent.devices.matching import Kind
from nodeagent.errors import AgentError, Reason
from nodeagent.model import DeviceClass, Interface, Part, UsbDevice

KEY = bytes(range(32))
KIND = Kind(Part(DeviceClass.PRINTER, ()), DeviceClass.PRINTER)


def usb(port: str = "1-4", serial: str = "CNM1K12345") -> UsbDevice:
    return UsbDevice(port=port, vendor=0x03F0, product=0x1D17, serial=serial)


# printf '03f0\0001d17\000serial\000CNM1K12345' |
#   openssl dgst -sha256 -mac HMAC -macopt hexkey:000102...1e1f -binary | base32 | tr A-Z a-z | cut -c1-20
BY_SERIAL = "iugokpcnfnetx2rko5zs"
# printf '03f0\0001d17\000port\0001-4' | (the same)
BY_PORT = "i3gbx6dthn2h4haggcu7"


@pytest.mark.parametrize(
    ("device", "by_port", "expected"),
    [
        (usb(), False, BY_SERIAL),
        (usb(port="9-9"), False, BY_SERIAL),
        (usb(), True, BY_PORT),
        (usb(serial=""), False, BY_PORT),
    ],
)
def test_vectors(device: UsbDevice, by_port: bool, expected: str) -> None:
    assert identity.device_id(KEY, DeviceClass.PRINTER, device, by_port=by_port) == f"printer-{expected}"


def test_an_id_fits_the_kubelet_and_hides_the_serial() -> None:
    for cls in DeviceClass:
        name = identity.device_id(KEY, cls, usb())
        assert len(name) <= 63
        assert "CNM" not in name.upper()
    assert identity.device_id(bytes(32), DeviceClass.PRINTER, usb()) != f"printer-{BY_SERIAL}"


def test_a_serial_is_not_a_port() -> None:
    assert identity.device_id(KEY, DeviceClass.USB, usb(serial="1-4")) != identity.device_id(
        KEY, DeviceClass.USB, usb(serial="")
    )


def test_twins_are_known_by_port_and_the_id_returns_with_the_last_of_them() -> None:
    alone = identity.identify(KEY, [(KIND, usb())])
    assert list(alone) == [f"printer-{BY_SERIAL}"]
    both = identity.identify(KEY, [(KIND, usb()), (KIND, usb(port="1-5"))])
    assert len(both) == 2
    assert f"printer-{BY_SERIAL}" not in both
    assert both[f"printer-{BY_PORT}"].usb.port == "1-4"
    assert identity.twins(d.usb for d in both.values()) == {("1-4", "1-5")}


def test_a_known_twin_is_known_by_port_also_when_it_is_alone() -> None:
    marks = {identity.twin_mark(KEY, usb())}
    assert list(identity.identify(KEY, [(KIND, usb())], marks)) == [f"printer-{BY_PORT}"]
    assert list(identity.identify(KEY, [(KIND, usb(serial="other"))], marks)) != [f"printer-{BY_PORT}"]


def test_one_that_is_held_since_before_keeps_its_id_at_its_port() -> None:
    anchors = {f"printer-{BY_SERIAL}": "1-4"}
    both = [(KIND, usb()), (KIND, usb(port="1-5"))]
    found = identity.identify(KEY, both, {identity.twin_mark(KEY, usb())}, anchors)
    assert found[f"printer-{BY_SERIAL}"].usb.port == "1-4"
    assert len(found) == 2
    moved = identity.identify(KEY, both[1:], {identity.twin_mark(KEY, usb())}, anchors)
    assert f"printer-{BY_SERIAL}" not in moved, "at another port it may be the other one"


def test_parts_of_one_device_have_ids_of_their_own() -> None:
    parts = [
        Kind(Part(DeviceClass.PRINTER, (0,)), DeviceClass.PRINTER),
        Kind(Part(DeviceClass.STORAGE, (1,)), DeviceClass.STORAGE),
    ]
    device = msgspec.structs.replace(usb(), interfaces=(Interface(0, 7, 1, 2), Interface(1, 8, 6, 80)))
    found = identity.identify(KEY, [(kind, device) for kind in parts])
    assert {(d.id, d.interfaces) for d in found.values()} == {
        (f"printer-{BY_SERIAL}", (0,)),
        (f"storage-{BY_SERIAL}", (1,)),
    }


def test_the_memory_of_twins_survives_and_damage_does_not_matter(tmp_path: Path) -> None:
    memory = identity.TwinMemory(tmp_path)
    memory.load()
    assert (memory.marks, memory.anchors) == (frozenset(), {})
    memory.marks, memory.anchors = frozenset({"ab"}), {"printer-x": "1-4"}
    memory.save()
    again = identity.TwinMemory(tmp_path)
    again.load()
    assert (again.marks, again.anchors) == (frozenset({"ab"}), {"printer-x": "1-4"})
    (tmp_path / "twins.json").write_bytes(b"{")
    damaged = identity.TwinMemory(tmp_path)
    damaged.load()
    assert damaged.marks == frozenset()


def test_devices_without_a_serial_are_no_twins() -> None:
    assert identity.twins([usb(serial=""), usb(port="1-5", serial="")]) == frozenset()


def test_key_is_made_once(tmp_path: Path) -> None:
    key = identity.node_key(tmp_path)
    assert len(key) == 32
    assert identity.node_key(tmp_path) == key
    assert stat.S_IMODE((tmp_path / "node.key").stat().st_mode) == 0o600
    assert os.listdir(tmp_path) == ["node.key"]


def test_two_daemons_that_start_together_agree(tmp_path: Path) -> None:
    keys: list[bytes] = []
    gate = threading.Barrier(8)

    def start() -> None:
        gate.wait()
        keys.append(identity.node_key(tmp_path))

    threads = [threading.Thread(target=start) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(keys) == 8
    assert len(set(keys)) == 1
    assert os.listdir(tmp_path) == ["node.key"]


def refused(directory: Path) -> AgentError:
    with pytest.raises(AgentError) as caught:
        identity.node_key(directory)
    assert caught.value.reason is Reason.STATE_INVALID
    assert "node.key" in caught.value.message
    assert caught.value.hint
    return caught.value


@pytest.mark.parametrize(("mode", "hint"), [(0o640, "chmod 600"), (0o604, "chmod 600")])
def test_a_key_that_others_can_read_is_refused(tmp_path: Path, mode: int, hint: str) -> None:
    identity.node_key(tmp_path)
    (tmp_path / "node.key").chmod(mode)
    error = refused(tmp_path)
    assert f"{mode:04o}" in error.message
    assert hint in error.hint


@pytest.mark.parametrize("size", [0, 31, 33, 5000])
def test_a_key_of_the_wrong_size_is_refused_and_kept(tmp_path: Path, size: int) -> None:
    path = tmp_path / "node.key"
    path.write_bytes(bytes(size))
    path.chmod(0o600)
    assert f"{size} bytes" in refused(tmp_path).message
    assert path.stat().st_size == size


def test_what_is_not_a_plain_file_is_refused(tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.write_bytes(KEY)
    other.chmod(0o600)
    (tmp_path / "node.key").symlink_to(other)
    refused(tmp_path)
    (tmp_path / "node.key").unlink()
    os.mkfifo(tmp_path / "node.key", 0o600)
    assert "plain file" in refused(tmp_path).message
    (tmp_path / "node.key").unlink()
    (tmp_path / "node.key").mkdir()
    refused(tmp_path)


@pytest.mark.root
def test_a_key_of_somebody_else_is_refused(tmp_path: Path) -> None:
    identity.node_key(tmp_path)
    os.chown(tmp_path / "node.key", 1000, 1000)
    assert "1000" in refused(tmp_path).message


def test_a_state_directory_that_is_not_there(tmp_path: Path) -> None:
    assert "state_dir" in refused(tmp_path / "missing").hint
