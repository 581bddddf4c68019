"""`nodeagent status`: how the daemon of this node is."""

from __future__ import annotations

import argparse

from nodeagent import cli
from nodeagent.cli import _client, _options
from nodeagent.cli._output import Cell, Paint, add_output, columns, duration, emit, problem_lines, since, visible
from nodeagent.documents import Peer, StatusDocument

NAME = "status"
HELP = "how the daemon of this node is; exit 3 when it is not ready"


def arguments(parser: argparse.ArgumentParser) -> None:
    add_output(parser)
    parser.add_argument("--fail-on", choices=("fail", "warn"), default="fail", help="warn: problems alone exit 4")


def run(args: argparse.Namespace) -> int:
    raw = _client.ask(_options.run_dir(args), NAME)
    status = _client.decode(raw, StatusDocument)
    emit(raw, args.output, lambda paint: table(status, paint))
    if not status.ready:
        return cli.CHECK_FAILED
    return cli.WARNINGS if status.problems and args.fail_on == "warn" else cli.FINE


def table(status: StatusDocument, paint: Paint) -> str:
    """Problems first, facts below, the verdict in the last line."""
    lines = problem_lines(status.problems, paint)
    if lines:
        lines.append("")
    devices = status.devices
    seats = ", ".join(f"{count} {state}" for state, count in sorted(status.seats.items()) if count) or "none"
    facts = [
        ("node", f"{status.node}, {status.role}, nodeagent {status.version}, pid {status.pid}"),
        ("up", duration(status.uptime_s)),
        ("config", _config(status)),
        (
            "devices",
            f"{devices.known} known ({devices.simulated} simulated), {devices.present} present, "
            f"{devices.offered} offered, {devices.leased} leased",
        ),
        ("seats", f"{seats}; {status.leases} lease{'' if status.leases == 1 else 's'}"),
        ("runtime", _peer(status.cri)),
        ("api", _peer(status.api)),
        *((upstream.name, _peer(upstream)) for upstream in status.upstreams),
        ("outbox", f"{status.outbox.length} waiting, {status.outbox.dropped} dropped"),
    ]
    lines += [f"{paint(name.ljust(8), 'dim')}  {visible(fact)}" for name, fact in facts]
    if status.kubelet:
        rows = [
            (
                r.resource,
                Cell("registered", "green") if r.registered else Cell("waiting", "yellow"),
                f"{r.healthy}/{r.devices}",
                since(r.since_s),
                r.message,
            )
            for r in status.kubelet
        ]
        lines += ["", columns(("RESOURCE", "KUBELET", "HEALTHY", "SINCE", "NOTE"), rows, paint)]
    return "\n".join([*lines, "", _verdict(status, paint)])


def _verdict(status: StatusDocument, paint: Paint) -> str:
    if not status.ready:
        why = "; ".join(status.not_ready) or "it does not say why"
        return paint(f"not ready: {visible(why)}", "red")
    if status.problems:
        return paint(f"ready, with {len(status.problems)} problem{'s' * (len(status.problems) > 1)}", "yellow")
    return paint("ready", "green")


def _config(status: StatusDocument) -> str:
    config = status.config
    text = f"{config.path or 'defaults'}, loaded {since(config.loaded_s)} ago"
    return f"{text}; the file as it is now was refused: {config.last_error}" if config.last_error else text


def _peer(peer: Peer) -> str:
    parts: list[str] = [peer.state]
    if peer.since_s:
        parts.append(f"for {since(peer.since_s)}")
    if peer.pid:
        parts.append(f"pid {peer.pid}")
    if peer.restarts:
        parts.append(f"{peer.restarts} restart{'' if peer.restarts == 1 else 's'}")
    if peer.message:
        parts.append(peer.message)
    return ", ".join(parts)
