"""The guards themselves: a test that leaks or blocks fails, one that does not passes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

INNER = '''
import asyncio, os, socket, subprocess, sys, threading, time, ctypes
from pathlib import Path
import pytest
import nodeagent
from nodeagent.host import HostRoot, run, write_atomically
from tests import leftovers

leftovers.GRACE_S = 0.3
kept = []

def ours(source):
    """Run source as if it stood in our package."""
    exec(compile(source, nodeagent.__path__[0] + "/inner.py", "exec"), {"asyncio": asyncio, "time": time})

async def test_bad_task():
    kept.append(asyncio.create_task(asyncio.sleep(3600), name="forgotten"))

def test_bad_thread():
    kept.append(threading.Event())
    threading.Thread(target=kept[-1].wait, name="idler", daemon=True).start()

def test_bad_child():
    kept.append(subprocess.Popen(["sleep", "3600"]))

def test_bad_zombie():
    os.posix_spawn("/bin/true", ["true"], os.environ)

def test_bad_orphan():
    """The child has ended and is reaped; its own child lives on."""
    subprocess.run(["sh", "-c", "sleep 3601 & exit 0"], check=True, stdout=subprocess.DEVNULL)

def test_bad_descriptor():
    kept.append(os.open("/etc/hostname", os.O_RDONLY))

def test_bad_socket(short_tmp):
    kept.append(socket.socket(socket.AF_UNIX))
    kept[-1].bind(str(short_tmp / "left.sock"))

def test_bad_fsync(tmp_path):
    async def main():
        write_atomically(tmp_path / "file", b"data")
    asyncio.run(main())

async def test_bad_sleep():
    ours("time.sleep(0)")

async def test_bad_hidden():
    ours("try:\\n time.sleep(0)\\nexcept Exception: pass")

async def test_bad_subprocess():
    ours("import os; os.system('true')")

async def test_bad_sqlite():
    ours("import sqlite3; sqlite3.connect(':memory:').close()")

async def test_bad_connect():
    server = socket.create_server(("127.0.0.1", 0))
    client = socket.socket()
    with server, client:
        with pytest.raises(Exception, match="Blocking call"):
            exec(compile("c.connect(a)", nodeagent.__path__[0] + "/inner.py", "exec"), {"c": client, "a": server.getsockname()})

@pytest.mark.root
@pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")
def test_bad_mount(tmp_path):
    if ctypes.CDLL(None).mount(b"left", str(tmp_path).encode(), b"tmpfs", 0, None):
        pytest.fail("the test left behind: mount (this machine lets nobody mount)")
    kept.append(tmp_path)

async def test_good_async(tmp_path, short_tmp, metrics):
    assert HostRoot().attribute("/proc/sys/kernel/ostype") == "Linux"
    ours("import os; os.stat('/'); f = open('/proc/self/stat'); f.read(); f.close()")
    assert (await run(["echo", "x"])).stdout == "x\\n"
    await asyncio.to_thread(write_atomically, tmp_path / "file", b"data")
    async def serve(reader, writer):
        writer.close()
    server = await asyncio.start_unix_server(serve, short_tmp / "s")
    reader, writer = await asyncio.open_unix_connection(short_tmp / "s")
    await reader.read()
    writer.close()
    await writer.wait_closed()
    server.close()
    await server.wait_closed()

async def test_good_task_that_is_just_ending():
    kept.append(asyncio.create_task(asyncio.sleep(0.05)))

def test_good_sync():
    time.sleep(0)
    subprocess.run(["sh", "-c", "true & exit 0"], check=True)

def test_last_clears_up():
    for thing in kept:
        if isinstance(thing, threading.Event): thing.set()
        elif isinstance(thing, subprocess.Popen): thing.kill(); thing.wait()
        elif isinstance(thing, Path): ctypes.CDLL(None).umount2(str(thing).encode(), 2)
        elif isinstance(thing, socket.socket): thing.close()
    for pid in leftovers.children():
        os.kill(pid, 9)
        os.waitpid(pid, 0)
'''

LEFT = {
    "test_bad_task": "task forgotten",
    "test_bad_thread": "thread 'idler'",
    "test_bad_child": "sleep 3600",
    "test_bad_zombie": "zombie process",
    "test_bad_orphan": "sleep 3601",
    "test_bad_descriptor": "/etc/hostname",
    "test_bad_socket": "left.sock",
    "test_bad_fsync": "os.fsync, from",
    "test_bad_sleep": "time.sleep, from",
    "test_bad_hidden": "time.sleep, from",
    "test_bad_subprocess": "os.system, from",
    "test_bad_sqlite": "sqlite3.connect, from",
    "test_bad_connect": "connect, from",
    "test_bad_mount": "mount",
}


def test_guards_fail_what_leaks_and_nothing_else(tmp_path: Path) -> None:
    root = Path(__file__).parents[2]
    inner = tmp_path / "test_inner.py"
    inner.write_text(INNER)
    command = [sys.executable, "-m", "pytest", "-p", "tests.conftest", "-c", str(root / "pyproject.toml")]
    command += ["-p", "no:cacheprovider", "--rootdir", str(tmp_path), "-rA", "--tb=short", str(inner)]
    ran = subprocess.run(command, cwd=root, capture_output=True, text=True, env={**os.environ, "CI": ""}, check=False)
    report = ran.stdout
    for name, words in LEFT.items():
        section = report.partition(f" {name} _")[2].partition("\n____")[0]
        if name == "test_bad_mount" and os.geteuid() != 0:
            continue
        assert words in section, f"{name} should have failed with {words!r}:\n{report}"
    for line in report.splitlines():
        if line.startswith(("ERROR", "FAILED")):
            assert "::test_bad_" in line, report
    assert ran.returncode == 1, report + ran.stderr


@pytest.mark.parametrize("path_length", [30])
def test_short_tmp_is_short(short_tmp: Path, path_length: int) -> None:
    assert len(str(short_tmp)) < path_length
