"""What a seat can offer. One file per service; this page says what a service is.

The seat side of a service (`IppService`) runs in the seat's unprivileged worker and is the only code that parses bytes
of the desktop. The root side (`cups`, `spool`, `convert`) runs in the daemon and never sees those bytes, only descriptors.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Protocol

from nodeagent.wire.seat import Counters, Jobs, Message, Printers, Serve, ToWorker


class Link(Protocol):
    """What a seat service may ask of the daemon."""

    def next_request(self) -> int:
        """A number for the next question, unique among the unanswered ones."""
        ...

    def send(self, message: Message) -> None:
        """Say something that has no answer. Raises ConnectionError when the daemon is gone."""
        ...

    async def ask(self, message: Message) -> tuple[ToWorker, int | None]:
        """Send a message that carries `request`, wait for its answer and the descriptor beside it (owned by the caller).

        Raises AgentError when the daemon refuses, ConnectionError when it is gone.
        """
        ...


class SeatService(Protocol):
    """One service of one seat, inside its worker."""

    async def connection(self, sock: socket.socket) -> None:
        """Serve one accepted, non-blocking connection until it ends; closes it. Never raises for what a client does."""
        ...

    def on_message(self, message: Printers | Jobs) -> None:
        """The daemon told the seat something new."""
        ...

    def counters(self) -> Counters:
        """Totals since the worker started."""
        ...


SEAT_SERVICES = {"ipp": "nodeagent.services.ipp.service:IppService"}
"""Service name -> where its class is; `seat_service` loads it (in the zygote: before any seat exists)."""


def seat_service(name: str, services: Mapping[str, str] = SEAT_SERVICES) -> Callable[[Link, Serve], SeatService]:
    """The constructor of a seat service. Raises KeyError for a name that no service has."""
    module, _, attribute = services[name].partition(":")
    constructor: Callable[[Link, Serve], SeatService] = getattr(import_module(module), attribute)
    return constructor
