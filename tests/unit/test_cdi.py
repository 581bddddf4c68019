"""CDI specifications: what a runtime reads, how they are replaced, and what a predecessor left."""

import json
import os
from pathlib import Path

import msgspec
import pytest

from nodeagent.devices.cdi import CdiFiles, qualified, specification
from nodeagent.model import Audience, Device, DeviceClass, DeviceNode, Grant, Offer, Resource, UsbDevice

NODES = (DeviceNode("/dev/bus/usb/001/009", "usb", 189, 8), DeviceNode("/dev/sdb", "block", 8, 16, 0))


def resource(*ids: str, cdi: bool = True, present: bool = True, nodes: tuple[DeviceNode, ...] = NODES) -> Resource:
    usb = UsbDevice(port="1-1", vendor=1, product=2, nodes=nodes)
    offers = {
        i: Offer(
            device=Device(id=i, cls=DeviceClass.UKEY, usb=usb, present=present), rule="r", grant=Grant(nodes=nodes),
            give="node", cdi=cdi,
        )
        for i in ids
    }  # fmt: skip
    return Resource(name="opencdi.io/ukey", to=Audience(), offers=offers)


def test_what_a_runtime_reads() -> None:
    spec = specification(resource("ukey-a"))
    assert spec is not None
    assert json.loads(spec) == {
        "cdiVersion": "0.5.0",
        "kind": "opencdi.io/ukey",
        "devices": [
            {
                "name": "ukey-a",
                "containerEdits": {
                    "deviceNodes": [
                        {"path": "/dev/bus/usb/001/009", "hostPath": "/dev/bus/usb/001/009", "type": "c", "major": 189,
                         "minor": 8, "permissions": "rw"},
                        {"path": "/dev/sdb", "hostPath": "/dev/sdb", "type": "b", "major": 8, "minor": 16, "permissions": "rw"},
                    ]
                },
            }
        ],
    }  # fmt: skip
    assert qualified(resource(), "ukey-a") == "opencdi.io/ukey=ukey-a"


@pytest.mark.parametrize(
    "nothing", [resource(), resource("a", cdi=False), resource("a", present=False), resource("a", nodes=())]
)
def test_no_devices_no_file(nothing: Resource) -> None:
    assert specification(nothing) is None


def test_files_follow_the_devices(tmp_path: Path) -> None:
    directory = tmp_path / "cdi"
    files = CdiFiles(directory)
    files.write({"x": resource()})
    assert not directory.exists(), "nothing is made for nobody"
    files.write({"x": resource("ukey-a")})
    path = directory / "nodeagent-opencdi.io-ukey.json"
    assert oct(path.stat().st_mode)[-3:] == "644"
    first = path.stat().st_ino
    files.write({"x": resource("ukey-a")})
    assert path.stat().st_ino == first, "what has not changed is not written"
    files.write({"x": resource("ukey-a", nodes=NODES[:1])})
    assert path.stat().st_ino != first, "replaced in one step, never written in place"
    assert "sdb" not in path.read_text()
    files.write({"x": resource("ukey-a", present=False)})
    assert os.listdir(directory) == []


def test_what_a_predecessor_left_is_swept_and_what_others_have_is_not(tmp_path: Path) -> None:
    for name in ("nodeagent-opencdi.io-old.json", "nvidia.yaml", "nodeagent-opencdi.io-ukey.json"):
        (tmp_path / name).write_text("{}")
    CdiFiles(tmp_path).write({"x": resource("ukey-a")})
    assert sorted(os.listdir(tmp_path)) == ["nodeagent-opencdi.io-ukey.json", "nvidia.yaml"]
    assert msgspec.json.decode((tmp_path / "nodeagent-opencdi.io-ukey.json").read_bytes())["cdiVersion"] == "0.5.0"
