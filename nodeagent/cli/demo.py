"""`nodeagent demo`: the main job on this machine, told as it happens (`make run`)."""

from __future__ import annotations

import argparse
from pathlib import Path

from nodeagent import cli
from nodeagent.cli._output import Paint, visible

NAME = "demo"
HELP = "the main job on this machine: two gVisor desktops, their printers, and what one cannot do to the other (root)"


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--once", action="store_true", help="one round, then a JSON summary as the last line")
    parser.add_argument(
        "--keep", metavar="DIR", type=Path, help="put configuration, log and state of the daemon there, and leave them"
    )


def run(args: argparse.Namespace) -> int:
    import asyncio

    import msgspec

    from nodeagent.demo.story import perform
    from nodeagent.demo.telling import Outcome

    paint = Paint.for_stdout()

    def say(line: str) -> None:
        print(paint(f"    {visible(line)}", "dim"), flush=True)

    def tell(outcome: Outcome) -> None:
        mark = paint("ok  ", "green") if outcome.ok else paint("FAIL", "red")
        print(f"{mark} {outcome.name:<10} {outcome.seconds:6.2f} s  {visible(outcome.detail)}", flush=True)

    summary = asyncio.run(perform(once=args.once, keep=args.keep, say=say, tell=tell))
    if args.once:
        print(msgspec.json.encode(summary).decode(), flush=True)
    return cli.FINE if summary.ok else cli.CHECK_FAILED
