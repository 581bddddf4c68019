"""The uids of seats must belong to nobody else: not to a user of the host, not to a user namespace of its containers."""

from __future__ import annotations

import msgspec

from nodeagent.config import SeatsConfig
from nodeagent.errors import ConfigError

MAX_LINES = 100_000


class UidRange(msgspec.Struct, frozen=True):
    """`count` uids from `first` on, lent to `owner` (subuid(5))."""

    owner: str
    first: int
    count: int


def take_subuid(untrusted_text: str) -> tuple[UidRange, ...]:
    """Read /etc/subuid or /etc/subgid: `owner:first:count` a line. Lines that are not are skipped, as shadow's tools do."""
    found = []
    for line in untrusted_text.splitlines()[:MAX_LINES]:
        owner, _, rest = line.strip().partition(":")
        first, _, count = rest.partition(":")
        if owner and _is_number(first) and _is_number(count):
            found.append(UidRange(owner, int(first), int(count)))
    return tuple(found)


def check_uid_range(seats: SeatsConfig, lent: tuple[UidRange, ...], where: str = "/etc/subuid") -> None:
    """Raises ConfigError when a uid of a seat could be the uid of a container's user namespace."""
    first, end = seats.uid_base, seats.uid_base + seats.uid_count
    for other in lent:
        if other.count and first < other.first + other.count and other.first < end:
            raise ConfigError(
                f"seats.uid_base: {first} to {end - 1} overlaps {other.first} to {other.first + other.count - 1},"
                f" which {where} lends to {other.owner}",
                hint="choose a range that nobody uses",
            )


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) <= 10
