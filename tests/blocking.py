"""The blocking-call detector: code of ours that blocks inside a running event loop fails its test.

blockbuster replaces the blocking calls of the standard library; here is what it watches for us. A call counts when a
frame of `nodeagent` or `device_plugins` is on its stack and a loop runs in its thread. The call raises BlockingError
*and* is remembered, so an `except Exception` cannot hide it.

Not watched, because it is a memory access in practice: metadata calls (stat, listdir, unlink, mkdir, rename: sysfs,
/proc, cgroups, tmpfs, or journalled by the file system in the background) and reads and writes of at most
SMALL_BYTES in a regular file (sysfs, /proc, cgroup files, the configuration, slot.json). Locks are not watched
either: a counter's lock is held for microseconds, and whether it is contended is chance; waiting on futures, events
and threads is watched instead. Watched without exception: fsync, SQLite, sleep, child processes, name look-up,
blocking sockets and pipes.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import io
import os
import signal
import socket
import sqlite3
import stat
import subprocess
import threading
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from types import ModuleType
from typing import Any

import blockbuster
import blockbuster.blockbuster
import pytest

OURS = ("nodeagent", "device_plugins")
SMALL_BYTES = 64 * 1024
METADATA = {
    *(f"os.{name}" for name in ("stat", "statvfs", "access", "getcwd", "readlink", "listdir", "scandir")),
    *(f"os.{name}" for name in ("mkdir", "rmdir", "unlink", "remove", "rename", "replace", "link", "symlink")),
    *(f"os.path.{name}" for name in ("ismount", "samestat", "sameopenfile", "islink", "abspath")),
}
LOCKS = {"threading.Lock.acquire", "threading.Lock.acquire_lock"}
SOCKET_OUT = ("connect", "send", "sendall", "sendto", "sendmsg")
SOCKET_IN = ("accept", "recv", "recv_into", "recvfrom", "recvfrom_into", "recvmsg")


def _small_regular(fd: int, size: int | None) -> bool:
    """A regular file, and either the whole of it or the part that is asked for is small."""
    try:
        found = os.fstat(fd)
    except OSError:
        return True  # the call itself will say so
    asked = found.st_size if size is None or size < 0 else size
    return stat.S_ISREG(found.st_mode) and asked <= SMALL_BYTES


def _raw_io(fd: int, what: Any = None, *_: Any) -> bool:
    """os.read(fd, size), os.write(fd, data), os.sendfile(out, ...)"""
    return not os.get_blocking(fd) or _small_regular(fd, what if isinstance(what, int) else len(what))


def _file_read(file: Any, size: int | None = -1, *_: Any) -> bool:
    try:
        return _small_regular(file.fileno(), size)
    except (OSError, ValueError):
        return True  # in memory


def _file_write(file: Any, data: Any = b"", *_: Any) -> bool:
    try:
        return file.fileno() in (1, 2) or _small_regular(file.fileno(), len(data))
    except (OSError, ValueError):
        return True


def _socket(sock: socket.socket, *args: Any, **kwargs: Any) -> bool:
    """Not blocking, or asked not to be by a flag."""
    flags = [a for a in (*args, *kwargs.values()) if isinstance(a, int)]
    return not sock.getblocking() or any(f & socket.MSG_DONTWAIT for f in flags[-1:])


def _reaped(process: Any, *_: Any, **__: Any) -> bool:
    return process.poll() is not None


def _done(thing: Any, *_: Any, **__: Any) -> bool:
    return bool(thing.done())


WATCHED: list[tuple[Any, str, Callable[..., bool], list[tuple[str, set[str]]]]] = [
    (os, "read", _raw_io, [("asyncio/base_events.py", {"subprocess_exec", "subprocess_shell"})]),
    (os, "write", _raw_io, []),
    (os, "sendfile", lambda out, *_: not os.get_blocking(out), []),
    (os, "fsync", lambda *_: False, []),
    (os, "fdatasync", lambda *_: False, []),
    (os, "sync", lambda *_: False, []),
    (os, "system", lambda *_: False, []),
    (os, "waitpid", lambda _, options: bool(options & os.WNOHANG), [("asyncio/unix_events.py", {"_do_wait"})]),
    (os, "waitid", lambda _, __, options: bool(options & os.WNOHANG), []),
    (io.BufferedReader, "read", _file_read, []),
    (io.BufferedRandom, "read", _file_read, []),
    (io.TextIOWrapper, "read", _file_read, []),
    (io.BufferedWriter, "write", _file_write, []),
    (io.BufferedRandom, "write", _file_write, []),
    (io.TextIOWrapper, "write", _file_write, []),
    (fcntl, "flock", lambda _, how: bool(how & (fcntl.LOCK_NB | fcntl.LOCK_UN)), []),
    (fcntl, "lockf", lambda _, how, *__: bool(how & (fcntl.LOCK_NB | fcntl.LOCK_UN)), []),
    (socket, "getaddrinfo", lambda *_, **__: False, []),
    *((socket.socket, method, _socket, []) for method in SOCKET_OUT + SOCKET_IN),
    (subprocess.Popen, "wait", _reaped, []),
    (subprocess.Popen, "communicate", _reaped, []),
    (sqlite3, "connect", lambda *_, **__: False, []),
    (sqlite3.Connection, "close", lambda *_: False, []),
    (signal, "sigwait", lambda *_: False, []),
    (Future, "result", _done, []),
    (threading.Event, "wait", lambda event, *_: event.is_set(), [("/threading.py", {"start"})]),
    (
        threading.Thread,
        "join",
        lambda thread, *_, **__: not thread.is_alive(),
        # Both end a pool whose work has been awaited; its idle threads return at once.
        [("asyncio/base_events.py", {"shutdown_default_executor"}), ("concurrent/futures/thread.py", {"shutdown"})],
    ),
]
EVERYWHERE = [
    ("logging/__init__.py", {"emit", "flush", "close"}),  # a log line goes to stderr at once, that is the point of it
    ("<frozen importlib._bootstrap>", {"_find_and_load"}),  # an import reads its module
    ("/linecache.py", {"checkcache", "updatecache"}),  # a traceback reads its source
    ("/_pytest/assertion/rewrite.py", {"exec_module"}),
]


def _package(name: str) -> ModuleType:
    """A package as blockbuster looks at it, a path, without importing it."""
    package = ModuleType(name)
    package.__path__ = [str(Path(__file__).parents[1] / name)]
    return package


class Detector:
    """The blocking calls seen since the last `drain()`, as text with the innermost frames of ours."""

    def __init__(self) -> None:
        self._seen: list[str] = []

    def note(self, call: str) -> None:
        frames = [f for f in traceback.extract_stack() if "/blockbuster/" not in f.filename and f.filename != __file__]
        ours = [f for f in frames if any(f"/{name}/" in f.filename for name in OURS)]
        where = ", ".join(f"{f.filename}:{f.lineno} in {f.name}" for f in reversed(ours[-3:]))
        self._seen.append(f"{call}, from {where}")

    def drain(self) -> list[str]:
        seen, self._seen = self._seen, []
        return seen


@contextlib.contextmanager
def detecting() -> Iterator[Detector]:
    """Watch until the block is left."""
    detector = Detector()

    class Noted(blockbuster.BlockingError):
        def __init__(self, func: str) -> None:
            super().__init__(func)
            detector.note(func)

    ours = [_package(name) for name in OURS]
    buster = blockbuster.BlockBuster(ours)
    for name in METADATA | LOCKS:
        del buster.functions[name]
    for owner, name, may, stacks in WATCHED:
        key = f"{owner.__module__ + '.' if isinstance(owner, type) else ''}{owner.__name__}.{name}".removeprefix("_")
        buster.functions[key] = blockbuster.BlockBusterFunction(
            owner, name, scanned_modules=ours, can_block_functions=list(stacks), can_block_predicate=may
        )
    for function in buster.functions.values():
        for filename, functions in EVERYWHERE:
            function.can_block_in(filename, functions)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blockbuster.blockbuster, "BlockingError", Noted)
        buster.activate()
        try:
            yield detector
        finally:
            buster.deactivate()


def running_tasks() -> set[asyncio.Task[Any]]:
    """Every task of this loop that is not done, except the one that asks."""
    return {task for task in asyncio.all_tasks() if not task.done()} - {asyncio.current_task()}
