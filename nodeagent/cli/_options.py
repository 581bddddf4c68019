"""Options that several verbs share, and what they mean."""

from __future__ import annotations

import argparse
import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path

import msgspec

from nodeagent.config import DEFAULT_PATH, Config, load, run_dir_of
from nodeagent.errors import AgentError, ConfigError, Reason


class Loaded(msgspec.Struct, frozen=True):
    """A configuration and where it came from; `path` is empty when the defaults are used."""

    config: Config
    path: str


def add_root(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--root",
        metavar="PATH",
        type=Path,
        help="read a captured or foreign file tree, or a file of `nodeagent record`, instead of this system",
    )


@contextlib.contextmanager
def root(args: argparse.Namespace) -> Iterator[Path | None]:
    """The tree that --root names: the directory itself, or a recording given out into a directory of its own, which is gone
    afterwards. None where --root was not given.

    Raises AgentError for what is neither.
    """
    given: Path | None = args.root
    if given is None or given.is_dir():
        yield given
        return
    if not given.exists():
        raise AgentError(Reason.INTERNAL, f"--root {given}: there is no such directory or recording")
    from nodeagent.devices import recording

    tree = recording.load(given).tree
    with tempfile.TemporaryDirectory(prefix="nodeagent-recording-") as directory:
        recording.materialise(Path(directory), tree)
        yield Path(directory)


def configuration(args: argparse.Namespace) -> Loaded:
    """The file named by --config, else the default one, else (when that one is absent) the defaults.

    Raises ConfigError, with the file and the path of the key, when the file cannot be used.
    """
    path: Path = args.config or DEFAULT_PATH
    if args.config is None and not path.exists():
        return Loaded(Config(), "")
    return Loaded(load_named(path), str(path))


def run_dir(args: argparse.Namespace) -> str:
    """Where the daemon is asked. A file that cannot be used any more does not keep it from answering: it tells why.

    Raises ConfigError for a file that is named and is not there.
    """
    try:
        return configuration(args).config.run_dir
    except ConfigError:
        path: Path = args.config or DEFAULT_PATH
        if not path.exists():
            raise
        return run_dir_of(path)


def load_named(path: Path) -> Config:
    """`load`, with the name of the file in every error."""
    try:
        return load(path)
    except ConfigError as error:
        if error.message.startswith(str(path)):
            raise
        raise ConfigError(f"{path}: {error.message}", hint=error.hint) from error
