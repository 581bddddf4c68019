"""`nodeagent seats`: which desktop has what."""

from __future__ import annotations

import argparse

import msgspec

from nodeagent import cli
from nodeagent.cli import _client, _options
from nodeagent.cli._output import Cell, Colour, Paint, add_output, amount, columns, emit, since, visible
from nodeagent.documents import SeatRow, SeatsDocument
from nodeagent.model import SeatState

NAME = "seats"
HELP = "the seats of this node: which desktop holds which devices, and how its worker is"

COLOURS: dict[SeatState, Colour] = {SeatState.LIVE: "green", SeatState.BROKEN: "red", SeatState.CLOSED: "dim"}


def arguments(parser: argparse.ArgumentParser) -> None:
    add_output(parser)
    parser.add_argument("-n", "--namespace", help="only desktops of this namespace")


def run(args: argparse.Namespace) -> int:
    raw = _client.ask(_options.run_dir(args), NAME)
    document = _client.decode(raw, SeatsDocument)
    if args.namespace is None:
        emit(raw, args.output, lambda paint: table(document, paint))
    else:
        ours = tuple(seat for seat in document.seats if seat.pod.namespace == args.namespace)
        document = msgspec.structs.replace(document, seats=ours)
        emit(document, args.output, lambda paint: table(document, paint))
    return cli.FINE


def table(document: SeatsDocument, paint: Paint) -> str:
    """One row per seat; below them, why those that are not live are not."""
    seats = document.seats
    if not seats:
        return f"no seats on {visible(document.node)}"
    heads = ("DESKTOP", "STATE", "SINCE", "SANDBOX", "DEVICES", "SERVICES", "WORKER", "JOBS", "IN/OUT", "DENIED")
    lines = [columns(heads, [_row(seat) for seat in seats], paint)]
    for seat in seats:
        if seat.message:
            lines += ["", f"{paint('!', 'yellow')} {visible(str(seat.pod))}: {visible(seat.message)}"]
            if seat.hint:
                lines.append(f"  -> {visible(seat.hint)}")
    return "\n".join(lines)


def _row(seat: SeatRow) -> list[str | Cell]:
    devices = [
        device.id + (" (simulated)" if device.simulated else "") + ("" if device.present else " (unplugged)")
        for device in seat.devices
    ]
    worker = seat.worker
    count = worker.restarts if worker else 0
    restarts = f", {count} restart{'' if count == 1 else 's'}" if count else ""
    jobs = seat.jobs
    return [
        str(seat.pod),
        Cell(seat.state, COLOURS.get(seat.state)),
        since(seat.since_s),
        seat.sandbox or "",
        ", ".join(devices),
        ", ".join(seat.services),
        f"{worker.pid or 'none'} uid {worker.uid}{restarts}" if worker else "",
        f"{jobs.open} open, {jobs.done} done"
        + (f", {jobs.cancelled} cancelled" if jobs.cancelled else "")
        + (f", {jobs.failed} failed" if jobs.failed else ""),
        f"{amount(seat.bytes_in)}/{amount(seat.bytes_out)}",
        Cell(", ".join(f"{count} {reason}" for reason, count in sorted(seat.denied.items())), "yellow"),
    ]
