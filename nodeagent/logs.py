"""Structured logs on stderr: one line per event, for people (text) or machines (JSON lines).

    log = logs.logger(__name__)
    log.info("seat is live", extra={"pod": str(pod), "uid": uid})

JSON lines have `ts`, `level`, `logger`, `msg`, `fields` and, with an exception, `exc`. Text comes from outside at
times, so control characters are escaped in both. Fields whose name says secret, and bearer tokens anywhere, are
blotted out. A line that repeats is let through `BURST` times a minute; the next one after that carries `repeated`.

Writing never blocks the daemon: a container's stderr is a pipe that nobody empties while the container runtime is
down, and a full pipe would stop every seat of the node. A line that finds the pipe full is dropped and counted.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import select
import sys
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, MutableMapping
from datetime import UTC, datetime
from typing import Any, Literal

import msgspec

Style = Literal["text", "json", "auto"]

BURST = 5
WINDOW_S = 60.0
MAX_REMEMBERED = 512
"""Different lines whose repetition is counted."""
MAX_TEXT = 2000
MAX_TRACEBACK = 8000
PIPE_BUF = 4096
"""A pipe that polls writable takes so many bytes without blocking (pipe(7))."""

_SECRET_NAME = re.compile(r"token|passw|secret|authorization|cookie|serial|private|api_?key|^pin$", re.I)
_SECRET_TEXT = re.compile(r"(?i)\b(bearer|basic)\s+[\w.~+/=-]{8,}|\beyJ[\w-]{10,}\.[\w-]+(\.[\w-]+)?")
_PLAIN = frozenset(logging.makeLogRecord({}).__dict__) | {"message", "asctime", "taskName", "fields"}
_LEVEL_COLOUR = {"ERROR": "\x1b[31m", "CRITICAL": "\x1b[31m", "WARNING": "\x1b[33m"}


class Fields(logging.LoggerAdapter[logging.Logger]):
    """A logger whose `extra` may have any keys: logging itself refuses `name`, `args`, `message` and a dozen more."""

    def process(self, msg: Any, kwargs: MutableMapping[str, Any]) -> tuple[Any, MutableMapping[str, Any]]:
        fields = {**(self.extra or {}), **(kwargs.get("extra") or {})}
        return msg, {**kwargs, "extra": {"fields": fields}}

    def bind(self, **fields: object) -> Fields:
        """A logger that adds `fields` to every line."""
        return Fields(self.logger, {**(self.extra or {}), **fields})


def logger(name: str) -> Fields:
    return Fields(logging.getLogger(name), {})


def clean(text: str, limit: int = MAX_TEXT) -> str:
    """`text` as it may stand in a log: without secrets, without control characters, of limited length."""
    if len(text) > limit:
        text = f"{text[:limit]}... ({len(text)} characters)"
    text = _SECRET_TEXT.sub("(secret)", text)
    return text if text.isprintable() else "".join(c if c.isprintable() else _escaped(c) for c in text)


def _escaped(character: str) -> str:
    return character.encode("unicode_escape", errors="backslashreplace").decode("ascii")


def _raw_fields(record: logging.LogRecord) -> dict[str, object]:
    """What came as `extra`, through `Fields` or straight into logging (then as attributes of the record)."""
    direct = {name: value for name, value in record.__dict__.items() if name not in _PLAIN}
    through: Mapping[str, object] = getattr(record, "fields", None) or {}
    return {**direct, **through}


def _fields(record: logging.LogRecord) -> dict[str, object]:
    """The fields of a record: plain values as they are, everything else as text."""
    found = _raw_fields(record)
    clean_fields: dict[str, object] = {}
    for name, value in found.items():
        if _SECRET_NAME.search(name):
            clean_fields[name] = "(secret)"
        elif value is None or isinstance(value, bool | int | float):
            clean_fields[name] = value
        else:
            clean_fields[name] = clean(str(value))
    return clean_fields


class JsonLines(logging.Formatter):
    """One JSON object per line: `ts` (RFC 3339, UTC), `level`, `logger`, `msg`, and where there are any `fields`, `exc`."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, object] = {
            "ts": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "msg": clean(record.getMessage()),
        }
        if fields := _fields(record):
            line["fields"] = fields
        if record.exc_info:
            line["exc"] = _SECRET_TEXT.sub("(secret)", self.formatException(record.exc_info)[-MAX_TRACEBACK:])
        return msgspec.json.encode(line).decode()


class Text(logging.Formatter):
    """`12:30:01.250 WARNING seats: worker died  pod=office/desk-1 code=-9`"""

    def __init__(self, *, colour: bool = False) -> None:
        super().__init__()
        self._colour = colour

    def format(self, record: logging.LogRecord) -> str:
        moment = datetime.fromtimestamp(record.created).astimezone().strftime("%H:%M:%S.%f")[:-3]
        area = record.name.removeprefix("nodeagent.")
        fields = "".join(f" {name}={_quoted(value)}" for name, value in _fields(record).items())
        line = f"{moment} {record.levelname:<7} {area}: {clean(record.getMessage())}{' ' + fields if fields else ''}"
        if self._colour and record.levelname in _LEVEL_COLOUR:
            line = f"{_LEVEL_COLOUR[record.levelname]}{line}\x1b[0m"
        if record.exc_info:
            trace = _SECRET_TEXT.sub("(secret)", self.formatException(record.exc_info)[-MAX_TRACEBACK:])
            line += "\n" + "\n".join(f"    {clean(part)}" for part in trace.splitlines())
        return line


def _quoted(value: object) -> str:
    text = str(value)
    return f'"{text}"' if not text or " " in text or "=" in text else text


class Repeats(logging.Filter):
    """Lets identical lines through `burst` times per window and says how many were held back."""

    def __init__(self, *, burst: int = BURST, window_s: float = WINDOW_S, clock: Callable[[], float] = time.monotonic):
        super().__init__()
        self._burst = burst
        self._window_s = window_s
        self._clock = clock
        self._seen: OrderedDict[tuple[str, int, str], tuple[float, int]] = OrderedDict()
        """Line -> (start of its window, how often in it)."""

    def filter(self, record: logging.LogRecord) -> bool:
        key = (record.name, record.levelno, f"{record.msg} {record.args!r} {_raw_fields(record)}")
        now = self._clock()
        start, count = self._seen.get(key, (now, 0))
        if now - start >= self._window_s:
            if count > self._burst:
                record.fields = {**(getattr(record, "fields", None) or {}), "repeated": count - self._burst}
            start, count = now, 0
        self._seen[key] = (start, count + 1)
        self._seen.move_to_end(key)
        if len(self._seen) > MAX_REMEMBERED:
            self._seen.popitem(last=False)
        return count < self._burst


class Stderr(logging.Handler):
    """Writes whole lines to a descriptor and gives up rather than wait. `dropped` counts the lines that were lost."""

    def __init__(self, fd: int = 2) -> None:
        super().__init__()
        self._fd = fd
        self._poll = select.poll()
        self._poll.register(fd, select.POLLOUT)
        self.dropped = 0

    def emit(self, record: logging.LogRecord) -> None:
        try:
            line = self.format(record)
        except Exception as error:  # a bad format string in a log call must not end what it reports on
            line = f"{record.levelname} {record.name}: unprintable line {record.msg!r}: {error!r}"
        data = line.encode(errors="backslashreplace") + b"\n"
        first = True
        while data:
            # The first piece is written at once or not at all; the rest of a long line is worth a moment.
            if not self._writable(0 if first else 50):
                self.dropped += 1
                return
            try:
                data = data[os.write(self._fd, data[:PIPE_BUF]) :]
            except OSError:
                self.dropped += 1
                return
            first = False

    def _writable(self, timeout_ms: int) -> bool:
        return any(events & select.POLLOUT for _, events in self._poll.poll(timeout_ms))


def configure(style: Style = "auto", level: str | None = None, *, fd: int = 2) -> None:
    """Make the root logger write to `fd` in this style; called again, it replaces what it did before.

    `auto` is text on a terminal and JSON lines otherwise. `level` (debug, info, warning, error) None keeps the level
    set before, info at first.
    """
    root = logging.getLogger()
    terminal = os.isatty(fd)
    text = style == "text" or (style == "auto" and terminal)
    handler = Stderr(fd)
    handler.setFormatter(Text(colour=terminal and not os.environ.get("NO_COLOR")) if text else JsonLines())
    handler.addFilter(Repeats())
    first = not any(isinstance(old, Stderr) for old in root.handlers)
    for old in [old for old in root.handlers if isinstance(old, Stderr)]:
        root.removeHandler(old)
        old.close()
    root.addHandler(handler)
    if level is not None:
        root.setLevel(level.upper())
    elif first:
        root.setLevel(logging.INFO)
    logging.captureWarnings(True)
    # Both say in detail what is no event of ours, and aiohttp.server logs a traceback per malformed request.
    logging.getLogger("asyncio").setLevel(logging.WARNING)
    logging.getLogger("aiohttp.access").setLevel(logging.WARNING)
    with contextlib.suppress(AttributeError, ValueError, OSError):
        sys.stderr.flush()


def dropped() -> int:
    """Lines lost because nobody emptied the pipe."""
    return sum(handler.dropped for handler in logging.getLogger().handlers if isinstance(handler, Stderr))
