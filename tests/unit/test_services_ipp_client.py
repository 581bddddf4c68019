"""The stock CUPS programs, unchanged, against `IppService` on a Unix socket: what a desktop really does."""

from __future__ import annotations

import asyncio
import hashlib
import os
import shutil
from collections.abc import Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from nodeagent.errors import Reason
from nodeagent.wire import seat as wire
from tests.fakes.ipp_seat import seat

pytestmark = pytest.mark.skipif(
    shutil.which("lp") is None, reason="needs lp, lpstat and cancel: the package cups-client"
)
needs_ipptool = pytest.mark.skipif(shutil.which("ipptool") is None, reason="needs ipptool: the package cups-ipp-utils")
IPPTOOL_TESTS = Path("/usr/share/cups/ipptool")

Run = Callable[..., Awaitable[tuple[int, str]]]


@asynccontextmanager
async def desktop(directory: Path, *, max_bytes: int = 2**26):  # type: ignore[no-untyped-def]
    """A seat on a socket, and a way to run a program there: (exit status, what it wrote)."""
    (directory / "spool").mkdir()
    async with seat(directory / "spool", max_bytes=max_bytes) as desk:
        await desk.listen(directory / "ipp.sock")
        env = {
            "PATH": os.environ["PATH"], "HOME": str(directory), "LC_ALL": "C.UTF-8", "TZ": "UTC",
            "CUPS_SERVER": str(directory / "ipp.sock"),
        }  # fmt: skip

        async def run(*argv: str, stdin: bytes = b"") -> tuple[int, str]:
            child = await asyncio.create_subprocess_exec(
                *argv, env=env, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.STDOUT,
            )  # fmt: skip
            try:
                async with asyncio.timeout(20):
                    out, _ = await child.communicate(stdin)
            except TimeoutError:
                child.kill()
                await child.communicate()
                raise
            return child.returncode or 0, out.decode()

        yield desk, run


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def document(directory: Path, name: str, data: bytes) -> str:
    (directory / name).write_bytes(data)
    return str(directory / name)


async def test_lp(short_tmp: Path) -> None:
    pdf = b"%PDF-1.7\n" + os.urandom(3_000_000)
    async with desktop(short_tmp) as (desk, run):
        file = document(short_tmp, "letter.pdf", pdf)
        told = await run("lp", "-U", "alice", "-d", "P1", "-t", "Brief ü", "-n", "2", file)
        assert told == (0, "request id is P1-1 (1 file(s))\n")
        assert sha256(desk.daemon.document(1).read_bytes()) == sha256(pdf)
        create, _, close = desk.daemon.told
        assert create == wire.CreateJob(request=1, printer="P1", title="Brief ü", user="alice", copies=2)
        assert close == wire.CloseDocument(request=3, job=1, format="application/pdf", size=len(pdf), last=True)
        assert desk.denied == {}


async def test_lp_to_the_default_printer_from_a_pipe(short_tmp: Path) -> None:
    async with desktop(short_tmp) as (desk, run):
        assert (await run("lp", stdin=b"plain text\n"))[0] == 0
        assert desk.daemon.document(1).read_bytes() == b"plain text\n"
        assert desk.daemon.told[0].printer == "P1"


async def test_lp_with_two_files_and_options(short_tmp: Path) -> None:
    files = [document(short_tmp, name, data) for name, data in (("a.txt", b"one\n"), ("b.ps", b"%!PS\nshowpage\n"))]
    async with desktop(short_tmp) as (desk, run):
        options = ["-o", "media=iso_a4_210x297mm", "-o", "sides=two-sided-long-edge", "-o", "page-ranges=1-2"]
        assert await run("lp", "-d", "P1", *options, *files) == (0, "request id is P1-1 (2 file(s))\n")
        assert [desk.daemon.document(1, n).read_bytes() for n in (0, 1)] == [b"one\n", b"%!PS\nshowpage\n"]
        formats = [m.format for m in desk.daemon.told if isinstance(m, wire.CloseDocument)]
        assert formats == ["text/plain", "application/postscript"]


async def test_lp_hears_why_not(short_tmp: Path) -> None:
    async with desktop(short_tmp, max_bytes=1_000_000) as (desk, run):
        unknown = document(short_tmp, "unknown", b"\0\1\2" + os.urandom(500_000))
        status, told = await run("lp", "-d", "P1", unknown)
        assert status == 1 and "printer P1 takes only application/pdf" in told
        status, told = await run("lp", "-d", "P1", document(short_tmp, "large", b"%PDF-" + bytes(2_000_000)))
        assert (status, told) == (1, "lp: a document may have 1000000 bytes\n")
        status, told = await run("lp", "-d", "P1", document(short_tmp, "huge", b"%PDF-" + bytes(20_000_000)))
        assert (status, told) == (1, "lp: Request Entity Too Large\n")
        status, told = await run("lp", "-d", "theirs", unknown)
        assert (status, told) == (1, "lp: Error - The printer or class does not exist.\n")
        assert [m.reason for m in desk.daemon.told if isinstance(m, wire.DropDocument)] == [Reason.TOO_LARGE] * 2
        assert not desk.daemon.heard(wire.CloseDocument)
        assert desk.denied[Reason.NOT_YOURS] >= 1


async def test_lpstat(short_tmp: Path) -> None:
    async with desktop(short_tmp) as (_, run):
        await run("lp", "-d", "P2", stdin=b"%PDF-1.4")
        status, told = await run("lpstat", "-t")
        assert status == 0
        assert told.splitlines()[:2] == ["scheduler is running", "system default destination: P1"]
        assert "device for P1: simulated:/P1" in told and "printer P1 is idle." in told
        assert "The printer is unplugged; jobs wait until it is back." in told
        assert await run("lpstat", "-e") == (0, "P1\nP2\n")
        assert await run("lpstat", "-d") == (0, "system default destination: P1\n")
        status, told = await run("lpstat", "-o")
        assert status == 0 and told.split()[:3] == ["P2-1", "team/alice", "1024"]
        assert await run("lpstat", "-o", "P1") == (0, "")
        assert await run("lpstat", "-W", "completed") == (0, "")
        status, told = await run("lpstat", "-p", "theirs")
        assert (status, told) == (1, 'lpstat: Invalid destination name in list "theirs".\n')


async def test_lpoptions(short_tmp: Path) -> None:
    async with desktop(short_tmp) as (_, run):
        status, told = await run("lpoptions", "-p", "P1")
        assert status == 0 and "media=iso_a4_210x297mm" in told and "printer-info='Office (simulated)'" in told


async def test_cancel(short_tmp: Path) -> None:
    async with desktop(short_tmp) as (desk, run):
        for _ in range(4):
            await run("lp", "-U", "alice", "-d", "P1", stdin=b"%PDF-1.4")
        assert await run("cancel", "P1-1") == (0, "")
        assert await run("cancel", "2") == (0, "")
        status, told = await run("cancel", "1")
        assert (status, told) == (1, "cancel: cancel-job failed: job 1 is already over\n")
        status, told = await run("cancel", "77")
        assert (status, told) == (1, "cancel: cancel-job failed: no such job in this desktop\n")
        assert await run("cancel", "-a") == (0, "")
        assert {job.state for job in desk.daemon.jobs.values()} == {7}


@pytest.mark.parametrize(
    "argv",
    [
        ("/usr/sbin/lpadmin", "-p", "new", "-E", "-v", "file:///tmp/x"),
        ("/usr/sbin/lpadmin", "-x", "P1"),
        ("/usr/sbin/cupsdisable", "P1"),
        ("/usr/sbin/cupsenable", "P1"),
        ("/usr/sbin/cupsreject", "P1"),
        ("lp", "-i", "1", "-H", "hold"),
        ("lpmove", "1", "P2"),
    ],
)
async def test_no_administration(short_tmp: Path, argv: tuple[str, ...]) -> None:
    if shutil.which(argv[0]) is None:
        pytest.skip(f"needs {argv[0]}: the package cups-client")
    async with desktop(short_tmp) as (desk, run):
        await run("lp", "-d", "P1", stdin=b"%PDF-1.4")
        before = list(desk.daemon.told)
        status, told = await run(*argv)
        assert status != 0 and ("does not exist here" in told or "not-supported" in told)
        assert desk.daemon.told == before and desk.denied[Reason.NOT_SUPPORTED] >= 1


@needs_ipptool
@pytest.mark.parametrize("test", ["get-printer-attributes.test", "ipp-1.1.test", "ipp-2.0.test"])
async def test_ipptool(short_tmp: Path, test: str) -> None:
    """ipptool reaches a Unix socket when its path is the host of the URI, with %2F for the slashes."""
    async with desktop(short_tmp) as (desk, run):
        desk.daemon.prints = True
        uri = f"ipp://{str(short_tmp / 'ipp.sock').replace('/', '%2F')}/printers/P1"
        file = document(short_tmp, "page.ps", b"%!PS\nshowpage\n")
        status, told = await run("ipptool", "-tI", "-f", file, uri, str(IPPTOOL_TESTS / test))
        failed = [line for line in told.splitlines() if "[FAIL]" in line]
        assert (status, failed) == (0, []), told
        assert "[PASS]" in told
