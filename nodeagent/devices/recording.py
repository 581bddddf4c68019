"""Recordings: the USB devices of a node as one file, and the file as a tree that a daemon can run on.

A recording may come from anybody. Given out, it makes plain files, directories and links below one directory, and nothing else
anywhere. devices/recorder.py makes recordings.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal

import msgspec

from nodeagent.devices import sysfs
from nodeagent.errors import AgentError, Reason
from nodeagent.host import HostRoot

Tree = dict[str, dict[str, str]]
"""Directory below / -> name -> value: the text of a file (the kernel ends it with a newline), `hex:...` for bytes, or
`->...` for a link, below /sys. The links in /sys/bus/usb/devices follow from the tree."""

MAX_FILE_BYTES = 32 << 20
MAX_DIRECTORIES = 32768
MAX_UEVENTS = 4096
TOP = ("sys", "devices")
BUS = sysfs.BUS
COMPONENT = re.compile(r"[A-Za-z0-9._:@+!#,=~ -]{1,128}")


class Uevent(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One event of the kernel, `at_s` seconds after the recording began. `files` is what its directory then held."""

    at_s: float
    action: Annotated[str, msgspec.Meta(pattern="^[a-z]{1,16}$")]
    devpath: str
    files: dict[str, str] = {}


class Recording(msgspec.Struct, frozen=True, kw_only=True):
    """The devices of a node. `kernel` and `recorded` are empty where nobody recorded them: `about` then says what they are."""

    schema: Literal["nodeagent.recording/v1"] = "nodeagent.recording/v1"
    about: str = ""
    kernel: str = ""
    recorded: str = ""
    tree: Tree
    uevents: Annotated[tuple[Uevent, ...], msgspec.Meta(max_length=MAX_UEVENTS)] = ()

    @property
    def devices(self) -> tuple[str, ...]:
        """The directories of its USB devices, hubs too."""
        return tuple(directory for directory, files in self.tree.items() if "idVendor" in files)


def load(file: Path) -> Recording:
    """Raises AgentError for a file that is no recording of ours, OSError for one that cannot be read."""
    with file.open("rb") as opened:
        untrusted = opened.read(MAX_FILE_BYTES + 1)
    try:
        return take_recording(untrusted)
    except ValueError as error:
        raise AgentError(
            Reason.MALFORMED, f"{file} is no recording: {error}", hint="`nodeagent record FILE` makes one"
        ) from error


def take_recording(untrusted: bytes) -> Recording:
    """Raises ValueError (of which msgspec's errors are kinds)."""
    if len(untrusted) > MAX_FILE_BYTES:
        raise ValueError(f"longer than {MAX_FILE_BYTES >> 20} MiB")
    return msgspec.json.decode(untrusted, type=Recording)


def materialise(root: Path, tree: Mapping[str, Mapping[str, str]]) -> HostRoot:
    """Write a tree below `root`, over what is there. Raises AgentError for a tree that would write anywhere else."""
    devices = root / BUS.lstrip("/")
    devices.mkdir(parents=True, exist_ok=True)
    if len(tree) > MAX_DIRECTORIES:
        raise _refused(f"more than {MAX_DIRECTORIES} directories")
    for directory, files in tree.items():
        path = _directory(root, directory)
        for name, value in files.items():
            _put(root, path / _component(name), value)
        if {"idVendor", "bInterfaceNumber"} & files.keys():
            _link(devices / path.name, path)
    return HostRoot(root)


def play(root: Path, event: Uevent) -> None:
    """Change the tree below `root` the way the event says. Raises AgentError as `materialise` does."""
    name = f"/sys{event.devpath}"
    if event.action == "remove":
        path = _directory(root, name)
        shutil.rmtree(path)
        (root / BUS.lstrip("/") / path.name).unlink(missing_ok=True)
    elif event.files:
        path = _directory(root, name)
        for entry in [*path.iterdir()]:
            if (entry.is_symlink() or entry.is_file()) and entry.name not in event.files:
                entry.unlink()
        materialise(root, {name: event.files})


def _directory(root: Path, directory: str) -> Path:
    """Make it, one step at a time: a step that is a link would lead to a place that was not checked."""
    parts = tuple(_component(part) for part in directory.strip("/").split("/"))
    if parts[: len(TOP)] != TOP or len(parts) == len(TOP):
        raise _refused(f"{directory!r} is not below /{'/'.join(TOP)}")
    path = root
    for part in parts:
        path /= part
        if path.is_symlink() or (path.exists() and not path.is_dir()):
            raise _refused(f"{directory!r} leads through a file or a link")
        path.mkdir(exist_ok=True)
    return path


def _put(root: Path, path: Path, value: str) -> None:
    if path.is_dir() and not path.is_symlink():
        raise _refused(f"{path.name!r} is a file and a directory")
    if value.startswith("->"):
        parts = [_component(part) for part in value[2:].strip("/").split("/")]
        _link(path, root.joinpath("sys", *parts))
        return
    path.unlink(missing_ok=True)
    if not value.startswith("hex:"):
        path.write_bytes(f"{value}\n".encode(errors="replace"))
        return
    try:
        path.write_bytes(bytes.fromhex(value[4:]))
    except ValueError as error:
        raise _refused(f"{path.name!r} is not hexadecimal") from error


def _link(path: Path, target: Path) -> None:
    path.unlink(missing_ok=True)
    path.symlink_to(os.path.relpath(target, path.parent))


def _component(name: str) -> str:
    if name in (".", "..") or not COMPONENT.fullmatch(name):
        raise _refused(f"{name!r} cannot be the name of a file here")
    return name


def _refused(why: str) -> AgentError:
    return AgentError(Reason.MALFORMED, f"the recording cannot be given out: {why}")
