"""Devices read straight from the system, for when no daemon can be asked."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import msgspec

from nodeagent.config import Config
from nodeagent.devices.identity import KEY_BYTES, KEY_NAME, node_key
from nodeagent.devices.inventory import Inventory
from nodeagent.devices.resources import build, by_device, explain
from nodeagent.documents import DeviceExplanation, DeviceRow, Problem, RuleVerdict, device_row
from nodeagent.errors import AgentError
from nodeagent.host import HostRoot
from nodeagent.model import Device
from nodeagent.services import SEAT_SERVICES


class Found(msgspec.Struct, frozen=True):
    devices: tuple[Device, ...]
    rows: tuple[DeviceRow, ...]
    """What the rules of the configuration make of `devices`, in the same order."""
    problems: tuple[Problem, ...]


def look(config: Config, root: Path | None) -> Found:
    """The devices of this system, or of the file tree at `root`, and what the rules make of them. Changes nothing."""
    host = HostRoot(root or config.host_root)
    state_dir = host.path(config.state_dir) if root else Path(config.state_dir)
    key, problems = _key(state_dir)
    devices = asyncio.run(_inventory(host, config, key or os.urandom(KEY_BYTES)))
    resources = build({device.id: device for device in devices}, config.devices, frozenset(SEAT_SERVICES))
    offered = by_device(resources.resources.values())
    unoffered = {u.device_id: u.message.removeprefix(f"{u.device_id}: ") for u in resources.unoffered}
    rows = []
    for device in devices:
        if device.id in offered:
            names, offer = offered[device.id]
            row = device_row(device, resource=",".join(names), rule=offer.rule, services=offer.grant.services)
        else:
            row = device_row(device, unoffered=unoffered.get(device.id, ""))
        rows.append(row if key else _without_id(row))
    return Found(devices, tuple(rows), problems)


def explanations(found: Found, config: Config) -> tuple[DeviceExplanation, ...]:
    """For each device, what each rule said to it."""
    made = []
    for device, row in zip(found.devices, found.rows, strict=True):
        verdicts = []
        for verdict in explain(device, config.devices):
            why = "" if verdict.takes else "; ".join(verdict.differs)
            if verdict.matched and not verdict.takes:
                why = "matches too, but an earlier rule took it"
            verdicts.append(RuleVerdict(rule=verdict.rule, taken=verdict.takes, why=why))
        made.append(DeviceExplanation(device=row, rules=tuple(verdicts)))
    return tuple(made)


def _key(state_dir: Path) -> tuple[bytes | None, tuple[Problem, ...]]:
    """The node's key if there is one that may be read; looking never makes one."""
    hint = "the first start of the daemon makes it; read this as root"
    try:
        if (state_dir / KEY_NAME).exists():
            return node_key(state_dir), ()
    except (AgentError, OSError) as error:
        message = error.message if isinstance(error, AgentError) else str(error)
        return None, (Problem(message=f"device ids are not known: {message}", hint=hint),)
    return None, (Problem(message=f"device ids are not known: there is no {state_dir / KEY_NAME}", hint=hint),)


def _without_id(row: DeviceRow) -> DeviceRow:
    part = row.id.rpartition("-")[2][:8]
    return msgspec.structs.replace(row, id="", resource=row.resource.replace(part, "{id8}"))


async def _inventory(host: HostRoot, config: Config, key: bytes) -> tuple[Device, ...]:
    async with Inventory(host, config.devices, key, open_hotplug=lambda _: None) as inventory:
        return tuple(inventory.devices.values())
