"""`nodeagent record` and `--root FILE` as their users meet them."""

from __future__ import annotations

import asyncio
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from nodeagent import cli
from nodeagent.cli import record
from nodeagent.config import DevicesConfig, parse
from nodeagent.devices import recorder, recording, sysfs
from nodeagent.devices.inventory import Inventory
from nodeagent.devices.recorder import Event
from nodeagent.devices.recording import Recording, Uevent
from nodeagent.host import HostRoot
from tests import machines
from tests.unit.test_cli import assert_no_traceback, nodeagent_

TOP = "/sys/devices/pci0000:00/0000:00:14.0/usb1"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A captured tree of a node with a hub and what is plugged into it."""
    machines.machine(tmp_path / "root", "hub-tree")
    (tmp_path / "root" / TOP.lstrip("/") / "1-1/1-1.1/serial").write_text("AB123456\n")
    return tmp_path / "root"


def test_a_whole_node(root: Path, tmp_path: Path) -> None:
    file = tmp_path / "node.json"
    done = nodeagent_("record", "--root", root, file)
    assert done.returncode == cli.FINE and done.stdout == "", done.stderr
    assert f"{file}: 9 USB devices (hubs too), {file.stat().st_size} bytes" in done.stderr
    assert "  1-1.2.1  1050:0120  Yubico Security Key by Yubico" in done.stderr
    assert "removed: 3" in done.stderr
    document = json.loads(file.read_text())
    assert document["schema"] == "nodeagent.recording/v1" and "AB123456" not in file.read_text()
    assert len(recording.load(file).devices) == 9


def test_some_devices_to_stdout(root: Path) -> None:
    done = nodeagent_("record", "--root", root, "1-1.1", "1-1.4", "-")
    assert done.returncode == cli.FINE
    made = msgspec.json.decode(done.stdout, type=Recording)
    assert [d.rpartition("/")[2] for d in made.devices] == ["usb1", "1-1", "1-1.1", "1-1.4"]


def test_by_device_id(root: Path, tmp_path: Path) -> None:
    config = tmp_path / "c.yaml"
    state = root / "state"
    state.mkdir()
    key = state / "node.key"
    key.write_bytes(bytes(32))
    key.chmod(0o600)
    config.write_text("state_dir: /state\n")
    listed = json.loads(nodeagent_("devices", "--config", config, "--root", root, "-o", "json").stdout)["devices"]
    name = next(row["id"] for row in listed if row["port"] == "1-1.2.1")
    done = nodeagent_("record", "--config", config, "--root", root, name, "-")
    assert done.returncode == cli.FINE, done.stderr
    ports = [d.rpartition("/")[2] for d in msgspec.json.decode(done.stdout, type=Recording).devices]
    assert ports == ["usb1", "1-1", "1-1.2", "1-1.2.1"]
    done = nodeagent_("record", "--config", config, "--root", root, "ukey-aaaaaaaaaaaaaaaaaaaa", "-")
    assert done.returncode == cli.FAILED and "no device has the id ukey-aaaaaaaaaaaaaaaaaaaa" in done.stderr
    assert done.stdout == ""


def test_ids_that_cannot_be_known(root: Path) -> None:
    done = nodeagent_("record", "--root", root, "ukey-aaaaaaaaaaaaaaaaaaaa", "-")
    assert done.returncode == cli.FAILED and "node.key" in done.stderr and "name the port" in done.stderr
    assert_no_traceback(done)


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ([], "required: FILE"),
        (["--root", "{root}", "1-9", "{new}"], "no USB device at port 1-9"),
        (["--root", "{root}", "{root}/file"], "exists already"),
        (["--root", "{root}/nothing", "{new}"], "no such directory or recording"),
        (["--root", "{root}/file", "{new}"], "is no recording"),
        (["--root", "{root}", "--events", "5", "{new}"], "says nothing of --root"),
        (["--events", "0", "{new}"], "is not between"),
        (["--events", "x", "{new}"], "--events"),
        (["{root}/no/such/dir.json", "--root", "{root}"], "No such file"),
        (["--replay", "{root}/file", "{new}"], "is no recording"),
        (["--replay", "{root}/nothing", "{new}"], "No such file"),
        (["--replay", "{root}/file", "1-1", "{new}"], "goes with one directory"),
    ],
)
def test_what_cannot_be_done_is_said(argv: list[str], said: str, root: Path, tmp_path: Path) -> None:
    (root / "file").write_text("x")
    done = nodeagent_("record", *(a.format(root=root, new=tmp_path / "new") for a in argv))
    assert done.returncode == cli.FAILED and said in done.stderr, done.stderr
    assert not (tmp_path / "new").exists()
    assert_no_traceback(done)


def test_a_device_does_not_write_to_the_terminal(root: Path, tmp_path: Path) -> None:
    (root / TOP.lstrip("/") / "1-1/1-1.1/product").write_bytes(b"\x1b[2J\x1b]0;x\x07\xe2\x80\xae stick\n")
    done = nodeagent_("record", "--root", root, tmp_path / "r.json")
    assert done.returncode == cli.FINE and not set(done.stderr) & {"\x1b", "\x07", "\u202e"}
    assert "stick" in done.stderr


# ---- reading one


@pytest.mark.parametrize("verb", [["devices"], ["config", "check"]])
def test_root_takes_a_recording(verb: list[str], tmp_path: Path) -> None:
    file = machines.HERE / "multifunction.json"
    policy = tmp_path / "policy.yaml"
    policy.write_text("devices: {rules: [{name: printers, match: {class: printer}}]}\n")
    before = {path.name for path in Path(tempfile.gettempdir()).glob("nodeagent-recording-*")}
    done = nodeagent_(*verb, "--config", policy, "--root", file, "-o", "json")
    assert done.returncode == cli.FINE, done.stderr
    rows = json.loads(done.stdout)["devices"]
    assert {row.get("device", row)["class"] for row in rows} == {"printer", "storage"}
    assert {path.name for path in Path(tempfile.gettempdir()).glob("nodeagent-recording-*")} <= before, (
        "the directory is left behind"
    )


def test_root_refuses_what_is_no_recording(tmp_path: Path) -> None:
    file = tmp_path / "r.json"
    file.write_text('{"schema": "nodeagent.recording/v1", "tree": {"/etc": {"passwd": "x"}}}')
    done = nodeagent_("devices", "--root", file)
    assert done.returncode == cli.FAILED and "'/etc' is not below /sys/devices" in done.stderr
    assert_no_traceback(done)


# ---- giving one out


def test_replay_makes_a_tree_that_the_daemons_inventory_runs_on(tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = nodeagent_("record", "--replay", machines.HERE / "yubikey.json", out)
    assert done.returncode == cli.FINE, done.stderr
    assert f"{out}: 2 USB devices (hubs too); run a daemon with `host_root: {out}`" in done.stdout
    assert parse(f"host_root: {out}").host_root == str(out)

    async def inventory() -> list[str]:
        async with Inventory(HostRoot(out), DevicesConfig(), bytes(32)) as found:
            return [device.usb.name for device in found.devices.values()]

    assert asyncio.run(inventory()) == ["YubiKey OTP+FIDO+CCID"]
    again = nodeagent_("record", "--replay", machines.HERE / "yubikey.json", out)
    assert again.returncode == cli.FAILED and "not an empty directory" in again.stderr


def test_replay_plays_the_events_at_their_times(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tree = machines.tree("laserjet")
    printer = "/devices/pci0000:00/0000:00:14.0/usb1/1-4"
    back = [
        Uevent(at_s=5.0, action="add", devpath=directory.removeprefix("/sys"), files=files)
        for directory, files in sorted(tree.items())
        if printer in directory
    ]
    host = machines.machine(tmp_path, "laserjet")
    present: list[tuple[float, bool]] = []

    def sleep(seconds: float) -> None:
        present.append((seconds, bool(sysfs.read_devices(host, sysfs.usb_paths(host), {}))))

    record.play(tmp_path, (Uevent(at_s=2.0, action="remove", devpath=printer), *back), sleep)
    assert present[:2] == [(2.0, True), (3.0, False)]
    assert sysfs.read_devices(host, sysfs.usb_paths(host), {})
    assert f"remove {printer}" in capsys.readouterr().out


def test_replay_says_that_events_follow(tmp_path: Path) -> None:
    file = tmp_path / "r.json"
    gone = Uevent(at_s=0.01, action="remove", devpath="/devices/pci0000:00/0000:00:14.0/usb1/1-4")
    file.write_bytes(msgspec.json.encode(Recording(tree=machines.tree("laserjet"), uevents=(gone,))))
    done = nodeagent_("record", "--replay", file, tmp_path / "out")
    assert done.returncode == cli.FINE and "1 event follows" in done.stdout and "remove /devices" in done.stdout
    host = HostRoot(tmp_path / "out")
    assert not sysfs.read_devices(host, sysfs.usb_paths(host), {})


# ---- events, as they are recorded


class FakeKernelEvents:
    """Says that the printer went, and ends as Ctrl-C ends it."""

    def heard(self, seconds: float) -> Iterator[Event]:
        assert seconds == 60
        yield Event(1.5, "remove", "/devices/pci0000:00/0000:00:14.0/usb1/1-4")
        raise KeyboardInterrupt


def test_recording_events(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    machines.machine(tmp_path / "root", "laserjet")
    config = tmp_path / "c.yaml"
    config.write_text(f"host_root: {tmp_path / 'root'}\n")
    monkeypatch.setattr(recorder, "KernelEvents", FakeKernelEvents)
    file = tmp_path / "r.json"
    assert cli.main(["record", "--config", str(config), "--events", "60", str(file)]) == cli.FINE
    made = recording.load(file)
    assert made.uevents == (Uevent(at_s=1.5, action="remove", devpath="/devices/pci0000:00/0000:00:14.0/usb1/1-4"),)
    assert made.recorded.endswith("+00:00")
    assert "1 event," in capsys.readouterr().err


def test_events_that_cannot_be_heard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def nothing() -> None:
        raise OSError(1, "Operation not permitted")

    monkeypatch.setattr(recorder, "KernelEvents", nothing)
    config = tmp_path / "c.yaml"
    config.write_text(f"host_root: {tmp_path}\n")
    assert cli.main(["record", "--config", str(config), "--events", "1", str(tmp_path / "r.json")]) == cli.UNKNOWN
    assert not (tmp_path / "r.json").exists()
