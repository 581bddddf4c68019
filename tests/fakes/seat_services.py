"""Seat services for tests of the zygote and the worker.

`Echo` gives back what it gets. `Probe` tries in the confined worker what a connection asks for and answers how it went.
"""

from __future__ import annotations

import asyncio
import ctypes
import errno
import mmap
import os
import signal
import socket
import threading
from collections.abc import Callable

from nodeagent.errors import Reason
from nodeagent.services import Link
from nodeagent.wire.seat import Counters, CreateJob, JobCreated, Jobs, OpenDocument, Printers, Serve

_libc = ctypes.CDLL(None, use_errno=True)


class Echo:
    def __init__(self, link: Link, serve: Serve) -> None:
        self.link, self.serve = link, serve
        self.news: list[Printers | Jobs] = []
        self.bytes = self.connections = 0
        self.denied: dict[Reason, int] = {}

    async def connection(self, sock: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        self.connections += 1
        with sock:
            while data := await loop.sock_recv(sock, 4096):
                self.bytes += len(data)
                await loop.sock_sendall(sock, await self.answer(data))

    async def answer(self, data: bytes) -> bytes:
        return data

    def on_message(self, message: Printers | Jobs) -> None:
        self.news.append(message)

    def counters(self) -> Counters:
        return Counters(
            service=self.serve.service,
            bytes_in=self.bytes,
            bytes_out=self.bytes,
            connections=self.connections,
            denied=self.denied,
        )


class Probe(Echo):
    """Each message is the name of a deed below; the answer is `ok` or the name of the error."""

    async def answer(self, data: bytes) -> bytes:
        word = data.decode()
        if word == "raise":
            raise ValueError("as\nasked \x1b[31m")
        if word == "document":
            created, _ = await self.link.ask(CreateJob(request=self.link.next_request(), printer="p", title="t"))
            assert isinstance(created, JobCreated)
            _, fd = await self.link.ask(OpenDocument(request=self.link.next_request(), job=created.job))
            assert fd is not None
            os.write(fd, b"whole document")
            os.close(fd)
            return b"ok"
        try:
            DEEDS[word]()
        except OSError as error:
            return errno.errorcode[error.errno or 0].encode()
        except Exception as error:
            return type(error).__name__.encode()
        return b"ok"

    def on_message(self, message: Printers | Jobs) -> None:
        if isinstance(message, Jobs):
            raise RuntimeError("a bug of the service")


def _call(name: str, *arguments: int) -> None:
    if getattr(_libc, name)(*arguments) < 0:
        raise OSError(ctypes.get_errno(), name)


def _chatter() -> None:
    """Far more lines on standard error than anybody wants to hear; a full or closed pipe must not stop the worker."""
    for number in range(20_000):
        try:
            os.write(2, f"line {number}\n".encode())
        except OSError:
            pass


def _eat() -> None:
    """More memory than any seat may have, a page at a time."""
    eaten = []
    while True:
        eaten.append(bytearray(1 << 20))


DEEDS: dict[str, Callable[[], object]] = {
    "socket-unix": lambda: socket.socket(socket.AF_UNIX),
    "socket-inet": lambda: socket.socket(socket.AF_INET),
    "socketpair": lambda: [s.close() for s in socket.socketpair()],
    "open-read": lambda: os.open("/etc/passwd", os.O_RDONLY),
    "open-write": lambda: os.open("/tmp/nodeagent-probe", os.O_WRONLY | os.O_CREAT),
    "listdir": lambda: os.listdir("/"),
    "unlink": lambda: os.unlink("/tmp/nodeagent-probe"),
    "fork": os.fork,
    "thread": lambda: threading.Thread(target=print).start(),
    "import": lambda: __import__("this"),
    "kill-parent": lambda: os.kill(os.getppid(), 0),
    "kill-init": lambda: os.kill(1, signal.SIGKILL),
    "map-code": lambda: mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_EXEC),
    "prctl": lambda: _call("prctl", 4, 1, 0, 0, 0),
    "execve": lambda: os.execv("/bin/true", ["true"]),
    "ptrace": lambda: _call("ptrace", 16, os.getppid(), 0, 0),
    "mount": lambda: _call("mount", 0, 0, 0, 0, 0),
    "unshare": lambda: _call("unshare", 0x10000000),
    "setuid": lambda: os.setuid(0),
    "eat": _eat,
    "chatter": _chatter,
}
