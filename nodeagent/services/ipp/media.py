"""The paper a seat's printer is said to take (PWG 5101.1 names, sizes in hundredths of a millimetre).

A node does not know what lies in the tray: a document keeps its own page size and the printer asks for the paper.
What is listed here is what applications lay their pages out for.
"""

from __future__ import annotations

from nodeagent.wire import ipp

MARGIN = 423
"""A sixth of an inch: what nearly every printer leaves white at each edge."""

SIZES: dict[str, tuple[int, int]] = {
    "iso_a4_210x297mm": (21000, 29700),
    "iso_a3_297x420mm": (29700, 42000),
    "iso_a5_148x210mm": (14800, 21000),
    "iso_a6_105x148mm": (10500, 14800),
    "iso_b5_176x250mm": (17600, 25000),
    "iso_c5_162x229mm": (16200, 22900),
    "iso_dl_110x220mm": (11000, 22000),
    "jis_b4_257x364mm": (25700, 36400),
    "jis_b5_182x257mm": (18200, 25700),
    "na_letter_8.5x11in": (21590, 27940),
    "na_legal_8.5x14in": (21590, 35560),
    "na_executive_7.25x10.5in": (18415, 26670),
    "na_ledger_11x17in": (27940, 43180),
    "na_number-10_4.125x9.5in": (10478, 24130),
    "om_16k_184x260mm": (18400, 26000),
    "om_16k_195x270mm": (19500, 27000),
    "prc_16k_146x215mm": (14600, 21500),
    "prc_32k_97x151mm": (9700, 15100),
}
DEFAULT = "iso_a4_210x297mm"


def _size(name: str) -> ipp.Collection:
    across, along = SIZES[name]
    return ipp.Collection((ipp.integer("x-dimension", across), ipp.integer("y-dimension", along)))


def _media_col(name: str) -> ipp.Collection:
    margins = (ipp.integer(f"media-{side}-margin", MARGIN) for side in ("bottom", "left", "right", "top"))
    rest = (ipp.keyword("media-source", "auto"), ipp.keyword("media-type", "stationery"))
    return ipp.Collection((ipp.collection("media-size", _size(name)), *margins, *rest))


COL_MEMBERS = (
    *("media-bottom-margin", "media-left-margin", "media-right-margin", "media-top-margin"),
    *("media-size", "media-source", "media-type"),
)

DATABASE = ipp.collection("media-col-database", *map(_media_col, SIZES))
"""Told only to those who ask for it by name (PWG 5100.7): it is longer than all the rest."""

TEMPLATE: tuple[ipp.Attribute, ...] = (
    ipp.keyword("media-default", DEFAULT),
    ipp.keyword("media-supported", *SIZES),
    ipp.keyword("media-ready", DEFAULT),
    ipp.collection("media-col-default", _media_col(DEFAULT)),
    ipp.collection("media-col-ready", _media_col(DEFAULT)),
    ipp.keyword("media-col-supported", *COL_MEMBERS),
    ipp.collection("media-size-supported", *map(_size, SIZES)),
    *(ipp.integer(f"media-{side}-margin-supported", MARGIN) for side in ("bottom", "left", "right", "top")),
    ipp.keyword("media-source-supported", "auto"),
    ipp.keyword("media-type-supported", "stationery"),
)
