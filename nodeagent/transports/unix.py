"""Unix sockets: listening sockets at safe places, and messages with descriptors between the processes of the agent.

`listen` makes the sockets that desktops connect to. `send`, `recv` and `Channel` carry messages over SOCK_SEQPACKET pairs
(daemon and zygote, daemon and worker): one message is one datagram, descriptors travel beside it (SCM_RIGHTS, unix(7)).
"""

from __future__ import annotations

import array
import asyncio
import os
import socket
import stat
from collections import deque
from collections.abc import Sequence
from pathlib import Path

from nodeagent.wire.seat import MAX_FDS, MAX_MESSAGE

BACKLOG = 64
MAX_QUEUED = 64
"""Messages that may wait for a peer that does not read. An honest worker reads each one as it comes."""

_INT = array.array("i").itemsize


def listen(directory: Path, name: str, mode: int = 0o666) -> socket.socket:
    """A non-blocking listening stream socket at `directory/name` with exactly `mode`; replaces an old socket or file there.

    No symbolic link is followed, neither at `directory` itself nor at `name`, and the path may have any length: sun_path
    holds 108 bytes (unix(7)), so the name is bound below a descriptor of the directory. Raises OSError.
    """
    at = os.open(directory, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        try:
            os.unlink(name, dir_fd=at)
        except FileNotFoundError:
            pass
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
        try:
            sock.bind(f"/proc/self/fd/{at}/{name}")
            _chmod_socket(at, name, mode)
            sock.listen(BACKLOG)
        except BaseException:
            sock.close()
            raise
        return sock
    finally:
        os.close(at)


def _chmod_socket(at: int, name: str, mode: int) -> None:
    """bind() applies the umask, which belongs to all threads of the process, so the mode is set afterwards."""
    fd = os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=at)
    try:
        if not stat.S_ISSOCK(os.fstat(fd).st_mode):
            raise FileExistsError(f"{name} was replaced by something that is no socket")
        Path(f"/proc/self/fd/{fd}").chmod(mode)
    finally:
        os.close(fd)


def send(sock: socket.socket, data: bytes, fds: Sequence[int] = ()) -> None:
    """Send one message; the caller keeps its descriptors. Raises BlockingIOError, BrokenPipeError or another OSError."""
    ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
    sock.sendmsg([data], ancillary)


def recv(sock: socket.socket, max_bytes: int, max_fds: int) -> tuple[bytes, list[int]]:
    """Receive one message and its descriptors (close-on-exec, owned by the caller).

    Raises EOFError at the end, ValueError for a message that is larger or carries more than allowed (its descriptors are
    closed), BlockingIOError or another OSError.
    """
    space = socket.CMSG_SPACE(max_fds * _INT) if max_fds else 0
    data, ancillary, flags, _ = sock.recvmsg(max_bytes, space, socket.MSG_CMSG_CLOEXEC)
    fds = array.array("i")
    for level, kind, content in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fds.frombytes(content[: len(content) - len(content) % _INT])
    if flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC) or len(fds) > max_fds or not data:
        for fd in fds:
            os.close(fd)
        if not data:
            raise EOFError("the peer closed its end")
        raise ValueError(f"a message with more than {max_bytes} bytes or {max_fds} descriptors")
    return data, list(fds)


class Channel:
    """One end of a SOCK_SEQPACKET pair on the running event loop. Owns `sock`.

    Reading happens only inside `receive`, so a peer that talks too much waits in its own socket buffer.
    """

    def __init__(self, sock: socket.socket, *, max_bytes: int = MAX_MESSAGE, max_fds: int = MAX_FDS) -> None:
        sock.setblocking(False)
        self.overflowed = False
        """The channel was closed because the peer left MAX_QUEUED messages unread."""
        self._sock = sock
        self._max_bytes, self._max_fds = max_bytes, max_fds
        self._waiting: asyncio.Future[None] | None = None
        self._queue: deque[tuple[bytes, list[int]]] = deque()
        self._loop = asyncio.get_running_loop()

    async def receive(self) -> tuple[bytes, list[int]]:
        """The next message and its descriptors, owned by the caller. One call at a time; a cancelled one loses nothing.

        Raises EOFError when the peer closed its end, ConnectionError when the channel broke or was closed here, ValueError
        for a message over the limits of this channel.
        """
        await asyncio.sleep(0)  # a peer that never stops talking must not keep the loop for itself
        while True:
            if self._sock.fileno() < 0:
                raise ConnectionAbortedError("the channel is closed")
            try:
                return recv(self._sock, self._max_bytes, self._max_fds)
            except BlockingIOError:
                await self._readable()
            except ConnectionError:
                raise
            except OSError as error:
                raise ConnectionError(f"cannot receive: {error.strerror}") from error

    def send(self, data: bytes, fds: Sequence[int] = ()) -> None:
        """Send a message, at once or when the peer reads; never waits. The caller keeps its descriptors.

        Raises ConnectionError when the peer is gone or does not read; in the latter case the channel closes itself.
        """
        if self._sock.fileno() < 0:
            raise ConnectionAbortedError("the channel is closed")
        try:
            if not self._queue:
                try:
                    return send(self._sock, data, fds)
                except BlockingIOError:
                    pass
            if len(self._queue) < MAX_QUEUED:
                return self._enqueue(data, fds)
        except ConnectionError:
            raise
        except OSError as error:
            raise ConnectionError(f"cannot send: {error.strerror}") from error
        self.overflowed = True
        self.close()
        raise ConnectionAbortedError(f"the peer left {MAX_QUEUED} messages unread")

    def close(self) -> None:
        """Close the channel; what is queued is lost, a `receive` that waits raises ConnectionError. Again: no effect."""
        if self._sock.fileno() < 0:
            return
        self._loop.remove_reader(self._sock)
        self._loop.remove_writer(self._sock)
        self._sock.close()
        for _, fds in self._queue:
            _close_all(fds)
        self._queue.clear()
        if self._waiting is not None and not self._waiting.done():
            self._waiting.set_result(None)

    async def _readable(self) -> None:
        self._waiting = self._loop.create_future()
        self._loop.add_reader(self._sock, self._on_readable)
        try:
            await self._waiting
        finally:
            self._waiting = None
            if self._sock.fileno() >= 0:
                self._loop.remove_reader(self._sock)

    def _on_readable(self) -> None:
        if self._waiting is not None and not self._waiting.done():
            self._waiting.set_result(None)

    def _enqueue(self, data: bytes, fds: Sequence[int]) -> None:
        duplicates: list[int] = []
        try:
            for fd in fds:
                duplicates.append(os.dup(fd))
        except OSError:
            _close_all(duplicates)
            raise
        self._queue.append((data, duplicates))
        self._loop.add_writer(self._sock, self._on_writable)

    def _on_writable(self) -> None:
        while self._queue:
            data, fds = self._queue[0]
            try:
                send(self._sock, data, fds)
            except BlockingIOError:
                return
            except OSError:
                break  # the peer is gone; whoever receives is told
            self._queue.popleft()
            _close_all(fds)
        for _, fds in self._queue:
            _close_all(fds)
        self._queue.clear()
        self._loop.remove_writer(self._sock)


def _close_all(fds: Sequence[int]) -> None:
    for fd in fds:
        os.close(fd)
