"""A scripted smart card for QEMU's reader: the far end of ccid-card-passthru (libcacard's VSC protocol, vscard_common.h).

The card is a function from a command to its answer. One connection, one card.
"""

from __future__ import annotations

import asyncio
import contextlib
import struct
from collections.abc import Callable
from pathlib import Path

HEADER = struct.Struct(">III")  # type, reader, length
INIT, ERROR, READER_ADD, ATR, APDU, FLUSH, FLUSHED = 1, 2, 3, 5, 7, 8, 9
NO_READER = 0xFFFFFFFF
MAX_MESSAGE_BYTES = 1 << 16
CONNECT_TIMEOUT_S = 10.0

EXAMPLE_ATR = bytes.fromhex("3b8580014c41423132337b")
"""Direct convention, T=0 and T=1 offered, historical bytes LAB123 with the mark 80h left out, check byte (ISO 7816-3, 8.2)."""


def refuses(command: bytes) -> bytes:
    """A card that selects whatever it is told to and knows nothing else (ISO 7816-4, 5.6)."""
    return b"\x90\x00" if command[1:2] == b"\xa4" else b"\x6d\x00"


class Card:
    """`run()` serves one reader until its other side is gone. `commands` is what it was asked."""

    def __init__(self, atr: bytes = EXAMPLE_ATR, answer: Callable[[bytes], bytes] = refuses) -> None:
        self.commands: list[bytes] = []
        self.inserted = asyncio.Event()
        self._atr, self._answer = atr, answer

    async def run(self, socket: Path) -> None:
        async with asyncio.timeout(CONNECT_TIMEOUT_S):
            reader, writer = await asyncio.open_unix_connection(socket)

        def say(kind: int, where: int, data: bytes = b"") -> None:
            writer.write(HEADER.pack(kind, where, len(data)) + data)

        try:
            say(INIT, NO_READER, b"VSCD" + struct.pack(">II", 2, 1))  # version 0.0.2, one word of capabilities
            while True:
                kind, where, length = HEADER.unpack(await reader.readexactly(HEADER.size))
                if length > MAX_MESSAGE_BYTES:
                    raise ValueError(f"a VSC message of {length} bytes")
                data = await reader.readexactly(length)
                if kind == INIT:
                    say(READER_ADD, NO_READER, b"Lab\0")
                elif kind == ERROR and data == bytes(4) and not self.inserted.is_set():
                    say(ATR, 0, self._atr)  # the reader is there; a card goes in
                    self.inserted.set()
                elif kind == APDU:
                    self.commands.append(data)
                    say(APDU, where, self._answer(data))
                elif kind == FLUSH:
                    say(FLUSHED, where)
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()
            with contextlib.suppress(ConnectionError):
                await writer.wait_closed()
