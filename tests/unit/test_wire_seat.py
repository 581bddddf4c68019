"""What a worker may say to the daemon: strictly this, and nothing it sends raises anything but DecodeError."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nodeagent.errors import Reason
from nodeagent.wire import seat

CREATE_JOB = bytes.fromhex("84a474797065a94372656174654a6f62a77265717565737407a77072696e746572a27031a57469746c65a2e6b7")
"""{"type": "CreateJob", "request": 7, "printer": "p1", "title": <two bytes, the start of a three-byte character>}"""


def test_text_that_is_not_utf8_is_a_decode_error() -> None:
    """msgspec raises UnicodeDecodeError here, which is no DecodeError: one worker could have ended the daemon."""
    with pytest.raises(msgspec.DecodeError, match="UTF-8"):
        seat.take_from_worker(CREATE_JOB)


def test_a_whole_message() -> None:
    data = CREATE_JOB.replace(b"\xa2\xe6\xb7", b"\xa3\xe6\xb7\xb1")
    assert seat.take_from_worker(data) == seat.CreateJob(request=7, printer="p1", title="深")


@given(st.binary(max_size=200))
def test_bytes_are_a_message_or_a_decode_error(data: bytes) -> None:
    try:
        seat.take_from_worker(data)
    except msgspec.DecodeError:
        pass


@pytest.mark.parametrize(
    "message",
    [
        {"type": "CreateJob", "request": 0, "printer": "p", "title": "t"},
        {"type": "CreateJob", "request": 1, "printer": "../p", "title": "t"},
        {"type": "CreateJob", "request": 1, "printer": "p\n", "title": "t"},
        {"type": "CreateJob", "request": 1, "printer": "p", "title": "t" * 256},
        {"type": "CreateJob", "request": 1, "printer": "p", "title": "t", "copies": 1000},
        {"type": "CreateJob", "request": 1, "printer": "p", "title": "t", "uid": 0},
        {"type": "CloseDocument", "request": 1, "job": 1, "format": "text/plain\n", "size": 1, "last": True},
        {"type": "CloseDocument", "request": 1, "job": 1, "format": "text/plain", "size": -1, "last": True},
        {"type": "Counters", "service": "ipp", "denied": {"because": 1}},
        {"type": "JobCreated", "request": 1, "job": 1},
        {"type": "Serve"},
        ["CreateJob", 1, "p", "t"],
    ],
    ids=str,
)
def test_refused(message: object) -> None:
    with pytest.raises(msgspec.ValidationError):
        seat.take_from_worker(msgspec.msgpack.encode(message))


def test_a_message_that_does_not_fit_is_not_sent() -> None:
    jobs = tuple(seat.Job(id=i, printer="p", title="t" * 255, state=3, message="m" * 1000) for i in range(1, 65))
    with pytest.raises(ValueError, match="over"):
        seat.put_message(seat.Jobs(jobs=jobs))


def test_what_the_daemon_says_is_taken_whole() -> None:
    for message in (
        seat.Serve(service="ipp", desktop="a/b", max_document_bytes=1, max_connections=1, idle_s=0.5),
        seat.Refused(request=1, reason=Reason.TOO_MANY, message="32 jobs wait already"),
        seat.Stop(),
    ):
        assert seat.take_to_worker(seat.put_message(message)) == message
