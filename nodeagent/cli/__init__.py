"""The command line: a table of verbs, and what every verb has in common.

A verb is a module with `NAME`, `HELP` (one line), `arguments(parser)` and `run(args) -> exit code`. It is imported only
when it is asked for, and imports what is heavy (gRPC, YAML) inside `run`, so that `nodeagent version` starts at once.

Exit codes: 0 fine; 1 usage or internal error; 2 configuration error; 3 a check failed; 4 warnings only, with
`--fail-on warn`; 5 could not be determined.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import NoReturn, Protocol, cast

from nodeagent.errors import AgentError, Reason

FINE, FAILED, CONFIG, CHECK_FAILED, WARNINGS, UNKNOWN = range(6)
"""The exit codes."""

VERBS = {
    "run": "nodeagent.cli.run",
    "demo": "nodeagent.cli.demo",
    "status": "nodeagent.cli.status",
    "devices": "nodeagent.cli.devices",
    "seats": "nodeagent.cli.seats",
    "config": "nodeagent.cli.config",
    "record": "nodeagent.cli.record",
    "version": "nodeagent.cli.version",
}

EXIT_CODES = {
    Reason.CONFIG_INVALID: CONFIG,
    Reason.NOT_RUNNING: UNKNOWN,
    Reason.DEADLINE: UNKNOWN,
    Reason.KUBELET_UNAVAILABLE: UNKNOWN,
    Reason.CRI_UNAVAILABLE: UNKNOWN,
    Reason.UPSTREAM_UNAVAILABLE: UNKNOWN,
}


class Verb(Protocol):
    """What a verb's module has; see above."""

    NAME: str
    HELP: str

    def arguments(self, parser: argparse.ArgumentParser) -> None: ...

    def run(self, args: argparse.Namespace) -> int: ...


class Parser(argparse.ArgumentParser):
    """argparse ends with 2 on a usage error; here 2 means that the configuration is wrong."""

    def print_help(self, file: object = None) -> None:
        """argparse says nothing of a help text that could not be written."""
        sys.stdout.write(self.format_help())

    def error(self, message: str) -> NoReturn:
        self.exit(FAILED, f"{self.prog}: {message}\n{self.format_usage()}Try '{self.prog} --help'.\n")


def common(parser: argparse.ArgumentParser) -> None:
    """Options that may stand before or after the verb."""
    parser.add_argument(
        "--config",
        metavar="FILE",
        type=Path,
        default=argparse.SUPPRESS,
        help="configuration file (default /etc/nodeagent/config.yaml; without that file, the defaults)",
    )
    parser.add_argument(
        "--debug", action="store_true", default=argparse.SUPPRESS, help="say more, and show where an error arose"
    )


def verb(name: str) -> Verb:
    return cast(Verb, import_module(VERBS[name]))


def _top() -> Parser:
    parser = Parser(prog="nodeagent", usage="nodeagent [options] VERB ...", add_help=False, allow_abbrev=False)
    common(parser)
    parser.add_argument("-h", "--help", action="store_true")
    parser.add_argument("--version", action="store_true")
    parser.add_argument("verb", nargs="?")
    parser.add_argument("rest", nargs=argparse.REMAINDER)
    return parser


def _help() -> str:
    lines = [
        "usage: nodeagent [options] VERB ...",
        "",
        "The node daemon of container desktops: devices in the right hands, whatever the sandbox.",
        "",
        "verbs:",
        *(f"  {name:<10} {verb(name).HELP}" for name in VERBS),
        "",
        "options:",
        "  --config FILE  configuration file (default /etc/nodeagent/config.yaml; without that file, the defaults)",
        "  --debug        say more, and show where an error arose",
        "  -h, --help     this text; 'nodeagent VERB --help' says more about a verb",
        "  --version      the same as 'nodeagent version'",
        "",
        "exit codes: 0 fine, 1 usage or internal error, 2 configuration error, 3 a check failed,",
        "            4 warnings only (with --fail-on warn), 5 could not be determined",
        "",
    ]
    return "\n".join(lines)


def _dispatch(argv: Sequence[str]) -> int:
    top = _top().parse_args(argv)
    name = "version" if top.version and top.verb is None else top.verb
    if top.help or name is None:
        (sys.stdout if top.help else sys.stderr).write(_help())
        return FINE if top.help else FAILED
    if name not in VERBS:
        sys.stderr.write(f"nodeagent: there is no verb {name!r}; there are {', '.join(VERBS)}\n")
        return FAILED
    module = verb(name)
    parser = Parser(prog=f"nodeagent {name}", description=module.HELP, allow_abbrev=False)
    common(parser)
    module.arguments(parser)
    start = argparse.Namespace(debug=False, config=None)
    for key in ("debug", "config"):
        if key in top:
            setattr(start, key, getattr(top, key))
    args = parser.parse_args(top.rest, start)
    if args.debug:
        from nodeagent import logs

        logs.configure("text", "debug")
    return module.run(args)


def complain(message: str, hint: str = "") -> None:
    """One line on stderr about what went wrong, one about what to do."""
    sys.stderr.write(f"nodeagent: {_line(message)}\n")
    if hint:
        sys.stderr.write(f"hint: {_line(hint)}\n")


def _line(text: str) -> str:
    return "".join(c if c.isprintable() else " " for c in text)


def _said(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


def _die_of(number: signal.Signals) -> int:
    """End as the shell expects of a program that a signal ended (128 + number), without a word."""
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)
    return 128 + number  # the first process of a container does not die of a signal it has no handler for


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line and return its exit code; a message to a person never is a traceback."""
    argv = sys.argv[1:] if argv is None else argv
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    try:
        code = _dispatch(argv)
        if sys.stdout is not None:
            sys.stdout.flush()
    except SystemExit as leave:
        return _flushed(leave.code if isinstance(leave.code, int) else FINE)
    except KeyboardInterrupt:
        return _die_of(signal.SIGINT)
    except BrokenPipeError:
        _abandon_stdout()
        return _die_of(signal.SIGPIPE)
    except AgentError as error:
        complain(error.message, error.hint)
        return EXIT_CODES.get(error.reason, FAILED)
    except Exception as error:
        if "--debug" in argv:
            raise
        _flushed(FAILED)
        complain(_said(error), "--debug shows more")
        return FAILED
    return code


def _flushed(code: int) -> int:
    """`code`, once what was printed is out; a reader that went away meanwhile is no error to report."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        _abandon_stdout()
        return _die_of(signal.SIGPIPE)
    except (OSError, AttributeError):
        _abandon_stdout()
        return FAILED
    return code


def _abandon_stdout() -> None:
    """Let the interpreter's last flush of what could not be written go nowhere instead of printing a traceback."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.close(null)
