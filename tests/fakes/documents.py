"""A daemon's answers without the daemon."""

from __future__ import annotations

import asyncio

import msgspec

from nodeagent import documents as doc
from nodeagent.errors import AgentError


class FakeDocuments:
    """Answers status, devices and seats; `refuse` makes every question fail, `gate` makes reload wait."""

    def __init__(self, node: str = "n1") -> None:
        self.status = doc.StatusDocument(
            node=node,
            version="0",
            pid=1,
            uptime_s=5,
            role="active",
            ready=True,
            cri=doc.Peer(name="cri", state="connected"),
            api=doc.Peer(name="api", state="off"),
            config=doc.ConfigState(path="", loaded_s=1),
            outbox=doc.OutboxState(length=3, oldest_s=7),
        )
        self.devices = doc.DevicesDocument(node=node)
        self.seats = doc.SeatsDocument(node=node)
        self.refuse: Exception | None = None
        self.gate: asyncio.Event | None = None
        self.reloads = 0

    def unready(self, *reasons: str) -> None:
        self.status = msgspec.structs.replace(self.status, ready=False, not_ready=reasons)

    def document(self, verb: str) -> doc.Document:
        if self.refuse is not None:
            raise self.refuse
        return {"status": self.status, "devices": self.devices, "seats": self.seats}[verb]

    async def reload(self) -> doc.ReloadDocument:
        self.reloads += 1
        if self.gate is not None:
            await self.gate.wait()
        if isinstance(self.refuse, AgentError):
            raise self.refuse
        return doc.ReloadDocument(path="/etc/nodeagent/config.yaml", changed=True)
