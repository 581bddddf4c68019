"""`nodeagent record`: the USB devices of this node in a file without serial numbers, and back out of it."""

from __future__ import annotations

import argparse
import contextlib
import re
import sys
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from nodeagent import cli
from nodeagent.cli import _options
from nodeagent.cli._output import visible
from nodeagent.errors import AgentError, Reason
from nodeagent.host import HostRoot

if TYPE_CHECKING:
    from nodeagent.config import Config
    from nodeagent.devices.recording import Recording, Uevent

NAME = "record"
HELP = "record USB devices to a file, without serial numbers, or give a recording out to run on"
PORT = re.compile(r"usb[0-9]+|[0-9]+-[0-9]+(\.[0-9]+)*")
MAX_SECONDS = 3600.0


def arguments(parser: argparse.ArgumentParser) -> None:
    _options.add_root(parser)
    parser.add_argument(
        "--events", metavar="SECONDS", type=_seconds, default=0.0, help="also listen for so long: plug, unplug, print"
    )
    parser.add_argument(
        "--replay",
        metavar="RECORDING",
        type=Path,
        help="the other way round: FILE is a new directory for the tree of this recording, on which a daemon with "
        "`host_root: FILE` runs; events in it are played as changes of the tree",
    )
    parser.add_argument("devices", metavar="DEVICE", nargs="*", help="device id or USB port (1-1.4); default: all")
    parser.add_argument("file", metavar="FILE", type=Path, help="the new file, - for stdout")


def _seconds(text: str) -> float:
    seconds = float(text)
    if not 0 < seconds <= MAX_SECONDS:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and {MAX_SECONDS:g}")
    return seconds


def run(args: argparse.Namespace) -> int:
    if args.replay is not None:
        return _replay(args)
    if str(args.file) != "-" and args.file.exists():
        raise AgentError(Reason.INTERNAL, f"{args.file} exists already", hint="name another file, or remove this one")
    if args.events and args.root is not None:
        raise AgentError(Reason.NOT_SUPPORTED, "--events listens to this node's kernel, which says nothing of --root")
    with _options.root(args) as root:
        made, replaced = _recorded(args, root)
    text = msgspec.json.format(msgspec.json.encode(made), indent=1) + b"\n"
    if str(args.file) == "-":
        sys.stdout.buffer.write(text)
    else:
        with args.file.open("xb") as file:
            file.write(text)
    events = f", {len(made.uevents)} event{'s' * (len(made.uevents) != 1)}" if args.events else ""
    _say(f"{args.file}: {_device_count(made)}{events}, {len(text)} bytes")
    for directory in made.devices:
        files = made.tree[directory]
        name = f"{files.get('manufacturer', '')} {files.get('product', '')}".strip()
        ids = f"{files.get('idVendor', '')}:{files.get('idProduct', '')}"
        _say(f"  {directory.rpartition('/')[2]}  {ids}  {name}")
    _say(
        f"serial numbers and hardware addresses removed: {replaced}. "
        "Nothing was taken but descriptors and what the drivers say; look it over before you hand it on"
    )
    return cli.FINE


def _recorded(args: argparse.Namespace, root: Path | None) -> tuple[Recording, int]:
    from nodeagent.devices import recorder as recorders
    from nodeagent.devices.recording import Recording

    config = _options.configuration(args).config
    host = HostRoot(root or config.host_root)
    ports = _ports(args.devices, config, root)
    events = None
    if args.events:
        try:
            events = recorders.KernelEvents()  # before the tree is read, so that nothing falls between the two
        except (ImportError, OSError) as error:
            raise AgentError(
                Reason.UPSTREAM_UNAVAILABLE, f"kernel events cannot be heard: {error}", hint="leave --events out"
            ) from error
    recorder = recorders.Recorder(host)
    tree = recorder.tree(ports)
    uevents: list[Uevent] = []
    if events is not None:
        _say(f"listening for {args.events:g} s; Ctrl-C ends it earlier")
        with contextlib.suppress(KeyboardInterrupt):
            for event in events.heard(args.events):
                uevents.append(recorders.uevent(recorder, event))
                _say(f"  {event.at_s:8.3f} s  {event.action} {event.devpath}")
    made = Recording(
        kernel=host.attribute("/proc/sys/kernel/osrelease"),
        recorded="" if root else datetime.now(UTC).isoformat(timespec="seconds"),
        tree=tree,
        uevents=tuple(uevents),
    )
    return made, recorder.stand_ins.count


def _ports(named: Sequence[str], config: Config, root: Path | None) -> list[str]:
    """The ports of the devices that were named. Raises AgentError for an id that no device has."""
    ports = [name for name in named if PORT.fullmatch(name)]
    ids = [name for name in named if not PORT.fullmatch(name)]
    if not ids:
        return ports
    from nodeagent.cli import _direct

    found = _direct.look(config, root)
    at = {row.id: row.port for row in found.rows if row.id}
    for name in ids:
        if name not in at:
            why = "; ".join(problem.message for problem in found.problems)
            raise AgentError(
                Reason.DEVICE_UNKNOWN,
                f"no device has the id {name}" + (f": {why}" if why else ""),
                hint="`nodeagent devices` lists ids and ports; name the port instead",
            )
        ports.append(at[name])
    return ports


def _replay(args: argparse.Namespace) -> int:
    if args.devices or args.root is not None or args.events:
        raise AgentError(Reason.INTERNAL, "--replay RECORDING goes with one directory and nothing else")
    from nodeagent.devices import recording

    made = recording.load(args.replay)
    directory: Path = args.file
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise AgentError(
            Reason.INTERNAL, f"{directory} is there and not an empty directory", hint="name a new directory"
        )
    recording.materialise(directory, made.tree)
    print(f"{directory}: {_device_count(made)}; run a daemon with `host_root: {directory.resolve()}`")
    if made.uevents:
        many = f"{len(made.uevents)} events follow" if len(made.uevents) > 1 else "1 event follows"
        print(f"{many}; set `devices.resync` short, a tree has no hotplug events", flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            play(directory, made.uevents)
    return cli.FINE


def play(directory: Path, uevents: Sequence[Uevent], sleep: Callable[[float], None] = time.sleep) -> None:
    """Play events at their times, counted from now."""
    from nodeagent.devices import recording

    passed = 0.0
    for event in uevents:
        sleep(max(0.0, min(event.at_s, MAX_SECONDS) - passed))
        passed = max(passed, event.at_s)
        recording.play(directory, event)
        print(f"  {event.at_s:8.3f} s  {event.action} {visible(event.devpath)}", flush=True)


def _device_count(made: Recording) -> str:
    count = len(made.devices)
    return f"{count} USB device{'s' * (count != 1)} (hubs too)"


def _say(line: str) -> None:
    """On stderr, since the recording itself may go to stdout."""
    sys.stderr.write(f"{visible(line)}\n")
