"""What a document is, by its first bytes. Pure; the document itself is printed by others."""

from __future__ import annotations

OCTET_STREAM = "application/octet-stream"
"""RFC 8011 5.1.10: the printer finds out. The stock client sends nearly everything under this name."""

SNIFF_BYTES = 1024
"""How much of a document `sniff` wants to see. The PDF specification allows its header anywhere in this much."""

_UNTYPED = frozenset({OCTET_STREAM, "application/vnd.cups-raw"})
_CUPS_RASTER = "application/vnd.cups-raster"
_MAGIC = (
    (b"%PDF-", "application/pdf"),
    (b"%!", "application/postscript"),
    (b"\x04%!", "application/postscript"),
    (b"UNIRAST\0", "image/urf"),
    (b"\x89PNG\r\n\x1a\n", "image/png"),
    (b"\xff\xd8\xff", "image/jpeg"),
    (b"RaS3", _CUPS_RASTER),
    (b"3SaR", _CUPS_RASTER),
    (b"2SaR", _CUPS_RASTER),
    (b"\x1bE", "application/vnd.hp-pcl"),
    (b"\x1b*", "application/vnd.hp-pcl"),
    (b"\x1b&", "application/vnd.hp-pcl"),
    (b") HP-PCL XL", "application/vnd.hp-pclxl"),
)
_PJL = b"\x1b%-12345X"
"""Universal exit language: says nothing yet; `@PJL ENTER LANGUAGE = X` or the first bytes after the job lines do."""
_PJL_LANGUAGES = (
    (b"POSTSCRIPT", "application/postscript"),
    (b"PDF", "application/pdf"),
    (b"PCLXL", "application/vnd.hp-pclxl"),
    (b"PCL", "application/vnd.hp-pcl"),
)
_TEXT_CONTROLS = frozenset(b"\t\n\r\f\b")


def sniff(untrusted_start: bytes) -> str | None:
    """The MIME type of a document that starts so (`SNIFF_BYTES` of it, or all); None: nothing we know."""
    if untrusted_start.startswith(_PJL):
        return _sniff_pjl(untrusted_start)
    for magic, mime in _MAGIC:
        if untrusted_start.startswith(magic):
            return mime
    if untrusted_start.startswith(b"RaS2"):
        # One magic for two formats: PWG raster (PWG 5102.4 table 1) starts its page header with "PwgRaster".
        return "image/pwg-raster" if untrusted_start[4:14] == b"PwgRaster\0" else _CUPS_RASTER
    if b"%PDF-" in untrusted_start:
        return "application/pdf"
    return "text/plain" if _is_text(untrusted_start) else None


def _sniff_pjl(untrusted_start: bytes) -> str:
    for line in untrusted_start.replace(_PJL, b"\n").splitlines():
        words = line.upper().replace(b"=", b" ").split()
        if words[:3] == [b"@PJL", b"ENTER", b"LANGUAGE"] and len(words) > 3:
            return next((mime for name, mime in _PJL_LANGUAGES if words[3] == name), "application/vnd.hp-pcl")
    if b"%!PS" in untrusted_start:
        return "application/postscript"
    return "application/pdf" if b"%PDF-" in untrusted_start else "application/vnd.hp-pcl"


def _is_text(untrusted_start: bytes) -> bool:
    """UTF-8 (so ASCII too) without other control characters; a character cut in half at the end is no objection."""
    if not untrusted_start or any(byte < 32 and byte not in _TEXT_CONTROLS for byte in untrusted_start):
        return False
    try:
        untrusted_start.decode()
    except UnicodeDecodeError as error:
        return error.reason == "unexpected end of data" and error.start > len(untrusted_start) - 4
    return True


def is_untyped(declared: str | None) -> bool:
    """The client leaves it to us to find out."""
    return declared is None or declared in _UNTYPED


def decide(declared: str | None, untrusted_start: bytes) -> str:
    """The format to print a document as.

    text/plain is taken at its word: the source of a PostScript file may be what is wanted on paper. Otherwise a magic
    number beats what the client says, and what the client says beats "looks like text".
    """
    if declared == "text/plain":
        return declared
    found = sniff(untrusted_start)
    if declared is None or declared in _UNTYPED:
        return found or OCTET_STREAM
    return declared if found in (None, "text/plain", "application/vnd.hp-pcl") else found
