"""`nodeagent run`: the daemon, in the foreground."""

from __future__ import annotations

import argparse

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
    from nodeagent import daemon, logs

    logs.configure("auto", args.log_level or ("debug" if args.debug else None))
    return daemon.main(args.config or DEFAULT_PATH, explicit=args.config is not None)
