"""`nodeagent version`: what runs here."""

from __future__ import annotations

import argparse

from nodeagent.cli._output import add_output, emit
from nodeagent.documents import VersionDocument

NAME = "version"
HELP = "the version of the agent, of Python and of the kernel"


def arguments(parser: argparse.ArgumentParser) -> None:
    add_output(parser)


def run(args: argparse.Namespace) -> int:
    here = VersionDocument.here()
    emit(here, args.output, lambda paint: f"nodeagent {here.version} (Python {here.python}, {here.system})")
    return 0
