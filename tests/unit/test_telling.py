"""Steps in their order: what is told, and what is not tried."""

from __future__ import annotations

import asyncio

import msgspec
import pytest

from nodeagent.demo.telling import Outcome, Step, Telling
from nodeagent.errors import AgentError, Reason


async def fine() -> str:
    return "all is\n well"


async def broken() -> str:
    raise AgentError(Reason.INTERNAL, "the printer burns", hint="water")


async def odd() -> str:
    raise ExceptionGroup("several", [ValueError("first"), KeyError("second")])


def told() -> tuple[Telling, list[Outcome]]:
    heard: list[Outcome] = []
    ticks = iter(range(100))
    return Telling(heard.append, lambda: float(next(ticks))), heard


async def test_a_good_story() -> None:
    telling, heard = told()
    await telling.play([Step("one", fine), Step("two", fine, ("one",))])
    assert [(o.name, o.ok, o.seconds, o.detail) for o in heard] == [
        ("one", True, 1.0, "all is well"),
        ("two", True, 1.0, "all is well"),
    ]
    assert msgspec.json.decode(msgspec.json.encode(telling.summary())) == {
        "schema": "nodeagent.demo/v1",
        "ok": True,
        "steps": [
            {"name": "one", "ok": True, "seconds": 1.0, "detail": "all is well"},
            {"name": "two", "ok": True, "seconds": 1.0, "detail": "all is well"},
        ],
    }


async def test_what_stands_on_a_failure_is_not_tried() -> None:
    telling, heard = told()
    await telling.play(
        [Step("one", broken), Step("two", fine, ("one",)), Step("three", fine, ("two",)), Step("four", odd)]
    )
    assert [(o.name, o.ok, o.detail) for o in heard] == [
        ("one", False, "the printer burns (water)"),
        ("two", False, "not tried: it needs one"),
        ("three", False, "not tried: it needs two"),
        ("four", False, "ValueError: first"),
    ]
    assert not telling.summary().ok


async def test_cancellation_is_told_and_goes_on() -> None:
    telling, heard = told()

    async def endless() -> str:
        await asyncio.Event().wait()
        return ""

    task = asyncio.create_task(telling.play([Step("one", endless), Step("two", fine)]))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert [(o.name, o.ok, o.detail) for o in heard] == [("one", False, "interrupted")]


def test_nothing_told_is_no_success() -> None:
    assert not told()[0].summary().ok
