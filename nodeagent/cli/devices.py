"""`nodeagent devices`: the devices of this node, and where each of them went."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from nodeagent import cli
from nodeagent.cli import _client, _options
from nodeagent.cli._output import Cell, Paint, add_output, columns, emit, problem_lines, since, visible
from nodeagent.config import node_name
from nodeagent.documents import DeviceRow, DevicesDocument, Problem
from nodeagent.errors import AgentError, Reason

NAME = "devices"
HELP = "the devices of this node: what they are, which rule offers them, who holds them"


def arguments(parser: argparse.ArgumentParser) -> None:
    add_output(parser)
    _options.add_root(parser)


def run(args: argparse.Namespace) -> int:
    config = _options.configuration(args).config
    why: tuple[Problem, ...] = ()
    if args.root is None:
        try:
            raw = _client.ask(config.run_dir, NAME)
        except AgentError as error:
            if error.reason not in (Reason.NOT_RUNNING, Reason.DEADLINE):
                raise
            why = (Problem.of(error),)
        else:
            asked = _client.decode(raw, DevicesDocument)
            emit(raw, args.output, lambda paint: table(asked, paint))
            return cli.FINE
    from nodeagent.cli import _direct

    with _options.root(args) as root:
        found = _direct.look(config, root)
    node = node_name(config) if args.root is None else str(args.root)
    document = DevicesDocument(node=node, source="direct", devices=found.rows, problems=why + found.problems)
    emit(document, args.output, lambda paint: table(document, paint))
    return cli.FINE


def table(document: DevicesDocument, paint: Paint) -> str:
    """Problems, the devices, and whether a daemon was asked."""
    lines = problem_lines(document.problems, paint)
    if lines:
        lines.append("")
    if document.devices:
        lines.append(device_table(document.devices, paint))
    else:
        lines.append("no devices")
    if document.source == "direct":
        lines += ["", paint("read from the system without a daemon: nothing is known about who holds what", "dim")]
    return "\n".join(lines)


def device_table(devices: Sequence[DeviceRow], paint: Paint) -> str:
    """One row per device; below them, why some are not offered."""
    heads = ("ID", "CLASS", "NAME", "USB ID", "PORT", "STATE", "RESOURCE", "RULE", "HELD BY")
    lines = [columns(heads, [_row(device) for device in devices], paint)]
    refused = [device for device in devices if device.unoffered]
    if refused:
        lines.append("")
    lines += [
        f"not offered: {visible(d.id or d.port)}: {visible(d.unoffered.removeprefix(d.id + ': '))}" for d in refused
    ]
    return "\n".join(lines)


def _row(device: DeviceRow) -> list[str | Cell]:
    state = Cell("present", "green") if device.present else Cell("unplugged", "red")
    if device.present and not device.healthy:
        state = Cell("held under another name", "yellow")
    if device.simulated:
        state = Cell(f"simulated, {state.text}", "yellow")
    held = device.held_by
    holder = "" if held is None else f"{held.pod or 'not seen yet'} for {since(held.since_s)}"
    return [
        device.id,
        device.class_,
        device.name,
        f"{device.vendor}:{device.product}",
        device.port,
        state,
        device.resource,
        device.rule,
        holder,
    ]
