"""Where a printer's bytes go, and what cupsd is told. The real cupsd is in tests/host/test_cups.py."""

from __future__ import annotations

from pathlib import Path

import pytest

from nodeagent.errors import AgentError, Reason
from nodeagent.model import Device, DeviceClass, DeviceNode, UsbDevice
from nodeagent.services.printing.cups import device_uri
from nodeagent.services.printing.cups_files import CupsFiles

STATE = Path("/var/lib/nodeagent")
LP0 = DeviceNode(path="/dev/usb/lp0", subsystem="usbmisc", major=180, minor=0)
RAW = DeviceNode(path="/dev/bus/usb/001/012", subsystem="usb", major=189, minor=11)


def printer(*nodes: DeviceNode, present: bool = True, simulated: bool = False) -> Device:
    usb = UsbDevice(port="1-1", vendor=1, product=2, serial="P1", nodes=nodes, simulated=simulated)
    return Device(id="printer-abc", cls=DeviceClass.PRINTER, usb=usb, present=present)


@pytest.mark.parametrize(
    ("device", "uri"),
    [
        (printer(RAW, LP0), "opencdi:/dev/usb/lp0?usb=1/12"),
        (printer(LP0), "opencdi:/dev/usb/lp0"),
        (printer(RAW), "opencdi:/nonexistent/printer-abc"),
        (printer(LP0, present=False), "opencdi:/nonexistent/printer-abc"),
        (printer(simulated=True), "opencdi:/var/lib/nodeagent/simulated/P1/output"),
        (printer(simulated=True, present=False), "opencdi:/nonexistent/printer-abc"),
    ],
)
def test_device_uri(device: Device, uri: str) -> None:
    assert device_uri(device, STATE) == uri


def test_a_path_that_is_no_uri_is_refused() -> None:
    for path in ("/var/lib/my agent", "/var/?usb=1", "/var/%41"):
        with pytest.raises(AgentError) as caught:
            device_uri(printer(simulated=True), Path(path))
        assert caught.value.reason is Reason.CONFIG_INVALID


@pytest.mark.parametrize("twice", [False, True])
def test_what_cupsd_finds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, twice: bool) -> None:
    (tmp_path / "sbin").mkdir()
    (tmp_path / "sbin/cupsd").touch(0o755)
    monkeypatch.setattr("nodeagent.services.printing.cups_files.SEARCH", str(tmp_path / "sbin"))
    files = CupsFiles(tmp_path / "state", tmp_path / "run", Path("/usr/lib/cups"))
    for _ in range(2 if twice else 1):
        argv = files.install()
    home = tmp_path / "state/cups"
    assert argv == (f"{tmp_path}/sbin/cupsd", "-f", "-c", f"{home}/etc/cupsd.conf", "-s", f"{home}/etc/cups-files.conf")
    backend = home / "bin/backend/opencdi"
    assert backend.stat().st_mode & 0o777 == 0o700  # cupsd runs it as root only if nobody else could change it
    assert (tmp_path / "run/cups").stat().st_mode & 0o777 == 0o700
    listens = [
        line for line in (home / "etc/cupsd.conf").read_text().splitlines() if line.startswith(("Listen", "Port"))
    ]
    assert listens == [f"Listen {tmp_path}/run/cups/cups.sock"]


def test_without_a_cupsd_it_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nodeagent.services.printing.cups_files.SEARCH", str(tmp_path))
    with pytest.raises(AgentError, match="no cupsd on this system") as caught:
        CupsFiles(tmp_path / "state", tmp_path / "run", tmp_path).install()
    assert caught.value.reason is Reason.UPSTREAM_UNAVAILABLE
    assert caught.value.hint


def test_only_a_simulated_printer_gets_a_file(tmp_path: Path) -> None:
    files = CupsFiles(tmp_path, tmp_path / "run", tmp_path)
    files.prepare_device(f"opencdi:{tmp_path}/simulated/P1/output")
    assert (tmp_path / "simulated/P1/output").stat().st_size == 0
    files.prepare_device(f"opencdi:{tmp_path}/lp7")
    files.prepare_device("opencdi:/nonexistent/printer-abc")
    assert not (tmp_path / "lp7").exists()
    assert not Path("/nonexistent").exists()
