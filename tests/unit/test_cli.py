"""The command line as its users meet it: a process, its output and its exit code."""

from __future__ import annotations

import json
import os
import pty
import re
import signal
import socket
import subprocess
import sys
import tomllib
from pathlib import Path

import msgspec
import pytest
import yaml

import nodeagent
from nodeagent import cli, documents
from nodeagent.cli import _output, devices, seats, status
from nodeagent.cli._output import Paint
from nodeagent.errors import Reason
from nodeagent.model import Device, DeviceClass, PodRef, SeatState, UsbDevice

ROOT = Path(__file__).parents[2]


def nodeagent_(*argv: object, **options: object) -> subprocess.CompletedProcess[str]:
    """Run `nodeagent ARGV` to its end."""
    env = {k: v for k, v in os.environ.items() if not k.startswith(("NO_COLOR", "GRPC"))} | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, "-m", "nodeagent", *map(str, argv)],
        **{"capture_output": True, "text": True, "timeout": 30, "env": env, **options},  # type: ignore[call-overload]
    )


@pytest.fixture
def config(tmp_path: Path, short_tmp: Path) -> Path:
    """A configuration file of a node without a daemon."""
    path = tmp_path / "config.yaml"
    path.write_text(
        yaml.safe_dump(
            {
                "state_dir": str(tmp_path / "state"),
                "run_dir": str(short_tmp),
                "devices": {
                    "simulated": [{"model": "printer", "serial": "P1"}],
                    "rules": [
                        {"name": "keys", "match": {"class": "ukey"}},
                        {"name": "printers", "match": {"class": "printer"}},
                    ],
                },
            }
        )
    )
    return path


def assert_no_traceback(done: subprocess.CompletedProcess[str]) -> None:
    assert "Traceback" not in done.stderr + (done.stdout or "")


# ---- usage


@pytest.mark.parametrize(
    "argv",
    [
        ["bogus"],
        ["status", "--bogus"],
        ["status", "-o", "xml"],
        ["config"],
        ["config", "bogus"],
        ["devices", "extra"],
        ["run", "--log-level", "loud"],
        ["--config"],
        ["stat"],
    ],
)
def test_usage_errors_exit_1_and_say_what_is_wrong(argv: list[str]) -> None:
    done = nodeagent_(*argv)
    assert done.returncode == cli.FAILED
    assert done.stderr.startswith("nodeagent") and done.stdout == ""
    assert_no_traceback(done)


def test_help_names_every_verb_and_every_exit_code() -> None:
    done = nodeagent_("--help")
    assert done.returncode == cli.FINE and done.stderr == ""
    for verb in cli.VERBS:
        assert re.search(rf"^  {verb} +\S", done.stdout, re.MULTILINE)
    assert "5 could not be determined" in done.stdout


def test_no_verb_prints_the_help_and_fails() -> None:
    done = nodeagent_()
    assert done.returncode == cli.FAILED and "verbs:" in done.stderr and done.stdout == ""


@pytest.mark.parametrize("verb", cli.VERBS)
def test_a_verb_is_a_module_of_its_own(verb: str) -> None:
    module = cli.verb(verb)
    assert verb == module.NAME and "\n" not in module.HELP and not module.HELP.endswith(".")
    parser = cli.Parser()
    cli.common(parser)
    module.arguments(parser)


# ---- version


def test_version() -> None:
    done = nodeagent_("version", "-o", "json")
    document = json.loads(done.stdout)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert document["schema"] == "nodeagent.version/v1"
    assert document["version"] == nodeagent.__version__ == project.get("version", nodeagent.__version__)
    assert nodeagent_("--version").stdout == nodeagent_("version").stdout


def test_version_loads_nothing_heavy() -> None:
    code = "import sys; from nodeagent.cli import main; main(['version']); print(*sys.modules, file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=30)
    loaded = set(done.stderr.split())
    assert not loaded & {"grpc", "asyncio", "aiohttp", "pyudev", "sqlite3", "nodeagent.daemon"}


# ---- configuration


def test_a_named_file_that_is_absent_is_a_configuration_error() -> None:
    for argv in (
        ["--config", "/nonexistent.yaml", "config", "show"],
        ["config", "--config", "/nonexistent.yaml", "show"],
        ["config", "show", "--config", "/nonexistent.yaml"],
        ["config", "check", "/nonexistent.yaml"],
        ["run", "--config", "/nonexistent.yaml"],
    ):
        done = nodeagent_(*argv)
        assert done.returncode == cli.CONFIG, argv
        assert "/nonexistent.yaml" in done.stderr
        assert_no_traceback(done)


@pytest.mark.parametrize("broken", ["run_dir: {dir}\nnonsense: 1\n", "run_dir: {dir}\ndevices: {{rules: [{{}}]}}\n"])
def test_a_file_that_became_unusable_does_not_keep_from_asking_the_daemon_why(tmp_path: Path, broken: str) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(broken.format(dir=tmp_path))
    for verb in (["status"], ["seats"], ["config", "show", "--running"], ["config", "reload"]):
        done = nodeagent_(*verb, "--config", path)
        assert done.returncode == cli.UNKNOWN, (verb, done.stderr)
        assert f"{tmp_path}/nodeagent.sock" in done.stderr
    assert nodeagent_("config", "show", "--config", path).returncode == cli.CONFIG


def test_a_wrong_key_is_named_with_its_path(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("devices:\n  rules:\n    - name: x\n      match: {}\n      give: everything\n")
    done = nodeagent_("config", "check", path)
    assert done.returncode == cli.CONFIG
    assert done.stderr.startswith(f"nodeagent: {path}: devices.rules[0].give: ")
    machine = nodeagent_("config", "check", path, "-o", "json")
    document = json.loads(machine.stdout)
    assert machine.returncode == cli.CONFIG
    assert document["ok"] is False and document["error"]["message"].startswith(
        "devices.rules[0].give", len(str(path)) + 2
    )


def test_the_effective_configuration_has_every_default(config: Path) -> None:
    done = nodeagent_("config", "show", "--config", config, "-o", "yaml")
    document = yaml.safe_load(done.stdout)
    assert document["schema"] == "nodeagent.config/v1" and document["source"] == "file"
    assert document["config"]["http"]["listen"] == "127.0.0.1:9410"
    table = nodeagent_("config", "show", "--config", config)
    assert yaml.safe_load(table.stdout) == document["config"], "the table can be used as a file"


def test_check_explains_which_rule_takes_a_device(config: Path) -> None:
    done = nodeagent_("config", "check", config)
    assert done.returncode == cli.FINE, done.stderr
    assert "(simulated)" in done.stdout
    assert "keys: class is printer, not ukey" in done.stdout
    assert "printers: takes it: opencdi.io/printer" in done.stdout
    assert done.stdout.rstrip().endswith(f"{config} is fine")
    explained = json.loads(nodeagent_("config", "check", config, "-o", "json").stdout)
    printer = next(d for d in explained["devices"] if d["device"]["simulated"])
    assert [(r["rule"], r["taken"]) for r in printer["rules"]] == [("keys", False), ("printers", True)]


def test_the_schema_is_json_schema() -> None:
    schema = json.loads(nodeagent_("config", "schema").stdout)
    assert schema["$schema"].startswith("https://json-schema.org/")
    assert "host_root" in schema["$defs"]["Config"]["properties"]


# ---- without a daemon


@pytest.mark.parametrize("argv", [["status"], ["seats"], ["config", "show", "--running"], ["config", "reload"]])
def test_without_a_daemon_the_answer_is_unknown(config: Path, argv: list[str]) -> None:
    done = nodeagent_("--config", config, *argv)
    assert done.returncode == cli.UNKNOWN and done.stdout == ""
    assert "no daemon answers at" in done.stderr and "hint: " in done.stderr
    assert_no_traceback(done)


def test_a_left_over_socket_is_told_from_none(config: Path, short_tmp: Path) -> None:
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(short_tmp / "nodeagent.sock"))
    done = nodeagent_("--config", config, "status")
    assert done.returncode == cli.UNKNOWN and "left over" in done.stderr


def test_devices_are_read_without_a_daemon(config: Path) -> None:
    done = nodeagent_("--config", config, "devices", "-o", "json")
    assert done.returncode == cli.FINE, done.stderr
    document = json.loads(done.stdout)
    assert document["schema"] == "nodeagent.devices/v1" and document["source"] == "direct"
    printer = next(d for d in document["devices"] if d["simulated"])
    assert (
        printer["class"] == "printer" and printer["resource"] == "opencdi.io/printer" and printer["rule"] == "printers"
    )
    assert printer["has_serial"] is True
    assert not (config.parent / "state").exists(), "looking changes nothing"
    table = nodeagent_("--config", config, "devices")
    assert "simulated, present" in table.stdout and "without a daemon" in table.stdout


def test_a_foreign_tree_is_read(config: Path, tmp_path: Path) -> None:
    tree = tmp_path / "captured"
    tree.mkdir()
    done = nodeagent_("--config", config, "devices", "--root", tree, "-o", "json")
    assert done.returncode == cli.FINE, done.stderr
    assert [d["simulated"] for d in json.loads(done.stdout)["devices"]] == [True]
    absent = nodeagent_("--config", config, "devices", "--root", "/nonexistent")
    assert absent.returncode == cli.FAILED and "/nonexistent" in absent.stderr


# ---- how it ends


def test_an_unexpected_error_is_one_line(tmp_path: Path) -> None:
    code = (
        "import sys; from nodeagent import cli; from nodeagent import documents; documents.VersionDocument.here = lambda: 1 / 0;"
        " sys.exit(cli.main(sys.argv[1:]))"
    )

    def run(*argv: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, "-c", code, *argv], capture_output=True, text=True, cwd=ROOT, timeout=30)

    done = run("version")
    assert done.returncode == cli.FAILED
    assert done.stderr == "nodeagent: ZeroDivisionError: division by zero\nhint: --debug shows more\n"
    debug = run("version", "--debug")
    assert debug.returncode == cli.FAILED and "Traceback" in debug.stderr


def test_a_closed_pipe_is_quiet() -> None:
    read_fd, write_fd = os.pipe()
    os.close(read_fd)
    for argv in (["config", "schema"], ["--help"], ["status", "--help"]):
        done = nodeagent_(*argv, capture_output=False, stdout=write_fd, stderr=subprocess.PIPE)
        assert done.returncode == -signal.SIGPIPE, (argv, done.stderr)
        assert done.stderr == ""
    os.close(write_fd)


def test_a_full_disk_is_an_error() -> None:
    with open("/dev/full", "w") as full:
        done = nodeagent_("version", capture_output=False, stdout=full, stderr=subprocess.PIPE)
    assert done.returncode == cli.FAILED
    assert "No space left on device" in done.stderr
    assert_no_traceback(done)


def test_ctrl_c_is_quiet(config: Path, short_tmp: Path) -> None:
    """A daemon that accepts and says nothing; the user gives up."""
    with socket.socket(socket.AF_UNIX) as silent:
        silent.bind(str(short_tmp / "nodeagent.sock"))
        silent.listen()
        asking = subprocess.Popen(
            [sys.executable, "-m", "nodeagent", "--config", config, "status"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )
        silent.settimeout(20)
        probe, _ = silent.accept()  # the look whether anybody listens
        connection, _ = silent.accept()  # gRPC
        asking.send_signal(signal.SIGINT)
        out, err = asking.communicate(timeout=20)
        probe.close()
        connection.close()
    assert asking.returncode == -signal.SIGINT, err
    assert (out, err) == ("", "")


def on_a_terminal(*argv: str, **env: str) -> str:
    ours, theirs = pty.openpty()
    done = subprocess.run(
        [sys.executable, "-m", "nodeagent", *argv],
        stdout=theirs,
        stderr=subprocess.PIPE,
        timeout=30,
        env={
            **{k: v for k, v in os.environ.items() if k != "NO_COLOR"},
            "PYTHONPATH": str(ROOT),
            "TERM": "xterm",
            **env,
        },
    )
    os.close(theirs)
    assert done.returncode == 0, done.stderr
    text = b""
    try:
        while part := os.read(ours, 65536):
            text += part
    except OSError:
        pass  # EIO: the other side is closed (pty(7))
    os.close(ours)
    return text.decode()


def test_colour_only_on_a_terminal_and_not_with_no_color(config: Path) -> None:
    argv = ("--config", str(config), "devices")
    assert "\x1b[" in on_a_terminal(*argv)
    assert "\x1b[" not in on_a_terminal(*argv, NO_COLOR="1")
    assert "\x1b[" not in on_a_terminal(*argv, TERM="dumb")
    assert "\x1b[" not in on_a_terminal(*argv, "-o", "json")
    assert "\x1b[" not in nodeagent_(*argv).stdout


# ---- tables


def test_a_serial_number_is_never_shown() -> None:
    usb = UsbDevice(port="1-4", vendor=0x3F0, product=0x2A, serial="VNB3-SECRET", manufacturer="HP", name="LaserJet")
    row = documents.device_row(Device(id="printer-x", cls=DeviceClass.PRINTER, usb=usb))
    assert row.has_serial and (row.vendor, row.product, row.name) == ("03f0", "002a", "HP LaserJet")
    assert "SECRET" not in msgspec.json.encode(row).decode() + devices.device_table([row], Paint(False))


def test_columns_line_up_with_wide_characters() -> None:
    text = _output.columns(("NAME", "PORT"), [("激光打印机", "1-1"), ("Laser", "1-2"), ("", "1-3")], Paint(False))
    lines = text.splitlines()
    assert [_output.width(line[: line.index("1-")]) for line in lines[1:]] == [12, 12, 12]
    assert lines[3].startswith("- ")


def test_a_table_shows_no_control_characters() -> None:
    text = _output.columns(("NAME",), [("evil\x1b[2J\n\u202ename",)], Paint(False))
    assert text.splitlines()[1] == "evil?[2J??name"


@pytest.mark.parametrize(
    ("seconds", "text"), [(-5, "0s"), (59, "59s"), (600, "10m"), (12000, "3h20m"), (450000, "5d5h"), (432000, "5d")]
)
def test_durations(seconds: float, text: str) -> None:
    assert _output.duration(seconds) == text


def test_amounts() -> None:
    assert [_output.amount(n) for n in (0, 812, 3482, 52428800, 3 << 30, 5 << 40)] == [
        "0",
        "812",
        "3.4K",
        "50M",
        "3.0G",
        "5.0T",
    ]


def test_status_says_problems_first_and_the_verdict_last() -> None:
    document = documents.StatusDocument(
        node="n1",
        version="1",
        pid=2,
        uptime_s=100,
        role="active",
        ready=True,
        kubelet=(documents.Registration(resource="opencdi.io/printer", registered=True, devices=2, healthy=1),),
        seats={SeatState.LIVE: 2},
        cri=documents.Peer(name="cri", state="connected"),
        api=documents.Peer(name="api", state="off"),
        config=documents.ConfigState(path="", loaded_s=1),
        problems=(documents.Problem(message="cupsd died", hint="look at its log"),),
    )
    lines = status.table(document, Paint(False)).splitlines()
    assert lines[:2] == ["! cupsd died", "  -> look at its log"]
    assert lines[-1] == "ready, with 1 problem"
    assert any("opencdi.io/printer  registered  1/2" in line for line in lines)


def test_seats_table() -> None:
    row = documents.SeatRow(
        pod=PodRef("office", "desk-1", "u1"),
        state=SeatState.BROKEN,
        since_s=0,
        message="the worker died",
        hint="it is made anew",
        devices=(documents.SeatDevice(id="printer-x", resource="r", present=False, simulated=True),),
        worker=documents.WorkerState(pid=0, uid=7, restarts=2),
        denied={Reason.NOT_YOURS: 3},
    )
    text = seats.table(documents.SeatsDocument(node="n1", seats=(row,)), Paint(False))
    assert "printer-x (simulated) (unplugged)" in text and "3 not_yours" in text
    assert text.splitlines()[-2:] == ["! office/desk-1: the worker died", "  -> it is made anew"]
