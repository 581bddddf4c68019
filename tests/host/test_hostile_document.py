"""Documents that attack the filters, in a whole daemon: they hurt their own seat at most, and only for a moment."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from nodeagent.demo.pods import PodSpec
from tests.daemon.house import PRINTER, House, eventually, lp, pod

pytestmark = pytest.mark.root

PAGE = b"%!PS\n/Helvetica findfont 20 scalefont setfont 72 700 moveto (page) show showpage\n"
LOOP = b"%!PS\n{} loop\n"
MEMORY = b"%!PS\n/keep 100000 array def 0 1 99999 {keep exch 65535 string put} for showpage\n"
FILES = b"%!PS\n(/etc/passwd) (r) file (/tmp/x) (w) file showpage\n"


@pytest.fixture
async def house(short_tmp: Path) -> AsyncIterator[House]:
    made = House(short_tmp)
    made.save(
        simulated=[{"model": "printer", "serial": f"P{n}", "formats": ["application/pdf"]} for n in (1, 2)]
    )  # so that PostScript has to be converted
    made.raw["printing"] = {"filter_timeout": 3}
    made.raw["seats"] = {"memory_limit_mib": 160}
    made.save()
    async with made.kubelet, made.cri:
        yield made


def filters(uid: int) -> list[Path]:
    """Processes other than the worker that run as the seat's uid."""
    found = []
    for directory in Path("/proc").iterdir():
        with contextlib.suppress(OSError, StopIteration):
            lines = (directory / "status").read_text().splitlines()
            if f"Uid:\t{uid}\t" in "\n".join(lines) and lines[0].split()[1] in ("gs", "sh"):
                found.append(directory)
    return found


async def two_desktops(house: House) -> tuple[PodSpec, PodSpec]:
    await house.kubelet.until(lambda: len(house.kubelet.allocatable(PRINTER)) == 2)
    desks = pod("one"), pod("two")
    for desk in desks:
        await house.run(desk)
    return desks


async def aborted(house: House, active: object, desk: PodSpec) -> str:
    def ended() -> list[str]:
        return [j.message for j in active.spool.jobs(desk.uid) if j.state == 8]  # type: ignore[attr-defined]

    await eventually(ended, 30)
    return ended()[0]


async def test_a_document_that_never_ends_is_stopped_and_ran_without_rights(house: House) -> None:
    async with house.life() as active:
        one, two = await two_desktops(house)
        assert (await lp(house.slot(one), LOOP))[0] == 0
        uid = house.seat(active, one).uid
        await eventually(lambda: filters(uid))
        (process,) = [p for p in filters(uid) if "Name:\tgs" in (p / "status").read_text()]
        status = (process / "status").read_text()
        assert "CapEff:\t0000000000000000" in status and "NoNewPrivs:\t1" in status and "Seccomp:\t2" in status
        assert (process / "ns/net").readlink() != Path("/proc/self/ns/net").readlink()
        assert f"/{one.uid}" in (process / "cgroup").read_text()
        assert (await lp(house.slot(two), PAGE))[0] == 0
        await eventually(lambda: any(house.output(s).exists() and house.output(s).stat().st_size for s in ("P1", "P2")))
        assert await aborted(house, active, one)
        await eventually(lambda: not filters(uid))
        assert (await lp(house.slot(one), PAGE))[0] == 0
        await eventually(lambda: all(house.output(s).stat().st_size for s in ("P1", "P2")))


async def test_a_document_that_eats_memory_dies_alone(house: House) -> None:
    async with house.life() as active:
        one, two = await two_desktops(house)
        workers = [house.seat(active, d).worker_pid for d in (one, two)]
        assert (await lp(house.slot(one), MEMORY))[0] == 0
        await aborted(house, active, one)
        assert house.seat(active, two).worker_pid == workers[1]
        for desk in (one, two):
            async with asyncio.timeout(20):
                while (await lp(house.slot(desk), PAGE))[0] != 0:
                    await asyncio.sleep(0.2)
        await eventually(lambda: all(house.output(s).exists() and house.output(s).stat().st_size for s in ("P1", "P2")))


async def test_a_document_reads_no_files(house: House) -> None:
    async with house.life() as active:
        one, _ = await two_desktops(house)
        assert (await lp(house.slot(one), FILES))[0] == 0
        assert await aborted(house, active, one)
        assert not any(house.output(s).exists() and house.output(s).stat().st_size for s in ("P1", "P2"))
