"""The device side of the clean-up hook: which steps, and that no step touches another device.

/dev/null stands for a usbfs node: it is a character device with a directory in sysfs, and refuses a reset (ENOTTY).
"""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from nodeagent.devices import clean_up as cleaning
from nodeagent.devices.clean_up import Step, clean_up, flush, port_reset, steps
from nodeagent.devices.slow_calls import SlowCalls
from nodeagent.errors import AgentError, Reason
from nodeagent.host import HostRoot
from nodeagent.model import Device, DeviceClass, DeviceNode, Give, UsbDevice
from tests import machines
from tests.unit.test_claims import devices

NULL = UsbDevice(
    port="1-1",
    vendor=1,
    product=2,
    nodes=(DeviceNode("/dev/null", "usb", 1, 3),),
    sysfs="/sys/devices/virtual/mem/null",
)
HOST = HostRoot("/")


@pytest.mark.parametrize(
    ("cls", "give", "expected"),
    [
        (DeviceClass.UKEY, "node", (Step.PORT_RESET,)),
        (DeviceClass.UKEY, "usb", (Step.PORT_RESET,)),
        (DeviceClass.UKEY, "service", ()),
        (DeviceClass.USB, "node", (Step.PORT_RESET,)),
        (DeviceClass.STORAGE, "node", (Step.FLUSH,)),
        (DeviceClass.STORAGE, "block", (Step.FLUSH,)),
        (DeviceClass.STORAGE, "files", (Step.FLUSH,)),
        (DeviceClass.STORAGE, "usb", (Step.PORT_RESET,)),
        (DeviceClass.PRINTER, "service", ()),
        (DeviceClass.PRINTER, "node", ()),
        (DeviceClass.PRINTER, "usb", (Step.PORT_RESET,)),
        (DeviceClass.AUDIO, "node", ()),
    ],
)
def test_steps(cls: DeviceClass, give: Give, expected: tuple[Step, ...]) -> None:
    assert steps(cls, give) == expected


def test_a_reset_that_the_kernel_refuses() -> None:
    with pytest.raises(AgentError) as caught:
        port_reset(HOST, NULL)
    assert caught.value.reason is Reason.INTERNAL
    assert "the port reset of 1-1 failed" in caught.value.message
    assert "unplug" in caught.value.hint


@pytest.mark.parametrize(
    "usb",
    [
        msgspec.structs.replace(NULL, nodes=(DeviceNode("/dev/null", "usb", 1, 5),)),
        msgspec.structs.replace(NULL, nodes=(DeviceNode("/dev/zero", "usb", 1, 3),)),
        msgspec.structs.replace(NULL, nodes=(DeviceNode("/dev/bus/usb/999/999", "usb", 1, 3),)),
        msgspec.structs.replace(NULL, nodes=()),
        msgspec.structs.replace(NULL, sysfs="/sys/devices/virtual/mem/zero"),
        msgspec.structs.replace(NULL, sysfs="/sys/devices/gone"),
    ],
)
def test_another_device_is_not_reset(usb: UsbDevice, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cleaning.fcntl, "ioctl", lambda *_: pytest.fail("an ioctl was sent"))
    with pytest.raises(AgentError) as caught:
        port_reset(HOST, usb)
    assert caught.value.reason is Reason.DEVICE_UNPLUGGED


def test_a_link_in_place_of_a_node_is_not_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    host = machines.machine(tmp_path, "yubikey")
    usb = devices(host)["id-1-3"].usb
    node = host.path(usb.nodes[0].path)
    node.parent.mkdir(parents=True)
    node.symlink_to("/dev/null")
    monkeypatch.setattr(cleaning.fcntl, "ioctl", lambda *_: pytest.fail("an ioctl was sent"))
    with pytest.raises(AgentError):
        port_reset(host, usb)


@pytest.mark.parametrize("name", ["a", "b"])
def test_a_block_node_whose_number_went_to_another_disk_is_not_flushed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    host = machines.machine(tmp_path, "stick")
    (host.path("/dev")).mkdir()
    if name == "b":
        host.path("/dev/sdb").write_text("no device")
    monkeypatch.setattr(cleaning.fcntl, "ioctl", lambda *_: pytest.fail("an ioctl was sent"))
    with pytest.raises(AgentError) as caught:
        flush(host, devices(host)["id-2-1"].usb)
    assert caught.value.reason is Reason.DEVICE_UNPLUGGED


def test_a_disk_of_the_node_itself_is_left_alone(tmp_path: Path) -> None:
    host = machines.machine(tmp_path, "stick")
    mountinfo = host.path("/proc/1/mountinfo")
    mountinfo.parent.mkdir(parents=True)
    mountinfo.write_text("36 22 8:17 / /boot rw - ext4 /dev/sdb1 rw\n")
    with pytest.raises(AgentError) as caught:
        flush(host, devices(host)["id-2-1"].usb)
    assert caught.value.reason is Reason.NOT_SUPPORTED
    assert "holds /boot of the node" in caught.value.message


async def test_every_step_is_reported_and_none_raises() -> None:
    slow = SlowCalls()
    device = Device(id="ukey-1", cls=DeviceClass.UKEY, usb=NULL)
    (report,) = await clean_up(HOST, device, "node", slow, timeout_s=5)
    assert report.step is Step.PORT_RESET
    assert report.error is not None
    gone = msgspec.structs.replace(device, usb=msgspec.structs.replace(NULL, sysfs="/sys/devices/gone"))
    (report,) = await clean_up(HOST, gone, "node", slow, timeout_s=5)
    assert (report.error, report.did) == (None, "nothing: the device at port 1-1 was unplugged")
    assert await clean_up(HOST, device, "service", slow) == ()
    simulated = msgspec.structs.replace(device, usb=msgspec.structs.replace(NULL, simulated=True))
    assert await clean_up(HOST, simulated, "node", slow) == ()
