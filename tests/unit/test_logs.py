"""Log lines: what a person and a machine read, what they never read, and that writing them waits for nobody."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import sys
from collections.abc import Iterator

import pytest

from nodeagent import logs

F_SETPIPE_SZ = 1031  # fcntl(2)


class Pipe:
    """Where log lines go, and what has arrived there."""

    def __init__(self) -> None:
        self.read_fd, self.write_fd = os.pipe()
        os.set_blocking(self.read_fd, False)

    def text(self) -> str:
        try:
            return os.read(self.read_fd, 1 << 20).decode()
        except BlockingIOError:
            return ""

    def lines(self) -> list[dict[str, object]]:
        return [json.loads(line) for line in self.text().splitlines()]


@pytest.fixture
def pipe() -> Iterator[Pipe]:
    root = logging.getLogger()
    before, level = list(root.handlers), root.level
    made = Pipe()
    yield made
    for handler in [h for h in root.handlers if h not in before]:
        root.removeHandler(handler)
        handler.close()
    root.setLevel(level)
    logging.captureWarnings(False)
    os.close(made.read_fd)
    os.close(made.write_fd)


def record(message: str, *args: object, level: int = logging.INFO, **fields: object) -> logging.LogRecord:
    made = logging.LogRecord("nodeagent.seats", level, __file__, 1, message, args, None)
    made.fields = fields
    return made


def test_json_lines(pipe: Pipe) -> None:
    logs.configure("json", "info", fd=pipe.write_fd)
    log = logs.logger("nodeagent.seats").bind(pod="office/desk-1")
    log.info("seat is %s", "live", extra={"uid": 7, "name": "reserved by logging", "none": None, "path": os})
    (line,) = pipe.lines()
    assert line["level"] == "info" and line["logger"] == "nodeagent.seats" and line["msg"] == "seat is live"
    assert line["fields"] == {
        "pod": "office/desk-1",
        "uid": 7,
        "name": "reserved by logging",
        "none": None,
        "path": str(os),
    }
    assert str(line["ts"]).endswith("Z")


def test_extra_of_plain_loggers_is_kept(pipe: Pipe) -> None:
    logs.configure("json", "info", fd=pipe.write_fd)
    logging.getLogger("other").warning("hm", extra={"pod": "a/b"})
    assert pipe.lines()[0]["fields"] == {"pod": "a/b"}


def test_text(pipe: Pipe) -> None:
    logs.configure("text", "info", fd=pipe.write_fd)
    logs.logger("nodeagent.web").warning("cannot listen", extra={"port": 9410, "why": "in use"})
    text = pipe.text()
    assert ' WARNING web: cannot listen  port=9410 why="in use"\n' in text
    assert "\x1b" not in text, "no colour on what is no terminal"


def test_auto_is_json_where_nobody_looks(pipe: Pipe) -> None:
    logs.configure("auto", "info", fd=pipe.write_fd)
    logging.getLogger("x").info("y")
    assert pipe.lines()[0]["msg"] == "y"


def test_configuring_again_replaces_and_keeps_the_level(pipe: Pipe) -> None:
    logs.configure("text", "debug", fd=pipe.write_fd)
    logs.configure("json", fd=pipe.write_fd)
    logging.getLogger("x").debug("once")
    assert [line["msg"] for line in pipe.lines()] == ["once"]


@pytest.mark.parametrize("style", [logs.JsonLines(), logs.Text()])
def test_secrets_are_blotted_out(style: logging.Formatter) -> None:
    token = "eyJhbGciOiJSUzI1NiIs.eyJpc3MiOiJrdWJlcm5l.c2lnbmF0dXJl"
    made = record(
        f"header Authorization: Bearer {token}", token="hunter2", serial="ABC123", note=f"got {token}", spin=3
    )
    text = style.format(made)
    for secret in (token, "hunter2", "ABC123"):
        assert secret not in text
    assert "spin" in text


@pytest.mark.parametrize("style", [logs.JsonLines(), logs.Text()])
def test_a_device_cannot_forge_a_line(style: logging.Formatter) -> None:
    text = style.format(record("device %s", "X\n12:00:00 ERROR root: all is lost\x1b[2J\u202e", name="a\r\nb"))
    assert "\n" not in text and "\x1b" not in text and "\u202e" not in text


def test_a_long_message_is_cut() -> None:
    assert len(logs.JsonLines().format(record("x" * 100_000))) < 3 * logs.MAX_TEXT


def test_tracebacks_are_inside_the_line() -> None:
    try:
        raise ValueError("inside\nout")
    except ValueError:
        made = record("it failed")
        made.exc_info = sys.exc_info()
    line = json.loads(logs.JsonLines().format(made))
    assert "ValueError: inside" in line["exc"]
    assert all(part.startswith("    ") for part in logs.Text().format(made).splitlines()[1:])


def test_a_bad_format_string_is_reported_not_raised(pipe: Pipe) -> None:
    handler = logs.Stderr(pipe.write_fd)
    handler.addFilter(logs.Repeats())
    handler.handle(record("%d", "no number"))
    assert "unprintable line" in pipe.text()


def test_identical_lines_are_held_back_and_counted() -> None:
    now = 0.0
    repeats = logs.Repeats(burst=2, window_s=60, clock=lambda: now)
    passed = [repeats.filter(record("again %d", 1)) for _ in range(10)]
    assert passed == [True, True] + [False] * 8
    assert repeats.filter(record("again %d", 2)), "another line is not held back"
    now = 61.0
    last = record("again %d", 1)
    assert repeats.filter(last)
    assert json.loads(logs.JsonLines().format(last))["fields"] == {"repeated": 8}


def test_memory_for_repeats_is_bounded() -> None:
    repeats = logs.Repeats(clock=lambda: 0.0)
    for number in range(3 * logs.MAX_REMEMBERED):
        repeats.filter(record("line %d", number))
    assert len(repeats._seen) == logs.MAX_REMEMBERED


def test_a_full_pipe_drops_lines_and_never_waits(pipe: Pipe) -> None:
    fcntl.fcntl(pipe.write_fd, F_SETPIPE_SZ, 4096)
    logs.configure("json", "info", fd=pipe.write_fd)
    for number in range(200):
        logging.getLogger("x").info("line %d %s", number, "-" * 500)
    assert logs.dropped() > 100
    assert pipe.lines()[0]["msg"].startswith("line 0")  # type: ignore[attr-defined]
    before = logs.dropped()
    logging.getLogger("x").info("the reader is back")
    assert pipe.lines()[-1]["msg"] == "the reader is back"
    assert logs.dropped() == before


def test_a_reader_that_went_away_is_no_error() -> None:
    read_fd, write_fd = os.pipe()
    os.close(read_fd)
    handler = logs.Stderr(write_fd)
    handler.emit(record("to nobody"))
    assert handler.dropped == 1
    os.close(write_fd)
