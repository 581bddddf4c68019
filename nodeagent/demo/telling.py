"""How a story is told: steps in their order, one line each for people and one JSON object for machines."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Iterable

import msgspec

from nodeagent.errors import AgentError

SCHEMA = "nodeagent.demo/v1"
MAX_DETAIL = 500

Say = Callable[[str], None]
"""Takes one line."""


class Step(msgspec.Struct, frozen=True):
    """`run` returns one line about what happened, or raises. It is not tried unless all of `needs` went well."""

    name: str
    run: Callable[[], Awaitable[str]]
    needs: tuple[str, ...] = ()


class Outcome(msgspec.Struct, frozen=True):
    name: str
    ok: bool
    seconds: float
    detail: str


Tell = Callable[[Outcome], None]


class Summary(msgspec.Struct, frozen=True, kw_only=True):
    """The last line of `make run ONCE=1`."""

    schema: str = SCHEMA
    ok: bool
    steps: tuple[Outcome, ...]


class Telling:
    """Runs steps and remembers how they went; `tell` takes each outcome as it comes."""

    def __init__(self, tell: Tell, clock: Callable[[], float] = time.monotonic) -> None:
        self.outcomes: list[Outcome] = []
        self._tell = tell
        self._clock = clock

    async def play(self, steps: Iterable[Step]) -> None:
        """Every step, in order. A failure is an outcome; so is cancellation, which then goes on."""
        for step in steps:
            await self._play(step)

    def summary(self) -> Summary:
        return Summary(ok=bool(self.outcomes) and all(o.ok for o in self.outcomes), steps=tuple(self.outcomes))

    def note(self, name: str, ok: bool, began_s: float, detail: str) -> None:
        line = " ".join(detail.split())
        outcome = Outcome(name, ok, round(self._clock() - began_s, 3), line[:MAX_DETAIL])
        self.outcomes.append(outcome)
        self._tell(outcome)

    async def _play(self, step: Step) -> None:
        began_s = self._clock()
        good = {o.name for o in self.outcomes if o.ok}
        if missing := [n for n in step.needs if n not in good]:
            return self.note(step.name, False, began_s, f"not tried: it needs {', '.join(missing)}")
        try:
            detail = await step.run()
        except Exception as error:
            return self.note(step.name, False, began_s, say_error(error))
        except BaseException:
            self.note(step.name, False, began_s, "interrupted")
            raise
        return self.note(step.name, True, began_s, detail)


def say_error(error: BaseException) -> str:
    """One line for a person; of a group, its first."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    if isinstance(error, AgentError):
        return str(error)
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
