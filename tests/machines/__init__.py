"""Machines as sysfs trees: one JSON file each, written by hand in the kernel's layout from published descriptors.

`{"about": ..., "tree": {directory: {name: value}}}`; a value is the text of the file (the kernel ends it with a newline),
`hex:...` for bytes, or `->...` for a link (below /sys). The links in /sys/bus/usb/devices follow from the tree.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

from nodeagent.host import HostRoot

HERE = Path(__file__).parent
NAMES = tuple(sorted(path.stem for path in HERE.glob("*.json")))

Tree = dict[str, dict[str, str]]


def tree(name: str) -> Tree:
    """The directories of one machine with their files."""
    found: Tree = json.loads((HERE / f"{name}.json").read_text())["tree"]
    return found


def materialise(root: Path, *trees: Tree) -> HostRoot:
    """Write trees below `root`, over what is there."""
    devices = root / "sys/bus/usb/devices"
    devices.mkdir(parents=True, exist_ok=True)
    for directories in trees:
        for directory, files in directories.items():
            path = root / directory.lstrip("/")
            path.mkdir(parents=True, exist_ok=True)
            for name, value in files.items():
                _write(root, path / name, value)
            if {"idVendor", "bInterfaceNumber"} & files.keys():
                _link(devices / path.name, path)
    return HostRoot(root)


def machine(root: Path, name: str) -> HostRoot:
    return materialise(root, tree(name))


def _write(root: Path, path: Path, value: str) -> None:
    if value.startswith("->"):
        _link(path, root / "sys" / value[2:].lstrip("/"))
    elif value.startswith("hex:"):
        path.write_bytes(bytes.fromhex(value[4:]))
    else:
        path.write_text(f"{value}\n")


def _link(path: Path, target: Path) -> None:
    path.unlink(missing_ok=True)
    path.symlink_to(os.path.relpath(target, path.parent))
