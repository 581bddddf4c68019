"""Which programs make a document printable, and that the real ones do."""

from __future__ import annotations

import asyncio
import shutil
import struct
import zlib
from pathlib import Path

import pytest

from nodeagent.config import PrintingConfig
from nodeagent.errors import AgentError, Reason
from nodeagent.services.printing import convert
from nodeagent.services.printing.convert import Stage, accepted_formats, plan
from nodeagent.services.printing.filters import PRIVATE_TMP_BYTES, Filters, SeatContext
from tests.fakes.programs import PlainSpawn, make_pdf

PS, PDF, PCL, XL = "application/postscript", "application/pdf", "application/vnd.hp-pcl", "application/vnd.hp-pclxl"
PWG, URF, TEXT, PNG, JPEG = "image/pwg-raster", "image/urf", "text/plain", "image/png", "image/jpeg"
OCTETS = "application/octet-stream"
EVERYTHING = (PDF, PS, TEXT, JPEG, PNG, PWG, URF)
SERVER_BIN = Path("/usr/lib/cups")
MAGIC = {PS: b"%!PS", PDF: b"%PDF", PCL: b"\x1bE", XL: b"\x1b%-12345X@PJL", PWG: b"RaS2PwgRaster\0", URF: b"UNIRAST\0"}

needs_gs = pytest.mark.skipif(shutil.which("gs") is None, reason="needs Ghostscript (apt-get install ghostscript)")
needs_filters = pytest.mark.skipif(
    not (SERVER_BIN / "filter/texttopdf").exists(), reason="needs cups-filters (apt-get install cups-filters)"
)


@pytest.mark.parametrize(
    ("document", "printer", "stages"),
    [
        (PS, (PS,), ()),
        (PDF, (PS, PDF), ()),
        (JPEG, (JPEG,), ()),
        (PDF, (PS,), ("ghostscript",)),
        (PS, (PDF,), ("ghostscript",)),
        (TEXT, (PDF,), ("texttopdf",)),
        (TEXT, (PCL,), ("texttopdf", "ghostscript")),
        (PNG, (PWG,), ("imagetopdf", "ghostscript")),
        (PWG, (PS,), ("rastertopdf", "ghostscript")),
        (URF, (URF, PS), ()),
        (OCTETS, (OCTETS,), ()),
        (PCL, (OCTETS,), ()),
        (XL, (OCTETS,), ()),
    ],
)
def test_plan(document: str, printer: tuple[str, ...], stages: tuple[str, ...]) -> None:
    assert tuple(stage.name for stage in plan(document, printer)) == stages


def test_the_best_language_is_chosen() -> None:
    assert "-sDEVICE=ps2write" in plan(PDF, (PCL, PS))[0].argv
    assert "-sDEVICE=pxlmono" in plan(PDF, (PCL, XL))[0].argv


@pytest.mark.parametrize(
    ("document", "printer"),
    [
        (OCTETS, (PS,)),
        ("application/msword", (PS, PDF)),
        (PDF, (OCTETS,)),
        (TEXT, (OCTETS,)),
        (PDF, (JPEG,)),
        (PCL, (PS,)),
    ],
)
def test_no_way(document: str, printer: tuple[str, ...]) -> None:
    with pytest.raises(AgentError) as caught:
        plan(document, printer)
    assert caught.value.reason is Reason.NOT_SUPPORTED
    assert document in caught.value.message


def test_accepted_formats_are_those_with_a_plan() -> None:
    assert accepted_formats((PS,)) == (PS, PDF, TEXT, JPEG, PNG, PWG, URF)
    assert accepted_formats((PCL, PS))[:2] == (PCL, PS)
    assert set(accepted_formats((PWG,))) == set(EVERYTHING)
    assert accepted_formats((JPEG,)) == (JPEG,)
    assert accepted_formats((OCTETS,)) == (OCTETS, PCL, XL)


def test_the_filters_are_those_of_this_system() -> None:
    assert "/opt/cups/filter/texttopdf" in plan(TEXT, (PDF,), "/opt/cups")[0].argv


def png(width: int, height: int) -> bytes:
    """A red rectangle."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = (b"\0" + b"\xff\0\0" * width) * height
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def filters(tmp: Path, limits: PrintingConfig | None = None) -> tuple[Filters, PlainSpawn]:
    spawn = PlainSpawn(tmp)
    procs = (Path("/sys/fs/cgroup/seat/cgroup.procs"),)
    return Filters(limits or PrintingConfig(), spawn, lambda seat: SeatContext(70000, procs)), spawn


async def converted(tmp: Path, document: bytes, mime: str, target: str) -> bytes:
    source, output = tmp / "1-1.doc", tmp / "1-1.out"
    source.write_bytes(document)
    convert_, _ = filters(tmp)
    await convert_("seat", plan(mime, (target,)), source, output)
    made = await asyncio.to_thread(output.read_bytes)
    output.unlink()
    assert not list(tmp.glob("*.stage"))
    return made


@needs_gs
@pytest.mark.parametrize("target", list(MAGIC))
async def test_pdf_becomes_what_the_printer_speaks(tmp_path: Path, target: str) -> None:
    if target == PDF:
        made = await converted(tmp_path, b"%!PS\n72 72 moveto 200 200 lineto stroke showpage\n", PS, target)
    else:
        made = await converted(tmp_path, make_pdf("hello", pages=2), PDF, target)
    assert made.startswith(MAGIC[target])
    if target in (PWG, URF):
        depth_at = {PWG: 4 + 388, URF: 12}[target]  # cupsBitsPerPixel (PWG 5102.4 table 1); URF's page header
        assert int.from_bytes(made[depth_at : depth_at + 4], "big") >> (24 if target == URF else 0) == 8


@needs_gs
@needs_filters
@pytest.mark.parametrize(
    ("mime", "document"), [(TEXT, "Grüße, 你好，世界\n".encode()), (PNG, png(60, 40)), (TEXT, b"x" * 10_000)]
)
async def test_text_and_pictures_print_on_a4(tmp_path: Path, mime: str, document: bytes) -> None:
    pdf = await converted(tmp_path, document, mime, PDF)
    assert pdf.startswith(b"%PDF")
    size = pdf[pdf.index(b"/MediaBox") :].split(b"]")[0].replace(b"[", b" ").split()[1:]
    assert [float(x) for x in size] == [0, 0, 595, 842]
    assert (await converted(tmp_path, document, mime, PS)).startswith(b"%!PS")


@needs_gs
@needs_filters
async def test_raster_of_a_driverless_client_prints(tmp_path: Path) -> None:
    for raster in (PWG, URF):
        page = await converted(tmp_path, make_pdf("hello"), PDF, raster)
        assert (await converted(tmp_path, page, raster, PS)).startswith(b"%!PS")


@needs_gs
@pytest.mark.parametrize(
    ("mime", "document", "words"),
    [
        (PDF, b"%PDF-1.4\n", "found nothing to print"),
        (PDF, make_pdf("hello")[:40] + b"\0" * 100, "found nothing to print"),
        (PS, b"%!PS\n/etc/passwd cvx exec nonsense\n", "failed with status 1"),
        (PS, b"%!PS\n(/etc/passwd) (r) file 256 string readstring pop print\n", "failed with status 1"),
        (PS, b"%!PS\n(%pipe%id) (r) file\n", "failed with status 1"),
    ],
)
async def test_what_cannot_be_read_is_refused(tmp_path: Path, mime: str, document: bytes, words: str) -> None:
    with pytest.raises(AgentError, match=words) as caught:
        await converted(tmp_path, document, mime, PS if mime == PDF else PDF)
    assert caught.value.reason is Reason.MALFORMED
    assert [path.name for path in tmp_path.iterdir()] == ["1-1.doc"]


def shell(script: str) -> tuple[Stage, ...]:
    return (Stage("shell", ("/bin/sh", "-c", script)),)


async def test_programs_run_as_the_seat_without_network(tmp_path: Path) -> None:
    (tmp_path / "doc").write_bytes(b"page")
    convert_, spawn = filters(tmp_path, PrintingConfig(spool_per_seat_mib=3))
    await convert_("seat", shell("tr a-z A-Z < /proc/self/fd/0"), tmp_path / "doc", tmp_path / "out")
    assert (tmp_path / "out").read_bytes() == b"PAGE"
    call = spawn.calls[0]
    assert call["uid"] == 70000
    assert call["cgroup_procs"] == (Path("/sys/fs/cgroup/seat/cgroup.procs"),)
    assert call["network"] is False
    assert call["private_tmp_bytes"] == PRIVATE_TMP_BYTES
    assert call["limits"].file_bytes == 3 << 20  # type: ignore[attr-defined]
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o444


async def test_a_filter_that_hangs_is_killed(tmp_path: Path) -> None:
    (tmp_path / "doc").write_bytes(b"page")
    convert_, spawn = filters(tmp_path, PrintingConfig(filter_timeout=0.2))
    with pytest.raises(AgentError) as caught:
        await convert_("seat", shell("exec sleep 60"), tmp_path / "doc", tmp_path / "out")
    assert caught.value.reason is Reason.DEADLINE
    assert (await spawn.programs[0].wait()).code == -9
    assert not (tmp_path / "out").exists()


async def test_a_cancelled_conversion_kills_its_filter(tmp_path: Path) -> None:
    (tmp_path / "doc").write_bytes(b"page")
    convert_, spawn = filters(tmp_path)
    task = asyncio.create_task(convert_("seat", shell("exec sleep 60"), tmp_path / "doc", tmp_path / "out"))
    while not spawn.programs:
        await asyncio.sleep(0.005)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert (await spawn.programs[0].wait()).code == -9
    assert not (tmp_path / "out").exists()


async def test_a_chatty_filter_is_not_remembered_for_ever(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "doc").write_bytes(b"page")
    convert_, _ = filters(tmp_path)
    with caplog.at_level("INFO"), pytest.raises(AgentError, match="failed with status 3"):
        await convert_(
            "seat", shell("yes '\033[31m' | head -c 1000000 >&2; exit 3"), tmp_path / "doc", tmp_path / "out"
        )
    assert len(caplog.records[-1].getMessage()) < 1000
    assert "\033" not in caplog.text


async def test_a_missing_program_is_told(tmp_path: Path) -> None:
    (tmp_path / "doc").write_bytes(b"page")
    convert_, _ = filters(tmp_path)
    with pytest.raises(AgentError, match="cannot run gs: No such file"):
        await convert_("seat", (Stage("gs", ("/nowhere/gs",)),), tmp_path / "doc", tmp_path / "out")


def test_every_target_has_a_magic_here() -> None:
    assert set(convert.TARGETS) == set(MAGIC)
