"""IPP messages (RFC 8010 encoding, RFC 8011 types) as frozen values. No I/O.

    take_request(untrusted_data)  -> (Request, bytes used) or None while the attributes are not yet complete
    take_response(untrusted_data) -> (Response, bytes used) or None
    put_request(request)   -> bytes          put_response(response) -> bytes
    take_header(untrusted_data)   -> Header: what can be answered even when the rest is malformed
    Extent(limits).reach(buffer)  -> where the attributes end, on a growing buffer, in linear time altogether

What follows the attributes is document data and not looked at. A message is groups of attributes; an attribute is a
name and one or more values, each with its own tag, since a set may mix types (`rangeOfInteger | integer`).

    Request((2, 0), Operation.PRINT_JOB, 1, (
        Group(GroupTag.OPERATION, (charset("attributes-charset", "utf-8"), language("attributes-natural-language", "en"),
                                   uri("printer-uri", "ipp://localhost/printers/desk"), name("job-name", "letter"))),))
    response.groups_of(GroupTag.JOB)[0].integer("job-id")

Python type of a value's `data`, by tag:

    integer, enum -> int            boolean -> bool       rangeOfInteger -> Range      resolution -> Resolution
    dateTime -> aware datetime      text/name/keyword/uri/uriScheme/charset/naturalLanguage/mimeMediaType -> str
    text/nameWithLanguage -> Localized                    collection -> Collection     out-of-band (no-value ...) -> None
    octetString and every tag unknown to us -> bytes

Whatever bytes come in, only `IppError` is raised; it says at which offset what was wrong.
"""

from __future__ import annotations

from datetime import datetime, timedelta, timezone

import msgspec

from nodeagent.wire.ipp_codes import GroupTag, Operation, Status, ValueTag

from nodeagent.wire.ipp_values import (  # isort: skip
    Attribute, Collection, Data, Group, Header, IppError, Localized, Message, Range, Request, Resolution,
    Response, Value, boolean, charset, collection, date_time, enum, integer, keyword, language, mime, name,
    no_value, octets, range_of_integer, resolution, text, unknown, uri, uri_scheme,
)  # fmt: skip

__all__ = [  # noqa: RUF022
    "Attribute", "boolean", "charset", "collection", "Collection", "Data", "date_time", "enum", "Extent",
    "Group", "GroupTag", "Header", "integer", "IppError", "keyword", "language", "Limits", "Localized", "mime",
    "name", "no_value", "octets", "Operation", "put_request", "put_response", "Range", "range_of_integer",
    "Request", "REQUEST_LIMITS", "resolution", "Resolution", "Response", "RESPONSE_LIMITS", "Status",
    "take_header", "take_request", "take_response", "text", "unknown", "uri", "uri_scheme", "Value", "ValueTag",
]  # fmt: skip


class Limits(msgspec.Struct, frozen=True):
    """What a message may cost before it is refused."""

    section_bytes: int = 64 * 1024
    """Header and all attributes together, end tag included."""
    values: int = 2000
    """Values and group tags of the whole message; members of collections count."""
    value_bytes: int = 32767
    """RFC 8010 3.9: no value is longer."""
    name_bytes: int = 255
    nesting: int = 8
    """Collections inside collections."""


REQUEST_LIMITS = Limits()
RESPONSE_LIMITS = Limits(section_bytes=4 * 1024 * 1024, values=100_000)
"""For answers of a server we started ourselves: a long queue is long."""


# ---- taking messages


def take_header(untrusted_data: bytes | bytearray | memoryview) -> Header | None:
    """The header, or None while it is shorter than its eight bytes. Never raises: every eight bytes are a header."""
    if len(untrusted_data) < 8:
        return None
    data = bytes(untrusted_data[:8])
    return Header((data[0], data[1]), int.from_bytes(data[2:4], "big"), int.from_bytes(data[4:8], "big", signed=True))


class Extent:
    """Finds the end of the attributes on a buffer that grows; remembers how far it came, so that a sender of single
    bytes costs no more than one of whole messages. Checks lengths and counts, not what the values say."""

    def __init__(self, limits: Limits = REQUEST_LIMITS) -> None:
        self._limits = limits
        self._at = 8
        self._values = 0
        self._in_group = False

    def reach(self, untrusted_buffer: bytes | bytearray | memoryview) -> int | None:
        """Bytes up to and with the end-of-attributes tag, or None: not there yet. `untrusted_buffer` starts with the
        header and only ever grows between calls. Raises IppError, as early as the fault can be seen."""
        buffer, limits, at, have = untrusted_buffer, self._limits, self._at, len(untrusted_buffer)
        while at < have:
            self._at = at
            tag = buffer[at]
            if tag == GroupTag.END:
                return at + 1
            if self._values >= limits.values:
                raise IppError(f"more than {limits.values} values", at)
            if tag < ValueTag.UNSUPPORTED:
                if tag == 0:
                    raise IppError("group tag 0x00 is reserved", at)
                self._in_group, end = True, at + 1
            elif not self._in_group:
                raise IppError(f"value tag 0x{tag:02x} before any group", at)
            else:
                if have < at + 3:
                    break
                name_bytes = buffer[at + 1] << 8 | buffer[at + 2]
                if name_bytes > limits.name_bytes:
                    raise IppError(f"attribute name of {name_bytes} bytes is over {limits.name_bytes}", at + 1)
                value_at = at + 3 + name_bytes
                if have < value_at + 2:
                    break
                value_bytes = buffer[value_at] << 8 | buffer[value_at + 1]
                if value_bytes > limits.value_bytes:
                    raise IppError(f"value of {value_bytes} bytes is over {limits.value_bytes}", value_at)
                end = value_at + 2 + value_bytes
            if end >= limits.section_bytes:
                raise IppError(f"attributes are over {limits.section_bytes} bytes", at)
            if end > have:
                break
            self._values += 1
            at = end
        self._at = at
        return None


def take_request(
    untrusted_data: bytes | bytearray | memoryview, limits: Limits = REQUEST_LIMITS
) -> tuple[Request, int] | None:
    """One request and the bytes it took; the rest is document data. None: not complete yet. Raises IppError.

    An attribute that appears twice in one group is refused (RFC 8011 4.1.3 allows it): two readers of one message must
    not see two things.
    """
    taken = _take(untrusted_data, limits)
    if taken is None:
        return None
    header, groups, used = taken
    for group in groups:
        names = [attribute.name for attribute in group.attributes]
        if len(set(names)) != len(names):
            twice = next(name for index, name in enumerate(names) if name in names[:index])
            raise IppError(f"attribute {twice!r} appears twice in one group")
    return Request(header.version, header.code, header.request_id, groups), used


def take_response(
    untrusted_data: bytes | bytearray | memoryview, limits: Limits = RESPONSE_LIMITS
) -> tuple[Response, int] | None:
    """One response and the bytes it took. None: not complete yet. Raises IppError."""
    taken = _take(untrusted_data, limits)
    if taken is None:
        return None
    header, groups, used = taken
    return Response(header.version, header.code, header.request_id, groups), used


def _take(
    untrusted_data: bytes | bytearray | memoryview, limits: Limits
) -> tuple[Header, tuple[Group, ...], int] | None:
    end = Extent(limits).reach(untrusted_data)
    header = take_header(untrusted_data)
    if end is None or header is None:
        return None
    return header, _Reader(bytes(untrusted_data[:end]), limits).groups(), end


class _Token(msgspec.Struct, frozen=True):
    """One tag-name-value triple; lengths are known to lie inside the section (Extent has seen them)."""

    at: int
    tag: int
    name: bytes
    value: bytes


class _Reader:
    def __init__(self, data: bytes, limits: Limits) -> None:
        self._data = data
        self._limits = limits
        self._at = 8

    def groups(self) -> tuple[Group, ...]:
        groups: list[Group] = []
        while (tag := self._data[self._at]) != GroupTag.END:
            self._at += 1
            groups.append(Group(tag, self._attributes()))
        return tuple(groups)

    def _token(self) -> _Token | None:
        """The next triple, or None before a group tag; moves past it."""
        data, at = self._data, self._at
        if data[at] < ValueTag.UNSUPPORTED:
            return None
        value_at = at + 5 + (data[at + 1] << 8 | data[at + 2])
        end = value_at + (data[value_at - 2] << 8 | data[value_at - 1])
        self._at = end
        return _Token(at, data[at], data[at + 3 : value_at - 2], data[value_at:end])

    def _attributes(self) -> tuple[Attribute, ...]:
        attributes: list[Attribute] = []
        name, values = "", list[Value]()
        while (token := self._token()) is not None:
            if token.name:
                if values:
                    attributes.append(Attribute(name, tuple(values)))
                name, values = _string(token.name, token.at + 3), []
            elif not values:
                raise IppError("a further value without an attribute before it", token.at)
            values.append(self._value(token, 0))
        if values:
            attributes.append(Attribute(name, tuple(values)))
        return tuple(attributes)

    def _value(self, token: _Token, depth: int) -> Value:
        if token.tag == ValueTag.BEGIN_COLLECTION:
            if depth >= self._limits.nesting:
                raise IppError(f"collections nested deeper than {self._limits.nesting}", token.at)
            return Value(token.tag, self._collection(token.at, depth + 1))
        if token.tag in (ValueTag.END_COLLECTION, ValueTag.MEMBER_NAME):
            raise IppError(f"tag 0x{token.tag:02x} outside a collection", token.at)
        return Value(token.tag, _data(token))

    def _collection(self, began: int, depth: int) -> Collection:
        members: list[Attribute] = []
        name, values = "", list[Value]()
        while True:
            token = self._token()
            if token is None:
                raise IppError("a collection without an end", began)
            if token.name:
                raise IppError("a named attribute inside a collection", token.at)
            if token.tag in (ValueTag.END_COLLECTION, ValueTag.MEMBER_NAME):
                if values:
                    members.append(Attribute(name, tuple(values)))
                elif name:
                    raise IppError(f"collection member {name!r} has no value", token.at)
                if token.tag == ValueTag.END_COLLECTION:
                    return Collection(tuple(members))
                name, values = _string(token.value, token.at + 5), []
                if not name:
                    raise IppError("a collection member without a name", token.at)
                continue
            if not name:
                raise IppError("a collection value before its member name", token.at)
            values.append(self._value(token, depth))


def _string(data: bytes, at: int) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise IppError("not UTF-8 text", at + error.start) from None


_SIZES = {
    ValueTag.INTEGER: 4, ValueTag.ENUM: 4, ValueTag.BOOLEAN: 1, ValueTag.DATE_TIME: 11, ValueTag.RESOLUTION: 9,
    ValueTag.RANGE_OF_INTEGER: 8,
}  # fmt: skip
_STRINGS = range(ValueTag.TEXT, ValueTag.MEMBER_NAME)
"""All of 0x41..0x49 are character strings; the unassigned 0x43 and those from 0x4B on stay bytes."""


def _signed(data: bytes) -> int:
    return int.from_bytes(data, "big", signed=True)


def _data(token: _Token) -> Data:
    tag, value, at = token.tag, token.value, token.at + 5 + len(token.name)
    if tag < 0x20:
        return None
    size = _SIZES.get(tag)  # type: ignore[call-overload]
    if size is not None and len(value) != size:
        raise IppError(f"{ValueTag(tag).name.lower()} of {len(value)} bytes, must be {size}", at)
    if tag in (ValueTag.INTEGER, ValueTag.ENUM):
        return _signed(value)
    if tag == ValueTag.BOOLEAN:
        if value[0] > 1:
            raise IppError(f"boolean 0x{value[0]:02x} is neither 0 nor 1", at)
        return value[0] == 1
    if tag == ValueTag.RANGE_OF_INTEGER:
        return Range(_signed(value[:4]), _signed(value[4:]))
    if tag == ValueTag.RESOLUTION:
        return Resolution(_signed(value[:4]), _signed(value[4:8]), value[8])
    if tag == ValueTag.DATE_TIME:
        return _take_date_time(value, at)
    if tag in (ValueTag.TEXT_WITH_LANGUAGE, ValueTag.NAME_WITH_LANGUAGE):
        return _take_localized(value, at)
    if tag in _STRINGS and tag != 0x43:
        return _string(value, at)
    return value


def _take_localized(value: bytes, at: int) -> Localized:
    text_at = 2 + int.from_bytes(value[:2], "big")
    text_end = text_at + 2 + int.from_bytes(value[text_at : text_at + 2], "big")
    if len(value) < 4 or text_at + 2 > len(value) or text_end != len(value):
        raise IppError("lengths of a value with language do not add up", at)
    return Localized(_string(value[text_at + 2 :], at + text_at + 2), _string(value[2:text_at], at + 2))


def _take_date_time(value: bytes, at: int) -> datetime:
    """RFC 2579 DateAndTime. A leap second (60) becomes the second before it."""
    year, (month, day, hour, minute, second, tenths, sign, zone_h, zone_m) = value[0] << 8 | value[1], value[2:]
    try:
        offset = timedelta(hours=zone_h, minutes=zone_m)
        zone = timezone(offset if sign == ord("+") else -offset)
        made = datetime(year, month, day, hour, minute, min(second, 59), tenths * 100_000, zone)
    except (ValueError, OverflowError) as error:
        raise IppError(f"impossible dateTime ({error})", at) from None
    if sign not in b"+-" or second > 60:
        raise IppError("impossible dateTime", at)
    return made


# ---- putting messages


def put_request(request: Request) -> bytes:
    """Raises ValueError for what has no encoding (a value over 32767 bytes, a number over 32 bits)."""
    return _put(request)


def put_response(response: Response) -> bytes:
    """Raises ValueError as `put_request`."""
    return _put(response)


def _put(message: Message) -> bytes:
    out = bytearray(message.version)
    try:
        out += message.code.to_bytes(2, "big") + message.request_id.to_bytes(4, "big", signed=True)
        for group in message.groups:
            out.append(group.tag)
            for attribute in group.attributes:
                _put_values(out, attribute.name.encode(), attribute.values)
    except OverflowError as error:
        raise ValueError(f"a number does not fit into its field: {error}") from error
    out.append(GroupTag.END)
    return bytes(out)


def _put_values(out: bytearray, name: bytes, values: tuple[Value, ...]) -> None:
    for value in values:
        if isinstance(value.data, Collection):
            _put_triple(out, ValueTag.BEGIN_COLLECTION, name, b"")
            for member in value.data.members:
                _put_triple(out, ValueTag.MEMBER_NAME, b"", member.name.encode())
                _put_values(out, b"", member.values)
            _put_triple(out, ValueTag.END_COLLECTION, b"", b"")
        else:
            _put_triple(out, value.tag, name, _put_data(value))
        name = b""


def _put_triple(out: bytearray, tag: int, name: bytes, value: bytes) -> None:
    if len(name) > REQUEST_LIMITS.name_bytes or len(value) > REQUEST_LIMITS.value_bytes:
        raise ValueError(f"attribute name of {len(name)} or value of {len(value)} bytes is too long")
    out.append(tag)
    out += len(name).to_bytes(2, "big") + name + len(value).to_bytes(2, "big") + value


def _put_data(value: Value) -> bytes:
    data = value.data
    if data is None:
        return b""
    if isinstance(data, bytes):
        return data
    if isinstance(data, str):
        return data.encode()
    if isinstance(data, bool):
        return b"\x01" if data else b"\x00"
    if isinstance(data, int):
        return data.to_bytes(4, "big", signed=True)
    if isinstance(data, Range):
        return data.lower.to_bytes(4, "big", signed=True) + data.upper.to_bytes(4, "big", signed=True)
    if isinstance(data, Resolution):
        across, along = data.across.to_bytes(4, "big", signed=True), data.along.to_bytes(4, "big", signed=True)
        return across + along + bytes((data.units,))
    if isinstance(data, Localized):
        parts = (data.language.encode(), data.text.encode())
        return b"".join(len(part).to_bytes(2, "big") + part for part in parts)
    if isinstance(data, datetime):
        return _put_date_time(data)
    raise ValueError(f"a collection under tag 0x{value.tag:02x}")


def _put_date_time(moment: datetime) -> bytes:
    offset = moment.utcoffset()
    if offset is None:
        raise ValueError("a dateTime without a time zone")
    minutes, sign = abs(int(offset.total_seconds())) // 60, b"-" if offset < timedelta(0) else b"+"
    clock = (moment.month, moment.day, moment.hour, moment.minute, moment.second, moment.microsecond // 100_000)
    return moment.year.to_bytes(2, "big") + bytes(clock) + sign + bytes((minutes // 60, minutes % 60))
