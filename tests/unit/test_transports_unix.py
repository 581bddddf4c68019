"""Listening sockets at safe places; messages with descriptors."""

from __future__ import annotations

import asyncio
import os
import socket
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from nodeagent.transports import unix
from nodeagent.transports.unix import Channel, listen

Pair = tuple[socket.socket, socket.socket]


@pytest.fixture
def pair() -> Iterator[Pair]:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        yield ours, theirs


def test_listen_has_the_mode_it_was_asked_for_whatever_the_umask(tmp_path: Path) -> None:
    old = os.umask(0o077)
    try:
        with listen(tmp_path, "ipp.sock") as sock:
            found = (tmp_path / "ipp.sock").stat().st_mode
            assert stat.S_ISSOCK(found) and stat.S_IMODE(found) == 0o666
            assert not sock.getblocking() and not sock.get_inheritable()
    finally:
        os.umask(old)


def test_listen_works_below_a_path_of_any_length_and_replaces_what_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = tmp_path.joinpath(*["d" * 60] * 5)
    directory.mkdir(parents=True)
    (directory / "a.sock").write_text("an old file")
    listen(directory, "a.sock").close()
    with listen(directory, "a.sock") as server, socket.socket(socket.AF_UNIX) as client:
        monkeypatch.chdir(directory)
        client.connect("a.sock")
        server.accept()[0].close()


def test_listen_follows_no_symbolic_link(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    with pytest.raises(NotADirectoryError):
        listen(tmp_path / "link", "a.sock")
    victim = tmp_path / "victim"
    victim.write_text("stays")
    (tmp_path / "real/a.sock").symlink_to(victim)
    listen(tmp_path / "real", "a.sock").close()
    assert victim.read_text() == "stays"
    assert stat.S_ISSOCK((tmp_path / "real/a.sock").lstat().st_mode)


def test_a_message_carries_its_descriptors(pair: Pair, tmp_path: Path) -> None:
    with (tmp_path / "file").open("wb") as file:
        unix.send(pair[0], b"hello", [file.fileno()])
    data, fds = unix.recv(pair[1], 64, 4)
    assert data == b"hello"
    assert not os.get_inheritable(fds[0])
    os.write(fds[0], b"through")
    os.close(fds[0])
    assert (tmp_path / "file").read_bytes() == b"through"


@pytest.mark.parametrize("count", [1, 2, 3, 30])
def test_too_many_descriptors_are_closed_and_refused(pair: Pair, count: int) -> None:
    with open(os.devnull, "rb") as file:
        unix.send(pair[0], b"x", [file.fileno()] * count)
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(ValueError, match="0 descriptors"):
        unix.recv(pair[1], 64, 0)
    assert len(os.listdir("/proc/self/fd")) == before
    with open(os.devnull, "rb") as file:
        unix.send(pair[0], b"x", [file.fileno()] * (count + 1))
    with pytest.raises(ValueError, match="descriptors"):
        unix.recv(pair[1], 64, count)
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_message_that_does_not_fit_is_refused_with_its_descriptors(pair: Pair) -> None:
    with open(os.devnull, "rb") as file:
        unix.send(pair[0], b"x" * 65, [file.fileno()])
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(ValueError, match="64 bytes"):
        unix.recv(pair[1], 64, 4)
    assert len(os.listdir("/proc/self/fd")) == before


async def test_channel_conversation_and_end(pair: Pair) -> None:
    ours, theirs = Channel(pair[0]), Channel(pair[1])
    waiting = asyncio.ensure_future(theirs.receive())
    await asyncio.sleep(0)
    with open(os.devnull, "rb") as file:
        ours.send(b"one", [file.fileno()])
    ours.send(b"two")
    data, fds = await waiting
    os.close(fds[0])
    assert data == b"one"
    assert await theirs.receive() == (b"two", [])
    ours.close()
    ours.close()
    with pytest.raises(EOFError):
        await theirs.receive()
    with pytest.raises(ConnectionError):
        theirs.send(b"three")
    with pytest.raises(ConnectionError):
        ours.send(b"four")
    theirs.close()


async def test_channel_closed_here_wakes_who_receives(pair: Pair) -> None:
    channel = Channel(pair[0])
    waiting = asyncio.ensure_future(channel.receive())
    await asyncio.sleep(0.01)
    channel.close()
    with pytest.raises(ConnectionError):
        await waiting


async def test_a_cancelled_receive_loses_nothing(pair: Pair) -> None:
    channel, other = Channel(pair[0]), Channel(pair[1])
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.01):
            await channel.receive()
    other.send(b"kept")
    assert await channel.receive() == (b"kept", [])
    channel.close()
    other.close()


async def test_what_the_peer_reads_late_arrives_in_order_with_its_descriptors(pair: Pair) -> None:
    ours, theirs = Channel(pair[0]), Channel(pair[1])
    sent = 0
    with open(os.devnull, "rb") as file:
        while not ours._queue or sent < 12:
            ours.send(b"%d " % sent + b"x" * 30000, [file.fileno()])
            sent += 1
    for number in range(sent):
        data, fds = await theirs.receive()
        assert data.startswith(b"%d " % number) and len(fds) == 1
        os.close(fds[0])
    ours.close()
    theirs.close()


async def test_a_peer_that_never_reads_is_cut_off_and_counted(pair: Pair) -> None:
    channel = Channel(pair[0])
    before = len(os.listdir("/proc/self/fd"))
    with open(os.devnull, "rb") as file, pytest.raises(ConnectionError, match="unread"):
        for _ in range(10_000):
            channel.send(b"x" * 10_000, [file.fileno()])
    assert channel.overflowed
    assert len(os.listdir("/proc/self/fd")) == before - 1  # nothing queued is left, nor the channel's own end
    with pytest.raises(ConnectionError):
        await channel.receive()


async def test_a_peer_that_never_stops_talking_leaves_the_loop_to_others(pair: Pair) -> None:
    channel, turns = Channel(pair[0]), 0
    pair[1].setblocking(False)

    async def others() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    task = asyncio.ensure_future(others())
    for _ in range(20):
        unix.send(pair[1], b"x")
    for _ in range(20):
        await channel.receive()
    assert turns >= 20
    task.cancel()
    channel.close()
