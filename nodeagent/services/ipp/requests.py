"""What every IPP request must be, what it is about, and how it is answered. Pure.

Sources: RFC 8011 section 4.1.
"""

from __future__ import annotations

from nodeagent.errors import Reason
from nodeagent.services.ipp.answers import plain_text
from nodeagent.wire import ipp
from nodeagent.wire.ipp import Group, GroupTag, Request, Response, Status

VERSIONS = ((1, 1), (2, 0))


class Refusal(Exception):
    """The request gets this IPP status. `reason` None: an answer like any other, nothing was denied."""

    def __init__(
        self, status: Status, message: str, reason: Reason | None = None, unsupported: tuple[ipp.Attribute, ...] = ()
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.reason = reason
        self.unsupported = unsupported


DEFAULT_PATHS = ((), ("ipp",), ("ipp", "print"), ("printers",))
ALL_PATHS = ((), ("printers",), ("jobs",))


def check(request: Request) -> None:
    """RFC 8011 4.1: version, request id, charset, language, in this order. Raises Refusal."""
    if request.version[0] not in (1, 2):
        major, minor = request.version
        raise Refusal(Status.VERSION_NOT_SUPPORTED, f"IPP {major}.{minor} is not spoken here", Reason.NOT_SUPPORTED)
    if request.request_id < 1:
        raise Refusal(Status.BAD_REQUEST, f"request-id {request.request_id} is not positive", Reason.MALFORMED)
    if not request.groups or request.groups[0].tag != GroupTag.OPERATION:
        raise Refusal(Status.BAD_REQUEST, "the first group must be operation attributes", Reason.MALFORMED)
    first = request.groups[0].attributes[:2]
    names = tuple((attribute.name, attribute.tag) for attribute in first)
    if names != (
        ("attributes-charset", ipp.ValueTag.CHARSET),
        ("attributes-natural-language", ipp.ValueTag.NATURAL_LANGUAGE),
    ):
        raise Refusal(
            Status.BAD_REQUEST, "attributes-charset and attributes-natural-language must come first", Reason.MALFORMED
        )
    if str(first[0].data).lower() != "utf-8":
        raise Refusal(Status.CHARSET_NOT_SUPPORTED, "only utf-8 is spoken here", Reason.NOT_SUPPORTED, first[:1])


def response(
    request: Request | ipp.Header, status: Status, message: str = "", groups: tuple[Group, ...] = ()
) -> Response:
    """A response to this request, in its version of IPP where that is ours."""
    operation = [ipp.charset("attributes-charset", "utf-8"), ipp.language("attributes-natural-language", "en")]
    if message:
        operation.append(ipp.text("status-message", plain_text(message)))
    version = request.version
    if version not in VERSIONS:
        version = (1, 1) if version[0] == 1 else (2, 0)
    return Response(version, int(status), request.request_id, (Group(GroupTag.OPERATION, tuple(operation)), *groups))


def path_of(request: Request, name: str) -> tuple[str, ...]:
    """The segments of the path of a URI attribute; its host means nothing on this socket. Raises Refusal."""
    uri = request.group(GroupTag.OPERATION).text(name)
    if uri is None:
        raise Refusal(Status.BAD_REQUEST, f"{name} is missing", Reason.MALFORMED)
    scheme, colon, rest = uri.partition("://")
    if not colon or scheme.lower() not in ("ipp", "ipps", "http", "https"):
        raise Refusal(Status.BAD_REQUEST, f"{name} is no IPP URI", Reason.MALFORMED)
    path = rest.partition("/")[2].partition("?")[0]
    return tuple(path.strip("/").split("/")) if path.strip("/") else ()


def printer_name(path: tuple[str, ...]) -> str:
    """`/printers/<name>` and `/ipp/print/<name>`; anything else is no printer's name."""
    if len(path) == 2 and path[0] == "printers":
        return path[1]
    return path[2] if len(path) == 3 and path[:2] == ("ipp", "print") else ""


def is_number(untrusted_text: str) -> bool:
    return untrusted_text.isascii() and untrusted_text.isdigit() and len(untrusted_text) <= 10


def requested(request: Request) -> tuple[str, ...]:
    return request.group(GroupTag.OPERATION).texts("requested-attributes")


def limit(request: Request) -> int | None:
    limit = request.group(GroupTag.OPERATION).integer("limit")
    if limit is not None and limit < 1:
        raise Refusal(Status.BAD_REQUEST, f"limit {limit} is not positive", Reason.MALFORMED)
    return limit
