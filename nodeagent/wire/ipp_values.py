"""What an IPP message is made of, as frozen values, and short constructors for attributes (`integer("job-id", 7)`).

Used through `nodeagent.wire.ipp`, whose page tells which Python type stands for which tag.
"""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime

import msgspec

from nodeagent.wire.ipp_codes import ValueTag


class IppError(ValueError):
    """These bytes are no IPP message, or an attribute has not the type it must have.

    `offset` counts from the start of the message; None where the fault lies in a meaning, not in a byte.
    """

    def __init__(self, what: str, offset: int | None = None) -> None:
        super().__init__(what if offset is None else f"offset {offset}: {what}")
        self.what = what
        self.offset = offset


class Localized(msgspec.Struct, frozen=True):
    """textWithLanguage, nameWithLanguage."""

    text: str
    language: str


class Range(msgspec.Struct, frozen=True):
    """rangeOfInteger; both ends belong to it."""

    lower: int
    upper: int


class Resolution(msgspec.Struct, frozen=True):
    """`units`: 3 dots per inch, 4 dots per centimetre (RFC 8011 5.1.16)."""

    across: int
    along: int
    units: int = 3


class Collection(msgspec.Struct, frozen=True):
    """A value made of attributes (RFC 8010 3.1.6), found by name as in a group."""

    members: tuple[Attribute, ...]

    def get(self, name: str) -> Attribute | None:
        return next((member for member in self.members if member.name == name), None)


Data = int | bool | str | bytes | datetime | Localized | Range | Resolution | Collection | None


class Value(msgspec.Struct, frozen=True):
    tag: int
    data: Data


class Attribute(msgspec.Struct, frozen=True):
    name: str
    values: tuple[Value, ...]
    """At least one."""

    @property
    def tag(self) -> int:
        """The tag of the first value."""
        return self.values[0].tag

    @property
    def data(self) -> Data:
        """The first value."""
        return self.values[0].data


class Group(msgspec.Struct, frozen=True):
    """Attributes under one delimiter. The readers below return None for an attribute that is not there (or is out of
    band, such as no-value) and raise IppError for one of another type."""

    tag: int
    attributes: tuple[Attribute, ...] = ()

    def get(self, name: str) -> Attribute | None:
        return next((attribute for attribute in self.attributes if attribute.name == name), None)

    def text(self, name: str) -> str | None:
        """The first value of any text type, without its language."""
        texts = self.texts(name)
        return texts[0] if texts else None

    def texts(self, name: str) -> tuple[str, ...]:
        attribute = self.get(name)
        if attribute is None or attribute.data is None:
            return ()
        found = []
        for value in attribute.values:
            if isinstance(value.data, Localized):
                found.append(value.data.text)
            elif isinstance(value.data, str):
                found.append(value.data)
            else:
                raise _wrong_type(attribute, "text")
        return tuple(found)

    def integer(self, name: str) -> int | None:
        """The first value of type integer or enum."""
        attribute = self.get(name)
        if attribute is None or attribute.data is None:
            return None
        if not isinstance(attribute.data, int) or isinstance(attribute.data, bool):
            raise _wrong_type(attribute, "a number")
        return attribute.data

    def boolean(self, name: str) -> bool | None:
        attribute = self.get(name)
        if attribute is None or attribute.data is None:
            return None
        if not isinstance(attribute.data, bool):
            raise _wrong_type(attribute, "a boolean")
        return attribute.data


_TAGS = frozenset(ValueTag)


def _wrong_type(attribute: Attribute, wanted: str) -> IppError:
    tag = attribute.tag
    spelled = ValueTag(tag).name.lower() if tag in _TAGS else f"tag 0x{tag:02x}"
    return IppError(f"{attribute.name} must be {wanted}, not {spelled}")


class Header(msgspec.Struct, frozen=True):
    """The first eight bytes. `code` is the operation of a request, the status of a response."""

    version: tuple[int, int]
    code: int
    request_id: int


class Message(msgspec.Struct, frozen=True):
    """What requests and responses share."""

    version: tuple[int, int]
    code: int
    request_id: int
    groups: tuple[Group, ...] = ()

    def group(self, tag: int) -> Group:
        """The first group of that tag; an empty one if there is none."""
        return next((group for group in self.groups if group.tag == tag), Group(tag))

    def groups_of(self, tag: int) -> tuple[Group, ...]:
        return tuple(group for group in self.groups if group.tag == tag)


class Request(Message, frozen=True):
    """`code` is the operation: an int, since it may be none of `Operation`."""


class Response(Message, frozen=True):
    """`code` is the status: an int, since it may be none of `Status`; below 0x0100 is success."""

    @property
    def successful(self) -> bool:
        return self.code < 0x0100


# ---- making attributes


def integer(name: str, *values: int) -> Attribute:
    return _attribute(name, ValueTag.INTEGER, values)


def enum(name: str, *values: int) -> Attribute:
    return _attribute(name, ValueTag.ENUM, values)


def boolean(name: str, value: bool) -> Attribute:
    return _attribute(name, ValueTag.BOOLEAN, (value,))


def keyword(name: str, *values: str) -> Attribute:
    return _attribute(name, ValueTag.KEYWORD, values)


def uri(name: str, *values: str) -> Attribute:
    return _attribute(name, ValueTag.URI, values)


def uri_scheme(name: str, *values: str) -> Attribute:
    return _attribute(name, ValueTag.URI_SCHEME, values)


def charset(name: str, *values: str) -> Attribute:
    return _attribute(name, ValueTag.CHARSET, values)


def language(name: str, *values: str) -> Attribute:
    return _attribute(name, ValueTag.NATURAL_LANGUAGE, values)


def mime(name: str, *values: str) -> Attribute:
    return _attribute(name, ValueTag.MIME_MEDIA_TYPE, values)


def text(name: str, *values: str) -> Attribute:
    """textWithoutLanguage."""
    return _attribute(name, ValueTag.TEXT, values)


def name(attribute_name: str, *values: str) -> Attribute:
    """nameWithoutLanguage."""
    return _attribute(attribute_name, ValueTag.NAME, values)


def octets(name: str, *values: bytes) -> Attribute:
    return _attribute(name, ValueTag.OCTET_STRING, values)


def resolution(name: str, *values: Resolution) -> Attribute:
    return _attribute(name, ValueTag.RESOLUTION, values)


def range_of_integer(name: str, *values: Range) -> Attribute:
    return _attribute(name, ValueTag.RANGE_OF_INTEGER, values)


def date_time(name: str, value: datetime) -> Attribute:
    """`value` is aware of its time zone."""
    return _attribute(name, ValueTag.DATE_TIME, (value,))


def collection(name: str, *values: Collection) -> Attribute:
    return _attribute(name, ValueTag.BEGIN_COLLECTION, values)


def no_value(name: str) -> Attribute:
    return Attribute(name, (Value(ValueTag.NO_VALUE, None),))


def unknown(name: str) -> Attribute:
    return Attribute(name, (Value(ValueTag.UNKNOWN, None),))


def _attribute(name: str, tag: ValueTag, values: Iterable[Data]) -> Attribute:
    made = tuple(Value(int(tag), value) for value in values)
    if not made:
        raise ValueError(f"attribute {name} has no value")
    return Attribute(name, made)
