"""A history as a script that people can read: one step a line, `+seconds verb words`; made from a seed, and made shorter."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

from tests.histories.world import PORTS, RULES, UNITS

NURSE, LAUNCHER = {"role": "nurse"}, {"kubevirt.io": "virt-launcher"}
KINDS: dict[str, dict[str, Any]] = {
    "printer": {"desktop": {"printer": 1}},
    "nurse": {"desktop": {"printer": 1}},
    "two-printers": {"desktop": {"printer": 2}},
    "with-init": {"prepare": {"printer": 1}, "desktop": {"printer": 1}},
    "init-has-less": {"prepare": {"printer": 1}, "desktop": {"printer": 2}},
    "init-only": {"prepare": {"printer": 1}, "desktop": {}},
    "several": {"desktop": {"printer": 1, "usb-storage": 1}},
    "sidecar": {"desktop": {"printer": 1}, "second": {"printer": 1}},
    "any": {"desktop": {"print-any": 1}},
    "both-names": {"desktop": {"printer": 1, "print-any": 1}},
    "whole": {"desktop": {"whole": 1}},
    "disk": {"desktop": {"usb-storage": 1}},
    "key": {"desktop": {"ukey": 1}},
    "key-too": {"desktop": {"key": 1}},
    "raw": {"desktop": {"usb": 1}},
}
"""What a pod asks for: container -> resource leaf -> number; `prepare` is an init container."""
LABELS = {"nurse": NURSE, "whole": LAUNCHER}
ON_RUNC = {"whole", "disk", "key", "key-too", "raw", "several"}
LIKELY = {
    "plain": (
        "printer",
        "two-printers",
        "with-init",
        "init-has-less",
        "init-only",
        "several",
        "sidecar",
        "disk",
        "key",
    ),
    "two-names": ("printer", "any", "any", "both-names", "key", "key-too", "with-init", "disk"),
    "whole-printer": ("whole", "whole", "disk", "disk", "printer", "several"),
    "raw": ("raw", "printer", "disk", "raw"),
    "nurses": ("printer", "nurse", "disk"),
    "elsewhere": ("printer", "key", "disk"),
    "no-printers": ("disk", "key", "printer"),
}
NAMES = "abcdefgh"
GAPS_S = (0.0, 0.0, 0.05, 0.1, 0.1, 0.3, 1.0, 2.5, 6.0)
LINGERS_S = (0.0, 0.0, 0.5, 3.0, 20.0)
AHEAD = (1, 2, 3, 5, 8, 13, 21, 34, 55, 89, 144, 233, 377, 610)


@dataclass(frozen=True)
class Step:
    """`after_s` after the step before it."""

    after_s: float
    words: tuple[str, ...]

    def __str__(self) -> str:
        return f"+{self.after_s:g} {' '.join(self.words)}"


Script = tuple[Step, ...]


def take(text: str) -> Script:
    """The script in a text; what follows a # is a remark."""
    lines = (line.partition("#")[0].split() for line in text.splitlines())
    return tuple(Step(float(words[0]), tuple(words[1:])) for words in lines if words)


def put(script: Iterable[Step]) -> str:
    return "\n".join(map(str, script))


def make(seed: int, length: int = 22) -> Script:
    """A history of about `length` steps."""
    chance = random.Random(f"history {seed}")
    rules = chance.choice(sorted(RULES))
    steps = [Step(0.0, ("rules", rules))]
    units = chance.sample(sorted(UNITS), chance.choice((1, 2, 3, 4)))
    for unit, port in zip(units, chance.sample(PORTS, len(units)), strict=False):
        steps.append(Step(0.0, ("plug", unit, port)))
    steps.append(Step(1.5, ("wait",)))
    pods: list[tuple[str, str]] = []
    while len(steps) < length + len(units):
        after_s = chance.choice(GAPS_S)
        roll = chance.random()
        words: tuple[str, ...]
        if roll < 0.30 or not pods:
            pods.append((chance.choice(NAMES), chance.choice(LIKELY[rules])))
            words = ("pod", *pods[-1], chance.choice(("runc", "runsc")))
        elif roll < 0.40:
            words = ("delete", pods.pop(chance.randrange(len(pods)))[0], f"{chance.choice(LINGERS_S):g}")
        elif roll < 0.50:
            old = pods.pop(chance.randrange(len(pods)))
            pods.append((chance.choice(NAMES), old[1]))
            words = ("replace", old[0], pods[-1][0], f"{chance.choice(LINGERS_S):g}")
        elif roll < 0.58:
            words = (chance.choice(("restart-container", "restart-container", "sandbox-fails")), chance.choice(pods)[0])
        elif roll < 0.66:
            words = ("unplug", chance.choice(units))
        elif roll < 0.74:
            words = ("plug", chance.choice(sorted(UNITS)), chance.choice(PORTS))
        elif roll < 0.79:
            rules = chance.choice(sorted(RULES))
            words = ("rules", rules)
        elif roll < 0.83:
            words = ("runtime", chance.choice(("away", "back", "back")))
        elif roll < 0.86:
            words = ("api", chance.choice(("away", "back")))
        elif roll < 0.89:
            words = ("restart-kubelet",)
        elif roll < 0.91:
            words = ("worker-dies",)
        elif roll < 0.94:
            words = ("restart-daemon",)
        else:
            words = ("crash", str(chance.choice(AHEAD) + chance.randrange(5)))
        steps.append(Step(after_s, words))
        if roll < 0.5 and chance.random() < 0.25:
            steps.append(Step(0.0, ("crash", str(chance.choice(AHEAD) + chance.randrange(9)))))
    return tuple(steps)


def shrink(script: Script, fails: Callable[[Script], bool], budget: int = 400) -> Script:
    """A shorter script that still fails: without some steps, then without some of the waiting."""
    tries = 0

    def still(candidate: Script) -> bool:
        nonlocal tries
        tries += 1
        return tries <= budget and fails(candidate)

    size = max(1, len(script) // 2)
    while size:
        at, shorter = 0, False
        while at < len(script):
            candidate = script[:at] + script[at + size :]
            if candidate and still(candidate):
                script, shorter = candidate, True
            else:
                at += size
        if not shorter or size > 1:
            size //= 2
    for at, step in enumerate(script):
        for gap_s in (0.0, 2.5):
            if step.after_s > gap_s:
                candidate = (*script[:at], replace(step, after_s=gap_s), *script[at + 1 :])
                if still(candidate):
                    script = candidate
                    break
    return script
