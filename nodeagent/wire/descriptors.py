"""USB descriptors as sysfs shows them in `descriptors` (USB 2.0, 9.6), as far as it takes to name every interface type.

The file is the device descriptor and behind it each configuration as the device sent it, cut where the kernel's own parser
stopped (Linux drivers/usb/core/sysfs.c and config.c). What follows here is that parser: a device that lies about a length is
understood exactly as far as the kernel understood it.
"""

from __future__ import annotations

from collections.abc import Iterator

import msgspec

DEVICE, CONFIGURATION, INTERFACE = 1, 2, 4
"""bDescriptorType (USB 2.0, table 9-5). Every other kind is passed over by its length."""
DEVICE_BYTES, CONFIGURATION_BYTES, INTERFACE_BYTES = 18, 9, 9

MAX_BYTES = DEVICE_BYTES + 0xFFFF
"""What the kernel shows at most."""
MAX_CONFIGURATIONS = 8
"""USB_MAXCONFIG; further ones are not asked for."""
MAX_INTERFACES = 32
"""USB_MAXINTERFACES of one configuration; the kernel ignores further numbers."""
MAX_ALTERNATES = 128
"""USB_MAXALTSETTING of one interface."""


class Setting(msgspec.Struct, frozen=True):
    """One alternate setting of one interface."""

    number: int
    alternate: int
    cls: int
    subclass: int
    protocol: int

    @property
    def triple(self) -> str:
        """USBGuard's spelling, `07:01:02`."""
        return f"{self.cls:02x}:{self.subclass:02x}:{self.protocol:02x}"


class Configuration(msgspec.Struct, frozen=True):
    """`value` is what `bConfigurationValue` says when it is the active one; the settings stand in the device's order."""

    value: int
    settings: tuple[Setting, ...]


class Descriptors(msgspec.Struct, frozen=True):
    """`bcd_usb` is binary coded, 0x0210 for USB 2.1; `max_configurations` is bNumConfigurations."""

    bcd_usb: int
    vendor: int
    product: int
    cls: int
    max_configurations: int
    configurations: tuple[Configuration, ...]

    def settings(self, value: int) -> tuple[Setting, ...]:
        """Every alternate setting of the configuration with this value; none where there is no such configuration."""
        return next((c.settings for c in self.configurations if c.value == value), ())


def take_descriptors(untrusted: bytes) -> Descriptors:
    """Read a whole `descriptors` file. Raises ValueError where the kernel would not have taken the device either."""
    if len(untrusted) > MAX_BYTES:
        raise ValueError(f"descriptors of {len(untrusted)} bytes")
    if len(untrusted) < DEVICE_BYTES or untrusted[1] != DEVICE:
        raise ValueError("descriptors without a device descriptor")
    count = untrusted[17]
    taken, at = [], DEVICE_BYTES
    for left in range(min(count, MAX_CONFIGURATIONS), 0, -1):
        end = _end(untrusted, at, last=left == 1)
        taken.append(Configuration(untrusted[at + 5], _settings(untrusted, at + untrusted[at], end)))
        at = end
    return Descriptors(
        bcd_usb=_word(untrusted, 2),
        vendor=_word(untrusted, 8),
        product=_word(untrusted, 10),
        cls=untrusted[4],
        max_configurations=count,
        configurations=tuple(taken),
    )


def _end(data: bytes, at: int, *, last: bool) -> int:
    """Where the configuration at `at` ends.

    `wTotalLength` is the device's word. Where the kernel cut the configuration short the next one begins before that.
    """
    if not _begins(data, at):
        raise ValueError("descriptors without a configuration descriptor where one must be")
    end = at + max(_word(data, at + 2), CONFIGURATION_BYTES)
    if last:
        return min(end, len(data))
    if _begins(data, end):
        return end
    for start, _ in _walk(data, at + data[at], len(data)):
        if _begins(data, start):
            return start
    raise ValueError("descriptors with fewer configurations than the device says")


def _begins(data: bytes, at: int) -> bool:
    """Whether a configuration descriptor that the kernel accepts begins here."""
    return len(data) - at >= CONFIGURATION_BYTES <= data[at] <= len(data) - at and data[at + 1] == CONFIGURATION


def _walk(data: bytes, at: int, end: int) -> Iterator[tuple[int, int]]:
    """Start and length of each descriptor; it ends at one that is shorter than its own head or longer than what is left."""
    while end - at >= 2 <= data[at] <= end - at:
        yield at, data[at]
        at += data[at]


def _settings(data: bytes, at: int, end: int) -> tuple[Setting, ...]:
    found: dict[tuple[int, int], Setting] = {}
    alternates: dict[int, int] = {}
    for start, length in _walk(data, at, end):
        if data[start + 1] != INTERFACE or length < INTERFACE_BYTES:
            continue
        number, alternate, _, cls, subclass, protocol = data[start + 2 : start + 8]
        if number not in alternates and len(alternates) == MAX_INTERFACES:
            continue
        seen = alternates.setdefault(number, 0)
        if (number, alternate) in found or seen == MAX_ALTERNATES:
            continue
        alternates[number] = seen + 1
        found[number, alternate] = Setting(number, alternate, cls, subclass, protocol)
    return tuple(found.values())


def _word(data: bytes, at: int) -> int:
    return int.from_bytes(data[at : at + 2], "little")
