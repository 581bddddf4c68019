"""Which programs turn a document into something a printer speaks. Pure: nothing is run here (`filters` does that).

A plan is a row of stages. Each reads a regular file on its standard input, which it may open again as /proc/self/fd/0 (a
pipe would be copied first), writes its standard output and may write below $TMPDIR. The programs are Ghostscript and the
filters of cups-filters 1.x as they are; the latter learn the size of the sheet from a PPD only.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from nodeagent.errors import AgentError, Reason

OCTET_STREAM = "application/octet-stream"
"""Of a printer: it does not say what it speaks. Of a document: nobody knows what it is."""
PDF = "application/pdf"
POSTSCRIPT = "application/postscript"
PWG = "image/pwg-raster"
URF = "image/urf"

STDIN = "/proc/self/fd/0"
GHOSTSCRIPT = (
    *("gs", "-q", "-dSAFER", "-dBATCH", "-dNOPAUSE", "-dNOPROMPT"),
    *("-sstdout=%stderr", "-sOutputFile=%stdout"),
)
_GREY = ("-dcupsColorSpace=18", "-dcupsBitsPerColor=8", "-dcupsColorOrder=0")
"""sGray, 8 bits, chunky. A device id does not say whether there is colour; grey is what every printer must take
(PWG 5102.4 section 4.2, URF's W8), while Ghostscript's own default is one bit."""
TARGETS: dict[str, tuple[str, ...]] = {
    PDF: ("-sDEVICE=pdfwrite",),
    POSTSCRIPT: ("-sDEVICE=ps2write",),
    "application/vnd.hp-pclxl": ("-sDEVICE=pxlmono", "-r600"),
    PWG: ("-sDEVICE=pwgraster", "-r300", *_GREY),
    URF: ("-sDEVICE=urf", "-r300", *_GREY),
    "application/vnd.hp-pcl": ("-sDEVICE=ljet4", "-r600"),
}
"""What Ghostscript can make, the best first, and the arguments that make it."""
NATIVE_ONLY = frozenset({OCTET_STREAM, "application/vnd.hp-pcl", "application/vnd.hp-pclxl"})
"""What a printer that names no language still gets: the output of a driver in the desktop, which knows better than we do."""

A4_PPD = """\
*PPD-Adobe: "4.3"
*FormatVersion: "4.3"
*FileVersion: "1.0"
*LanguageVersion: English
*LanguageEncoding: ISOLatin1
*PCFileName: "A4.PPD"
*Manufacturer: "any"
*Product: "(any)"
*ModelName: "A4"
*ShortNickName: "A4"
*NickName: "A4"
*PSVersion: "(3010.000) 0"
*ColorDevice: True
*DefaultColorSpace: RGB
*OpenUI *PageSize: PickOne
*DefaultPageSize: A4
*PageSize A4: ""
*CloseUI: *PageSize
*OpenUI *PageRegion: PickOne
*DefaultPageRegion: A4
*PageRegion A4: ""
*CloseUI: *PageRegion
*DefaultImageableArea: A4
*ImageableArea A4: "28 28 567 814"
*DefaultPaperDimension: A4
*PaperDimension A4: "595 842"
"""
FONTS = """\
charset utf8
0000 04FF ltor single monospace monospace:bold monospace:oblique monospace:bold:oblique
0500 05FF rtol single monospace
0600 2E7F ltor single monospace
2E80 FFFF ltor double monospace:lang=zh-cn
"""
"""texttopdf's map of characters to fontconfig patterns. The map that Debian ships asks for one Chinese font by its name and
gets boxes when another is installed."""
_ON_A4 = """\
set -e
mkdir -p "$TMPDIR/charsets"
printf %s "$1" > "$TMPDIR/charsets/pdf.utf-8"
printf %s "$2" > "$TMPDIR/a4.ppd"
export CUPS_DATADIR="$TMPDIR" PPD="$TMPDIR/a4.ppd"
shift 2
exec "$@"
"""


class Stage(msgspec.Struct, frozen=True):
    """One program of a plan. `name` is for messages; `env` comes on top of what every filter gets."""

    name: str
    argv: tuple[str, ...]
    env: dict[str, str] = {}


def plan(document_format: str, printer_formats: Sequence[str], server_bin: str = "/usr/lib/cups") -> tuple[Stage, ...]:
    """The stages from a document of that format (MIME) to one the printer speaks; () when it speaks it already.

    Raises AgentError(NOT_SUPPORTED) when there is no way.
    """
    if document_format in printer_formats or (OCTET_STREAM in printer_formats and document_format in NATIVE_ONLY):
        return ()
    to_pdf = _to_pdf(server_bin)
    target = next((mime for mime in TARGETS if mime in printer_formats), None)
    if target is None or document_format not in (PDF, POSTSCRIPT, *to_pdf):
        speaks = ", ".join(mime for mime in printer_formats if mime != OCTET_STREAM) or "nothing that it tells of"
        raise AgentError(
            Reason.NOT_SUPPORTED,
            f"a document of type {document_format} cannot be printed on a printer that speaks {speaks}",
            hint="print through a driver for this printer, or as PDF on another one",
        )
    first = (to_pdf[document_format],) if document_format in to_pdf else ()
    if first and target == PDF:
        return first
    return (*first, Stage("ghostscript", (*GHOSTSCRIPT, *TARGETS[target], "-f", STDIN)))


def accepted_formats(printer_formats: Sequence[str]) -> tuple[str, ...]:
    """Every format that `plan` takes for this printer: its own first, in its own order."""
    candidates = (*printer_formats, PDF, POSTSCRIPT, *_to_pdf(""), *sorted(NATIVE_ONLY))
    return tuple(mime for mime in dict.fromkeys(candidates) if _possible(mime, printer_formats))


def _possible(document_format: str, printer_formats: Sequence[str]) -> bool:
    try:
        plan(document_format, printer_formats)
    except AgentError:
        return False
    return True


def _to_pdf(server_bin: str) -> dict[str, Stage]:
    """The first stage of every format that Ghostscript does not read. The five arguments are filter(7)'s: job, user,
    title, copies, options."""

    def stage(name: str, *file: str, env: dict[str, str] | None = None, on_a4: bool = True) -> Stage:
        argv = (f"{server_bin}/filter/{name}", "1", "desktop", "document", "1", "", *file)
        return Stage(name, ("/bin/sh", "-c", _ON_A4, name, FONTS, A4_PPD, *argv) if on_a4 else argv, env or {})

    return {
        "text/plain": stage("texttopdf"),
        "image/jpeg": stage("imagetopdf", STDIN),
        "image/png": stage("imagetopdf", STDIN),
        PWG: stage("rastertopdf", env={"CONTENT_TYPE": PWG}, on_a4=False),
        URF: stage("rastertopdf", env={"CONTENT_TYPE": URF}, on_a4=False),
    }
