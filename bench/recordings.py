"""The recorded devices: what share of them is taken for what it is, by the rule that is meant for it."""

from __future__ import annotations

from bench.result import Result, alone
from tests.machines.expected import classified


async def measure() -> list[Result]:
    """One figure; a device counts when the class, the interfaces and the rule of each of its parts are right."""
    devices = classified()
    wrong = [f"{device.machine} {device.port}" for device in devices if not device.right]
    note = f"of {len(devices)} recorded devices" + (f"; wrong: {', '.join(wrong)}" if wrong else "")
    share = (len(devices) - len(wrong)) / len(devices)
    return [alone("recordings_classified", "share", [share], note, better="higher")]
