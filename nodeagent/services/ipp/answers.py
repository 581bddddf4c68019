"""Printers and jobs of a seat as IPP attributes. Pure: the same values give the same answer.

Only what the whole chain does is announced (RFC 8011 6.2: `xxx-supported`): documents keep their own pages, colours and
sides, and the printer is asked for copies. What a client wants beyond that comes back as unsupported.

Sources: RFC 8011 section 5.4 (printer), 5.3 (job), PWG 5100.14 (IPP Everywhere), the CUPS implementation of IPP
(printer-type, device-uri), PWG 5102.4 (raster), all as read by the stock CUPS client.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime

import msgspec

from nodeagent.services.ipp import media
from nodeagent.services.ipp.formats import OCTET_STREAM
from nodeagent.wire import ipp
from nodeagent.wire.seat import Job, Printer

MAX_COPIES = 999
MAX_TEXT = 255
"""Bytes of a job's title (RFC 8011 5.1.3: a name)."""
OPERATION_TIMEOUT_S = 300
"""multiple-operation-time-out: a job whose next document does not come for so long is given up."""
_RESOLUTIONS = (ipp.Resolution(300, 300), ipp.Resolution(600, 600))

PRINTER_IDLE, PRINTER_PROCESSING = 3, 4
JOB_PENDING, JOB_INCOMING, JOB_PROCESSING, JOB_CANCELED, JOB_COMPLETED = 3, 4, 5, 7, 9

PRINTER_TYPE = 0x0004 | 0x0008 | 0x0040 | 0x1000 | 0x2000
"""cups_ptype_t: black, colour, copies, paper up to legal, paper up to A3."""

TEMPLATE: tuple[ipp.Attribute, ...] = (
    ipp.integer("copies-default", 1),
    ipp.range_of_integer("copies-supported", ipp.Range(1, MAX_COPIES)),
    ipp.enum("finishings-default", 3),
    ipp.enum("finishings-supported", 3),
    ipp.keyword("job-hold-until-default", "no-hold"),
    ipp.keyword("job-hold-until-supported", "no-hold"),
    ipp.integer("job-priority-default", 50),
    ipp.integer("job-priority-supported", 1),
    ipp.name("job-sheets-default", "none", "none"),
    ipp.name("job-sheets-supported", "none"),
    *media.TEMPLATE,
    ipp.integer("number-up-default", 1),
    ipp.integer("number-up-supported", 1),
    ipp.no_value("orientation-requested-default"),
    ipp.enum("orientation-requested-supported", 3),
    ipp.keyword("output-bin-default", "face-down"),
    ipp.keyword("output-bin-supported", "face-down"),
    ipp.boolean("page-ranges-supported", False),
    ipp.keyword("print-color-mode-default", "auto"),
    ipp.keyword("print-color-mode-supported", "auto", "color"),
    ipp.keyword("print-content-optimize-default", "auto"),
    ipp.keyword("print-content-optimize-supported", "auto"),
    ipp.enum("print-quality-default", 4),
    ipp.enum("print-quality-supported", 4),
    ipp.keyword("print-rendering-intent-default", "auto"),
    ipp.keyword("print-rendering-intent-supported", "auto"),
    ipp.keyword("print-scaling-default", "none"),
    ipp.keyword("print-scaling-supported", "none", "auto"),
    ipp.resolution("printer-resolution-default", _RESOLUTIONS[1]),
    ipp.resolution("printer-resolution-supported", *_RESOLUTIONS),
    ipp.keyword("sides-default", "one-sided"),
    ipp.keyword("sides-supported", "one-sided"),
)

_CHOICES: dict[str, frozenset[ipp.Data]] = {
    what: frozenset(value.data for value in attribute.values)
    for attribute in TEMPLATE
    for what, _, word in (attribute.name.rpartition("-"),)
    if word == "supported" and what not in ("copies", "job-priority", "page-ranges") and not what.startswith("media-")
}
"""Job attribute -> the values it may have, where that is a plain list."""
_JOB_CREATION = ("copies", "ipp-attribute-fidelity", "job-name", "job-priority", "media-col", *sorted(_CHOICES))
WHICH_JOBS = ("completed", "not-completed", "all", "aborted", "canceled", "pending", "pending-held", "processing")


class Seat(msgspec.Struct, frozen=True, kw_only=True):
    """What the answers need beside the printer: whose desktop, the time (Unix seconds) and since when all this is so."""

    desktop: str
    now: float
    changed_s: int
    jobs: tuple[Job, ...]
    operations: tuple[int, ...]
    max_document_bytes: int


def printer_uri(name: str) -> str:
    return f"ipp://localhost/printers/{name}"


def job_uri(job: int) -> str:
    return f"ipp://localhost/jobs/{job}"


def document_formats(printer: Printer) -> tuple[str, ...]:
    """What a client may declare: what can be printed, and "find it out"."""
    return tuple(dict.fromkeys((OCTET_STREAM, *printer.formats)))


def plain_text(untrusted_text: str, limit: int = MAX_TEXT) -> str:
    """Text of a desktop for other eyes: no control characters (C0, C1, line separators), at most `limit`
    bytes of UTF-8."""
    text = "".join(c for c in untrusted_text if not (c < " " or "\x7f" <= c <= "\x9f" or c in "\u2028\u2029"))
    return text.strip().encode()[:limit].decode(errors="ignore")


def _uuid(*parts: str) -> str:
    """A stable urn:uuid (RFC 9562 version 8: our own making) of these words."""
    digest = bytearray(hashlib.sha256("\0".join(parts).encode()).digest()[:16])
    digest[6] = digest[6] & 0x0F | 0x80
    digest[8] = digest[8] & 0x3F | 0x80
    text = digest.hex()
    return f"urn:uuid:{text[:8]}-{text[8:12]}-{text[12:16]}-{text[16:20]}-{text[20:]}"


def _printer_description(printer: Printer, seat: Seat) -> tuple[ipp.Attribute, ...]:
    uri, now = printer_uri(printer.name), int(seat.now)
    unfinished = [job for job in seat.jobs if job.printer == printer.name and job.state < JOB_CANCELED]
    printing = any(job.state == JOB_PROCESSING for job in unfinished)
    message = printer.state_message
    if not message and not printer.online:
        message = "The printer is unplugged; jobs wait until it is back."
    mark = " (simulated)" if printer.simulated and "simulated" not in printer.info.lower() else ""
    changed = datetime.fromtimestamp(seat.changed_s, UTC)
    return (
        ipp.keyword("auth-info-required", "none"),
        ipp.charset("charset-configured", "utf-8"),
        ipp.charset("charset-supported", "utf-8"),
        ipp.boolean("color-supported", True),
        ipp.keyword("compression-supported", "none"),
        ipp.uri("device-uri", f"{'simulated' if printer.simulated else 'seat'}:/{printer.name}"),
        ipp.mime("document-format-default", OCTET_STREAM),
        ipp.mime("document-format-supported", *document_formats(printer)),
        ipp.language("generated-natural-language-supported", "en"),
        ipp.keyword("ipp-features-supported", "none"),
        ipp.keyword("ipp-versions-supported", "1.1", "2.0"),
        ipp.keyword("job-creation-attributes-supported", *_JOB_CREATION),
        ipp.boolean("job-ids-supported", False),
        ipp.range_of_integer("job-k-octets-supported", ipp.Range(0, seat.max_document_bytes // 1024)),
        ipp.boolean("multiple-document-jobs-supported", True),
        ipp.integer("multiple-operation-time-out", OPERATION_TIMEOUT_S),
        ipp.keyword("multiple-operation-time-out-action", "abort-job"),
        ipp.language("natural-language-configured", "en"),
        ipp.enum("operations-supported", *seat.operations),
        ipp.integer("pages-per-minute", 1),
        ipp.integer("pages-per-minute-color", 1),
        ipp.keyword("pdl-override-supported", "not-attempted"),
        ipp.boolean("preferred-attributes-supported", False),
        ipp.date_time("printer-config-change-date-time", changed),
        ipp.integer("printer-config-change-time", seat.changed_s),
        ipp.date_time("printer-current-time", datetime.fromtimestamp(now, UTC)),
        ipp.unknown("printer-geo-location"),
        ipp.keyword("printer-get-attributes-supported", "document-format"),
        ipp.text("printer-info", f"{printer.info}{mark}"),
        ipp.boolean("printer-is-accepting-jobs", True),
        ipp.boolean("printer-is-shared", False),
        ipp.boolean("printer-is-temporary", False),
        ipp.keyword("printer-kind", "document"),
        ipp.text("printer-location", ""),
        ipp.text("printer-make-and-model", printer.make_and_model),
        ipp.uri("printer-more-info", f"http://localhost/printers/{printer.name}"),
        ipp.name("printer-name", printer.name),
        ipp.enum("printer-state", PRINTER_PROCESSING if printing else PRINTER_IDLE),
        ipp.date_time("printer-state-change-date-time", changed),
        ipp.integer("printer-state-change-time", seat.changed_s),
        ipp.text("printer-state-message", message),
        ipp.keyword("printer-state-reasons", "none" if printer.online else "offline-report"),
        ipp.enum("printer-type", PRINTER_TYPE),
        ipp.integer("printer-up-time", now),
        ipp.uri("printer-uri-supported", uri),
        ipp.uri("printer-uuid", _uuid("printer", seat.desktop, printer.name)),
        ipp.integer("queued-job-count", len(unfinished)),
        ipp.uri_scheme("reference-uri-schemes-supported", "ipp"),
        ipp.keyword("uri-authentication-supported", "none"),
        ipp.keyword("uri-security-supported", "none"),
        ipp.keyword("which-jobs-supported", *WHICH_JOBS),
        *_raster(printer),
    )


def _raster(printer: Printer) -> Iterable[ipp.Attribute]:
    """What a client must know to make the pages itself."""
    if "image/pwg-raster" in printer.formats:
        yield ipp.resolution("pwg-raster-document-resolution-supported", *_RESOLUTIONS)
        yield ipp.keyword("pwg-raster-document-sheet-back", "normal")
        yield ipp.keyword("pwg-raster-document-type-supported", "black_1", "sgray_8", "srgb_8")
    if "image/urf" in printer.formats:
        yield ipp.keyword("urf-supported", "V1.4", "CP1", "RS300-600", "SRGB24", "W8")


def printer_group(printer: Printer, seat: Seat, requested: tuple[str, ...]) -> ipp.Group:
    """The printer's attributes that `requested` (requested-attributes; empty: all) asks for."""
    groups = {"printer-description": _printer_description(printer, seat), "job-template": TEMPLATE}
    found = select(requested, groups)
    if media.DATABASE.name in requested:
        found = (*found, media.DATABASE)
    return ipp.Group(ipp.GroupTag.PRINTER, found)


def job_group(job: Job, seat: Seat, requested: tuple[str, ...]) -> ipp.Group:
    """The job's attributes that `requested` asks for (empty: all)."""
    times: list[ipp.Attribute] = []
    for what, at in (("creation", job.created_s), ("processing", job.processing_s), ("completed", job.completed_s)):
        for name, attribute in (
            (f"time-at-{what}", ipp.integer(f"time-at-{what}", at)),
            (f"date-time-at-{what}", ipp.date_time(f"date-time-at-{what}", datetime.fromtimestamp(at, UTC))),
        ):
            times.append(attribute if at else ipp.no_value(name))
    description = (
        ipp.integer("job-id", job.id),
        ipp.integer("job-k-octets", (job.size_bytes + 1023) // 1024),
        ipp.name("job-name", job.title),
        ipp.name("job-originating-user-name", seat.desktop),
        ipp.integer("job-printer-up-time", int(seat.now)),
        ipp.uri("job-printer-uri", printer_uri(job.printer)),
        ipp.enum("job-state", job.state),
        ipp.text("job-state-message", job.message),
        ipp.keyword("job-state-reasons", job.reason),
        ipp.uri("job-uri", job_uri(job.id)),
        ipp.uri("job-uuid", _uuid("job", seat.desktop, str(job.id), str(job.created_s))),
        *times,
    )
    template = (ipp.integer("job-priority", 50), ipp.name("job-sheets", "none", "none"))
    return ipp.Group(ipp.GroupTag.JOB, select(requested, {"job-description": description, "job-template": template}))


def select(requested: tuple[str, ...], groups: Mapping[str, tuple[ipp.Attribute, ...]]) -> tuple[ipp.Attribute, ...]:
    """The attributes that requested-attributes names, one by one or by group (RFC 8011 4.2.5.1); empty: all.
    `printer-defaults` is CUPS' name for everything that ends in -default."""
    wanted = frozenset(requested or ("all",))
    found: list[ipp.Attribute] = []
    for group, attributes in groups.items():
        if "all" in wanted or group in wanted:
            found += attributes
        else:
            defaults = "printer-defaults" in wanted
            found += (a for a in attributes if a.name in wanted or (defaults and a.name.endswith("-default")))
    return tuple(found)


def unsupported_attributes(job_group: ipp.Group) -> tuple[ipp.Attribute, ...]:
    """What a client asks of a job that will not happen: unknown attributes with the out-of-band value `unsupported`,
    known ones with the values that are not (RFC 8011 4.1.7)."""
    refused = []
    for attribute in job_group.attributes:
        if attribute.name in _CHOICES:
            bad = tuple(value for value in attribute.values if value.data not in _CHOICES[attribute.name])
        elif attribute.name in ("copies", "job-priority"):
            top = MAX_COPIES if attribute.name == "copies" else 100
            fits = type(attribute.data) is int and 1 <= attribute.data <= top and len(attribute.values) == 1
            bad = () if fits else attribute.values
        elif attribute.name == "media-col":
            bad = tuple(value for value in attribute.values if not _is_our_media(value.data))
        else:
            bad = (ipp.Value(ipp.ValueTag.UNSUPPORTED, None),)
        if bad:
            refused.append(ipp.Attribute(attribute.name, bad))
    return tuple(refused)


def _is_our_media(data: ipp.Data) -> bool:
    if not isinstance(data, ipp.Collection):
        return False
    for member in data.members:
        if member.name == "media-size":
            size = member.data if isinstance(member.data, ipp.Collection) else ipp.Collection(())
            dimensions = tuple(d.data if (d := size.get(name)) else None for name in ("x-dimension", "y-dimension"))
            if dimensions not in media.SIZES.values():
                return False
        elif member.name not in media.COL_MEMBERS:
            return False
    return True
