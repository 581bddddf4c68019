"""`nodeagent run`: the daemon, in the foreground."""

from __future__ import annotations

import argparse
import os

from nodeagent.config import DEFAULT_PATH

NAME = "run"
HELP = "run the daemon of this node (root)"


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--log-level",
        choices=("debug", "info", "warning", "error"),
        help="the least that is logged (default info; debug with --debug)",
    )


def run(args: argparse.Namespace) -> int:
    os.environ.setdefault(
        "GRPC_VERBOSITY", "NONE"
    )  # its own lines are not structured, and tell of every peer that restarts
    from nodeagent import daemon, logs

    logs.configure("auto", args.log_level or ("debug" if args.debug else None))
    return daemon.main(args.config or DEFAULT_PATH, explicit=args.config is not None)
