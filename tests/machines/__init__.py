"""Devices as recordings (`nodeagent.recording/v1`), one file each. `about` says where the facts of each come from."""

from __future__ import annotations

from pathlib import Path

from nodeagent.devices import recording
from nodeagent.devices.recording import Tree
from nodeagent.host import HostRoot

HERE = Path(__file__).parent
NAMES = tuple(sorted(path.stem for path in HERE.glob("*.json")))


def tree(name: str) -> Tree:
    """The directories of one recording with their files."""
    return recording.take_recording((HERE / f"{name}.json").read_bytes()).tree


def materialise(root: Path, *trees: Tree) -> HostRoot:
    """Write trees below `root`, over what is there."""
    for directories in trees:
        recording.materialise(root, directories)
    return HostRoot(root)


def machine(root: Path, name: str) -> HostRoot:
    return materialise(root, tree(name))
