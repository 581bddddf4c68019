"""The real cupsd behind the real spool: bytes arrive, once, whatever dies in between."""

from __future__ import annotations

import asyncio
import os
import shutil
import socket
import subprocess
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from nodeagent.config import PrintingConfig
from nodeagent.errors import AgentError, Reason
from nodeagent.metrics import Metrics
from nodeagent.seats.zygote import Zygote
from nodeagent.services.printing.cups import Cups, CupsRefused, Queue
from nodeagent.services.printing.cups_files import SEARCH
from nodeagent.services.printing.filters import Filters, SeatContext
from nodeagent.services.printing.programs import Spawn
from nodeagent.wire import ipp
from tests.fakes.programs import PlainSpawn, make_pdf
from tests.fakes.spooling import POSTSCRIPT, Spooling, running

pytestmark = [
    pytest.mark.root,
    pytest.mark.skipif(
        shutil.which("cupsd", path=SEARCH) is None or shutil.which("setpriv") is None,
        reason="needs cupsd and setpriv (apt-get install cups-daemon util-linux)",
    ),
]
needs_filters = pytest.mark.skipif(
    not Path("/usr/lib/cups/filter/texttopdf").exists() or shutil.which("gs") is None,
    reason="needs print filters (apt-get install cups-filters ghostscript)",
)
LIMITS = PrintingConfig()
NOBODYS_UID = 0x7000_0FFF


class House:
    """A cupsd with the queue `q-p1`, whose device is `device`, and seats that print on it as `p1`."""

    def __init__(self, directory: Path, spawn: Spawn) -> None:
        self.directory = directory
        self.device = directory / "lp0"
        self.spawn = spawn
        self.metrics = Metrics()
        self.cups = Cups(LIMITS, directory / "state", directory / "run", spawn, self.metrics)
        self.spools = 0

    def spooling(self) -> Spooling:
        """The spool of this house; a second one is the daemon's next life."""
        convert = Filters(LIMITS, self.spawn, lambda seat: SeatContext(NOBODYS_UID, ()))
        made = Spooling(self.directory / "spool", self.cups, LIMITS, convert)
        made.give("s1", "p1")
        return made

    async def plug(self, uri: str | None = None) -> None:
        await self.cups.set_queues([Queue("q-p1", uri or f"opencdi:{self.device}", "A printer")])

    async def until_restarted(self, times: int) -> None:
        async with asyncio.timeout(10):
            while self.cups.peer.restarts < times:
                await asyncio.sleep(0.005)
            await self.cups.available()


@asynccontextmanager
async def house_of(directory: Path, spawn: Spawn) -> AsyncIterator[House]:
    house = House(directory, spawn)
    task = asyncio.create_task(house.cups.run(), name="cups")
    try:
        await house.plug()
        async with asyncio.timeout(10):
            await house.cups.available()
        yield house
    finally:
        task.cancel()
        await asyncio.wait({task})


@pytest.fixture
async def spawn(short_tmp: Path) -> PlainSpawn:
    return PlainSpawn(short_tmp)


@pytest.fixture
async def house(short_tmp: Path, spawn: PlainSpawn) -> AsyncIterator[House]:
    async with house_of(short_tmp, spawn) as made:
        made.device.touch()
        yield made


class Pipe:
    """A device that takes no more than a pipe holds until somebody reads."""

    def __init__(self, path: Path) -> None:
        path.unlink(missing_ok=True)
        os.mkfifo(path)
        self.fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK)

    async def begun(self) -> bytes:
        """The first bytes of whoever prints."""
        return await self._read(lambda data: len(data) > 0, 4096)

    async def to_the_end(self) -> bytes:
        """Everything until the last writer has gone."""
        return await self._read(lambda _: False, 1 << 20)

    async def _read(self, enough: Callable[[bytes], bool], at_once: int) -> bytes:
        data = b""
        async with asyncio.timeout(20):
            while not enough(data):
                try:
                    chunk = os.read(self.fd, at_once)
                except BlockingIOError:
                    await asyncio.sleep(0.002)
                    continue
                if not chunk and data:
                    break
                data += chunk
                await asyncio.sleep(0 if chunk else 0.002)
        return data

    async def silent(self) -> bool:
        """Whether no writer is left, once what they wrote is read."""
        await self._read(lambda data: len(data) >= 65536, 65536)
        async with asyncio.timeout(5):
            while True:
                try:
                    if os.read(self.fd, 65536) == b"":
                        return True
                except BlockingIOError:
                    await asyncio.sleep(0.002)

    def close(self) -> None:
        os.close(self.fd)


@pytest.fixture
async def pipe(house: House) -> AsyncIterator[Pipe]:
    made = Pipe(house.device)
    yield made
    made.close()


def document(size: int) -> bytes:
    """No byte pattern of it repeats, so that a piece that comes twice shows."""
    return b"%!PS " + b"".join(i.to_bytes(4, "big") for i in range(size // 4))


async def test_device_ready_bytes_arrive_as_they_are(house: House) -> None:
    data = document(5 << 20)
    async with running(house.spooling()) as spooling:
        job = await spooling.send(data)
        assert (await spooling.ended(job)).state == 9
        assert house.device.read_bytes() == data
        assert spooling.seen["s1", job] == [4, 3, 5, 9]
        await spooling.ended(await spooling.send(b"%!PS 2", copies=3))
        assert house.device.read_bytes() == data + b"%!PS 2" * 3
    assert sorted(path.name for path in house.directory.iterdir()) == ["lp0", "run", "spool", "state"]
    assert [p.name for p in (house.directory / "state/cups/spool").iterdir() if p.name.startswith("d")] == []


@needs_filters
async def test_a_pdf_and_a_text_arrive_as_postscript(house: House) -> None:
    async with running(house.spooling()) as spooling:
        await spooling.ended(await spooling.send(make_pdf("hello"), mime="application/pdf"))
        printed = house.device.read_bytes()
        assert printed.startswith(b"%!PS")
        await spooling.ended(await spooling.send("你好\n".encode(), mime="text/plain"))
        assert house.device.read_bytes()[len(printed) :].startswith(b"%!PS")


async def test_root_alone_reaches_it_and_only_through_the_socket(house: House) -> None:
    sock = house.cups.socket
    ours = {os.readlink(fd) for fd in Path(f"/proc/{house.cups.peer.pid}/fd").iterdir()}
    tables = [Path(f"/proc/{house.cups.peer.pid}/net/{table}").read_text() for table in ("tcp", "tcp6", "udp", "udp6")]
    inodes = {line.split()[9] for table in tables for line in table.splitlines()[1:]}
    assert not {f"socket:[{inode}]" for inode in inodes} & ours
    assert sock.parent.stat().st_mode & 0o777 == 0o700

    start = (ipp.charset("attributes-charset", "utf-8"), ipp.language("attributes-natural-language", "en"))
    groups = (ipp.Group(ipp.GroupTag.OPERATION, (*start, ipp.uri("printer-uri", "ipp://localhost/"))),)
    question = ipp.put_request(ipp.Request((2, 0), ipp.Operation.GET_JOBS, 1, groups))

    def without_credentials() -> bytes:
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(sock))
            head = f"POST / HTTP/1.0\r\nHost: localhost\r\nContent-Type: application/ipp\r\nContent-Length: {len(question)}"
            client.sendall(head.encode() + b"\r\n\r\n" + question)
            return client.recv(100)

    assert b"401" in await asyncio.to_thread(without_credentials)
    as_nobody = ["setpriv", "--reuid=65534", "--clear-groups", "sh", "-c", f"test -e {sock} || echo nothing there"]
    seen = await asyncio.to_thread(subprocess.run, as_nobody, capture_output=True, text=True, check=True)
    assert seen.stdout == "nothing there\n"


@pytest.mark.skipif(shutil.which("lp") is None, reason="needs lp (apt-get install cups-client)")
async def test_the_stock_client_of_root_works(house: House) -> None:
    page = house.directory / "page"
    page.write_bytes(b"%!PS by lp")
    argv = ["lp", "-h", str(house.cups.socket), "-d", "q-p1", "-o", "raw", str(page)]
    async with running(house.spooling()):
        await asyncio.to_thread(subprocess.run, argv, check=True, capture_output=True, timeout=10)
        async with asyncio.timeout(10):
            while house.device.read_bytes() != b"%!PS by lp":
                await asyncio.sleep(0.01)


async def test_cancel_stops_what_is_printing(house: House, pipe: Pipe) -> None:
    async with running(house.spooling()) as spooling:
        job = await spooling.send(document(1 << 20))
        await pipe.begun()
        await spooling.spool.cancel("s1", job)
        assert spooling.job(job).state == 7
        assert await pipe.silent()
        after = await spooling.send(b"%!PS after")
        assert await pipe.to_the_end() == b"%!PS after"
        assert (await spooling.ended(after)).state == 9


async def test_a_killed_cupsd_comes_back_and_the_job_is_printed_once(
    house: House, pipe: Pipe, spawn: PlainSpawn
) -> None:
    data = document(1 << 20)
    async with running(house.spooling()) as spooling:
        job = await spooling.send(data)
        await pipe.begun()
        spawn.programs[-1].kill()
        assert await pipe.silent()  # its back end died with it
        await house.until_restarted(1)
        again = await pipe.to_the_end()
        assert again == data
        assert (await spooling.ended(job)).state == 9
        after = await spooling.send(b"%!PS after")
        assert await pipe.to_the_end() == b"%!PS after"
        await spooling.ended(after)
    assert house.metrics.registry.get_sample_value("nodeagent_upstream_restarts_total", {"server": "cupsd"}) == 1


async def test_after_a_crash_of_the_daemon_the_job_is_printed_once(house: House, pipe: Pipe) -> None:
    data = document(1 << 20)
    first_life = house.spooling()
    async with running(first_life):
        job = await first_life.send(data)
        waiting = await first_life.send(b"%!PS waiting")
        begun = await pipe.begun()
    async with running(house.spooling()) as second_life:
        assert begun + await pipe.to_the_end() == data
        assert await pipe.to_the_end() == b"%!PS waiting"
        assert (await second_life.ended(job)).state == 9
        assert (await second_life.ended(waiting)).state == 9
        assert len(await house.cups.jobs()) == 2


async def test_what_was_accepted_while_cupsd_was_away_is_printed_once(house: House, spawn: PlainSpawn) -> None:
    async with running(house.spooling()) as spooling:
        os.kill(spawn.programs[-1].pid, 19)  # SIGSTOP: it takes connections and does not answer
        job = await spooling.send(b"%!PS patient")
        spawn.programs[-1].kill()
        assert (await spooling.ended(job)).state == 9
        assert house.device.read_bytes() == b"%!PS patient"


async def test_a_device_that_is_missing_is_waited_for(house: House) -> None:
    house.device.unlink()
    async with running(house.spooling()) as spooling:
        job = await spooling.send(b"%!PS waits")
        await spooling.until(lambda: "not connected" in spooling.job(job).message)
        assert spooling.job(job).state == 5
        assert not house.device.exists()
        house.device.touch()
        assert (await spooling.ended(job)).state == 9
        assert house.device.read_bytes() == b"%!PS waits"
        assert spooling.job(job).message == ""


async def test_another_device_on_the_same_node_gets_nothing(house: House) -> None:
    await house.plug(f"opencdi:{house.device}?usb=1/12")
    async with running(house.spooling()) as spooling:
        job = await spooling.send(b"%!PS for somebody")
        await spooling.until(lambda: "not connected" in spooling.job(job).message)
        assert house.device.read_bytes() == b""
        other = house.directory / "lp1"
        other.touch()
        await house.plug(f"opencdi:{other}")
        assert (await spooling.ended(job)).state == 9
        assert (house.device.read_bytes(), other.read_bytes()) == (b"", b"%!PS for somebody")


async def test_a_device_that_fails_is_tried_again(house: House) -> None:
    house.device.unlink()
    house.device.symlink_to("/dev/full")
    async with running(house.spooling()) as spooling:
        job = await spooling.send(b"%!PS full")
        await spooling.until(lambda: "did not take the data" in spooling.job(job).message)
        house.device.unlink()
        house.device.touch()
        assert (await spooling.ended(job)).state == 9
        assert house.device.read_bytes() == b"%!PS full"


async def test_a_simulated_printer_drops_an_unfinished_page(house: House) -> None:
    house.device.write_bytes(b"%!PS old%!PS half a pa")
    (house.directory / "lp0.begun").write_text("8\n")
    async with running(house.spooling()) as spooling:
        await spooling.ended(await spooling.send(b"%!PS new"))
    assert house.device.read_bytes() == b"%!PS old%!PS new"
    assert not (house.directory / "lp0.begun").exists()


async def test_queues_follow_what_is_plugged_in(house: House, spawn: PlainSpawn) -> None:
    page = house.directory / "page"
    page.write_bytes(b"%!PS")
    await house.cups.set_queues(
        [Queue("q-a", "opencdi:/nonexistent/a", "A"), Queue("q-b", "opencdi:/nonexistent/b", "B")]
    )
    with pytest.raises(CupsRefused) as caught:
        await house.cups.submit("q-p1", "k", page)
    assert caught.value.reason is Reason.DEVICE_UNKNOWN
    number = await house.cups.submit("q-a", "spool:k", page)
    assert (await house.cups.jobs(number))["spool:k"].id == number
    spawn.programs[-1].kill()
    await house.until_restarted(1)
    assert "spool:k" in await house.cups.jobs()
    await house.cups.set_queues([])
    assert not [j for j in (await house.cups.jobs()).values() if not j.finished]


async def test_a_document_is_marked_when_its_last_byte_is_out_and_never_sent_twice(house: House) -> None:
    """As when everybody is killed between the last byte and cupsd's note of it: cupsd starts the job again."""
    await house.cups.set_queues([Queue("q", f"opencdi:{house.device}", "A")])
    page = house.directory / "7-1.doc"
    page.write_bytes(b"%!PS")
    for key, times in (("spool:first", 1), ("spool:again", 1)):
        number = await house.cups.submit("q", key, page)
        async with asyncio.timeout(10):
            while not (found := (await house.cups.jobs(number))[key]).finished:
                await asyncio.sleep(0.02)
        assert found.state == 9
        assert house.device.read_bytes() == b"%!PS" * times
        assert (house.directory / "7-1.printed").exists()
    assert not house.device.with_name("lp0.begun").exists()


async def test_a_job_whose_document_is_gone_from_the_spool_is_cancelled_and_prints_nothing(house: House) -> None:
    await house.cups.set_queues([Queue("q", f"opencdi:{house.device}", "A")])
    number = await house.cups.submit("q", "spool:gone", house.directory / "no-such-document")
    async with asyncio.timeout(10):
        while not (found := (await house.cups.jobs(number))["spool:gone"]).finished:
            await asyncio.sleep(0.02)
    assert found.state == 7
    assert house.device.read_bytes() == b""


async def test_a_cupsd_that_hangs_is_started_again(
    house: House, spawn: PlainSpawn, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nodeagent.services.printing.cups.PING_S", 0.05)
    monkeypatch.setattr("nodeagent.services.printing.cups.STOP_S", 0.2)
    await house.plug("opencdi:/nonexistent")
    spawn.programs[-1].kill()
    await house.until_restarted(1)  # the new one is looked after with the times above
    monkeypatch.setattr("nodeagent.services.printing.cups_client.TIMEOUT_S", 0.1)
    os.kill(spawn.programs[-1].pid, 19)
    with pytest.raises(AgentError, match="no answer in time") as caught:
        await house.cups.jobs()
    assert caught.value.reason is Reason.UPSTREAM_UNAVAILABLE
    await house.until_restarted(2)


async def test_it_starts_fast(short_tmp: Path, spawn: PlainSpawn) -> None:
    began = time.monotonic()
    async with house_of(short_tmp, spawn):
        assert time.monotonic() - began < 2  # measured: 0.03 s; a machine under load gets more


async def test_a_state_directory_without_exec_is_told(short_tmp: Path, spawn: PlainSpawn) -> None:
    (short_tmp / "state").mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "noexec", "none", str(short_tmp / "state")], check=True)
    try:
        house = House(short_tmp, spawn)
        task = asyncio.create_task(house.cups.run())
        async with asyncio.timeout(10):
            while "noexec" not in house.cups.peer.message:
                await asyncio.sleep(0.005)
        assert house.cups.peer.state == "unreachable"
        task.cancel()
        await asyncio.wait({task})
    finally:
        subprocess.run(["umount", str(short_tmp / "state")], check=True)


@needs_filters
async def test_as_children_of_the_zygote(short_tmp: Path) -> None:
    async with Zygote() as zygote, house_of(short_tmp, zygote.spawn_program) as house:
        house.device.touch()
        async with running(house.spooling()) as spooling:
            assert (await spooling.ended(await spooling.send(b"%!PS raw"))).state == 9
            job = await spooling.send(make_pdf("hello"), mime="application/pdf")
            assert (await spooling.ended(job)).state == 9, spooling.job(job).message
            assert house.device.read_bytes().startswith(b"%!PS raw%!PS-Adobe")
            job = await spooling.send("Grüße, 你好\n".encode(), mime="text/plain")
            assert (await spooling.ended(job)).state == 9, spooling.job(job).message
            hostile = b"%!PS\n(/etc/passwd) (r) file 100 string readstring pop print\n"
            spooling.give("s1", "p1", formats=("application/pdf",))
            job = await spooling.send(hostile, mime=POSTSCRIPT)
            assert (await spooling.ended(job)).state == 8
            pipe = Pipe(house.device)
            try:
                spooling.give("s1", "p1")
                await spooling.send(document(1 << 20))
                await pipe.begun()
                os.kill(zygote.pid, 9)
                assert await pipe.silent()  # cupsd and its back end are gone with it
            finally:
                pipe.close()
