"""HID report descriptors (HID 1.11, 6.2.2), as far as it takes to tell what a device is."""

from __future__ import annotations

from collections.abc import Iterator

MAX_DESCRIPTOR = 4096
"""Linux HID_MAX_DESCRIPTOR_SIZE."""
MAX_USAGES = 16
"""Top-level collections that are told."""
MAX_PUSHES = 16

LONG_ITEM = 0xFE
MAIN, GLOBAL, LOCAL = 0, 1, 2
COLLECTION, END_COLLECTION = 0xA, 0xC
USAGE_PAGE, PUSH, POP = 0x0, 0xA, 0xB
USAGE = 0x0


def usages(untrusted_descriptor: bytes) -> tuple[int, ...]:
    """The usage of each top-level collection, `page << 16 | usage`, in the device's order, each once, at most MAX_USAGES.

    Raises ValueError for a descriptor that ends inside an item, is longer than MAX_DESCRIPTOR, or nests where the kernel's
    own parser would refuse it.
    """
    if len(untrusted_descriptor) > MAX_DESCRIPTOR:
        raise ValueError(f"report descriptor of {len(untrusted_descriptor)} bytes")
    found: dict[int, None] = {}
    page, pushed, depth = 0, list[int](), 0
    usage: int | None = None
    for kind, tag, size, value in _items(untrusted_descriptor):
        if kind == GLOBAL and tag == USAGE_PAGE:
            page = value & 0xFFFF
        elif kind == GLOBAL and tag == PUSH:
            if len(pushed) == MAX_PUSHES:
                raise ValueError("report descriptor pushes too often")
            pushed.append(page)
        elif kind == GLOBAL and tag == POP:
            if not pushed:
                raise ValueError("report descriptor pops what was never pushed")
            page = pushed.pop()
        elif kind == LOCAL and tag == USAGE and usage is None:
            # A usage of four bytes carries its own page (6.2.2.8).
            usage = value if size == 4 else page << 16 | value
        elif kind == MAIN:
            if tag == COLLECTION:
                if depth == 0 and usage is not None and len(found) < MAX_USAGES:
                    found[usage] = None
                depth += 1
            elif tag == END_COLLECTION:
                if depth == 0:
                    raise ValueError("report descriptor ends a collection that never began")
                depth -= 1
            usage = None  # a main item ends the life of the local ones (6.2.2.8)
    return tuple(found)


def _items(data: bytes) -> Iterator[tuple[int, int, int, int]]:
    """Type, tag, data size and unsigned data of each short item; long items (6.2.2.3, reserved) are passed over."""
    at = 0
    while at < len(data):
        prefix = data[at]
        if prefix == LONG_ITEM:
            if at + 1 >= len(data):
                raise ValueError("report descriptor ends inside a long item")
            size, start = data[at + 1], at + 3
        else:
            size, start = (0, 1, 2, 4)[prefix & 3], at + 1
        if start + size > len(data):
            raise ValueError("report descriptor ends inside an item")
        if prefix != LONG_ITEM:
            yield prefix >> 2 & 3, prefix >> 4, size, int.from_bytes(data[start : start + size], "little")
        at = start + size
