"""The control socket over real gRPC: answers, refusals, and two daemons that want the same name."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
import stat
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import grpc.aio
import pytest

from nodeagent.cli import _client
from nodeagent.control import Control, answers
from nodeagent.documents import StatusDocument
from nodeagent.errors import AgentError, ConfigError, Reason
from tests.fakes.documents import FakeDocuments

LOOK_S = 0.02


@pytest.fixture(autouse=True)
async def grpc_stays() -> AsyncIterator[None]:
    """gRPC waits for its own thread when its last object goes; that is here and not inside the daemon's code."""
    grpc.aio.init_grpc_aio()
    yield
    grpc.aio.shutdown_grpc_aio()


@contextlib.asynccontextmanager
async def running(control: Control, *, published: bool = True) -> AsyncIterator[Control]:
    async with asyncio.TaskGroup() as tasks:
        task = tasks.create_task(control.run())
        if published:
            async with asyncio.timeout(5):
                await control.published.wait()
        yield control
        task.cancel()


async def asked(run_dir: Path, verb: str = "status") -> bytes:
    return await asyncio.to_thread(_client.ask, run_dir, verb)


async def node(run_dir: Path) -> str:
    return _client.decode(await asked(run_dir), StatusDocument).node


async def test_a_document_arrives_unchanged(short_tmp: Path) -> None:
    async with running(Control(short_tmp, FakeDocuments("n7"))):
        raw = await asked(short_tmp)
        assert json.loads(raw)["schema"] == "nodeagent.status/v1"
        assert _client.decode(raw, StatusDocument) == FakeDocuments("n7").status


async def test_only_root_may_ask(short_tmp: Path) -> None:
    async with running(Control(short_tmp, FakeDocuments())) as control:
        assert stat.S_IMODE(control.path.stat().st_mode) == 0o600
        private = [p for p in short_tmp.iterdir() if p.name.startswith(".control-")]
        assert [stat.S_IMODE(p.stat().st_mode) for p in private] == [0o700]
    assert list(short_tmp.iterdir()) == [], "nothing is left"


async def test_an_unknown_verb_is_refused(short_tmp: Path) -> None:
    async with running(Control(short_tmp, FakeDocuments())):
        with pytest.raises(AgentError, match="no document 'bogus'") as refused:
            await asked(short_tmp, "bogus")
    assert refused.value.reason is Reason.NOT_SUPPORTED


async def test_a_refused_reload_says_which_key(short_tmp: Path) -> None:
    documents = FakeDocuments()
    async with running(Control(short_tmp, documents)):
        assert json.loads(await asyncio.to_thread(_client.reload, short_tmp))["changed"] is True
        documents.refuse = ConfigError("devices.rules[2].give: 'x' is nothing", hint="schön: service")
        with pytest.raises(AgentError) as refused:
            await asyncio.to_thread(_client.reload, short_tmp)
    error = refused.value
    assert (error.reason, error.message, error.hint) == (
        Reason.CONFIG_INVALID,
        "devices.rules[2].give: 'x' is nothing",
        "schön: service",
    )


async def test_an_internal_error_tells_no_details(short_tmp: Path) -> None:
    documents = FakeDocuments()
    documents.refuse = RuntimeError("with a secret")
    async with running(Control(short_tmp, documents)):
        with pytest.raises(AgentError) as refused:
            await asked(short_tmp)
    assert refused.value.reason is Reason.INTERNAL and "secret" not in str(refused.value)


async def test_a_daemon_that_hangs_is_not_waited_for(short_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    documents = FakeDocuments()
    documents.gate = asyncio.Event()
    monkeypatch.setattr(_client, "TIMEOUT_S", 0.3)
    async with running(Control(short_tmp, documents)):
        with pytest.raises(AgentError, match="does not answer") as refused:
            await asyncio.to_thread(_client.reload, short_tmp)
        documents.gate.set()
    assert refused.value.reason is Reason.DEADLINE


async def test_garbage_harms_only_who_sends_it(short_tmp: Path) -> None:
    async with running(Control(short_tmp, FakeDocuments())) as control:
        reader, writer = await asyncio.open_unix_connection(control.path)
        writer.write(b"GET / HTTP/1.1\r\n\r\n" + os.urandom(4096))
        async with asyncio.timeout(5):
            with contextlib.suppress(ConnectionError):
                await reader.read()
        writer.close()
        assert await node(short_tmp) == "n1"


async def test_a_stale_socket_is_replaced(short_tmp: Path) -> None:
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(short_tmp / "nodeagent.sock"))
    killed = short_tmp / ".control-killed"
    killed.mkdir()
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(killed / "s"))
    async with running(Control(short_tmp, FakeDocuments())):
        assert await node(short_tmp) == "n1"
        assert not killed.exists()


async def test_a_standby_leaves_the_socket_to_the_active_one(short_tmp: Path) -> None:
    old, new = (Control(short_tmp, FakeDocuments(name), look_s=LOOK_S) for name in ("old", "new"))
    async with contextlib.AsyncExitStack() as stack:
        async with running(old):
            await stack.enter_async_context(running(new, published=False))
            await asyncio.sleep(5 * LOOK_S)
            assert not new.published.is_set()
            assert await node(short_tmp) == "old"
        async with asyncio.timeout(5):
            await new.published.wait()
        assert await node(short_tmp) == "new"


async def test_the_active_daemon_takes_the_socket_from_one_that_still_answers(short_tmp: Path) -> None:
    old, new = (Control(short_tmp, FakeDocuments(name), look_s=30) for name in ("old", "new"))
    async with contextlib.AsyncExitStack() as stack:
        async with running(old):
            await stack.enter_async_context(running(new, published=False))
            new.claim()
            async with asyncio.timeout(5):
                await new.published.wait()
            assert await node(short_tmp) == "new"
        assert await node(short_tmp) == "new", "the old one, leaving, does not take the new one's socket away"
    assert not answers(short_tmp / "nodeagent.sock")


async def test_a_wiped_directory_is_noticed(short_tmp: Path) -> None:
    control = Control(short_tmp, FakeDocuments(), look_s=LOOK_S)
    async with running(control):
        for _ in range(2):
            control.path.unlink()
            async with asyncio.timeout(5):
                while not answers(control.path):
                    await asyncio.sleep(LOOK_S)
            assert await node(short_tmp) == "n1"


async def command(short_tmp: Path, *argv: str) -> tuple[int, str, str]:
    config = short_tmp / "config.yaml"
    config.write_text(f"run_dir: {short_tmp}\n")
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "nodeagent", "--config", str(config), *argv),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )
    out, err = await process.communicate()
    assert process.returncode is not None
    return process.returncode, out.decode(), err.decode()


async def test_the_command_line_asks_the_daemon(short_tmp: Path) -> None:
    documents = FakeDocuments()
    async with running(Control(short_tmp, documents)):
        code, out, err = await command(short_tmp, "status", "-o", "json")
        assert (code, err) == (0, "") and json.loads(out)["node"] == "n1"
        code, out, _ = await command(short_tmp, "devices")
        assert code == 0 and "no devices" in out and "without a daemon" not in out
        code, out, _ = await command(short_tmp, "seats", "-o", "yaml")
        assert code == 0 and "schema: nodeagent.seats/v1" in out
        documents.unready("the kubelet has not registered opencdi.io/printer yet")
        code, out, _ = await command(short_tmp, "status")
        assert code == 3 and out.splitlines()[-1] == "not ready: the kubelet has not registered opencdi.io/printer yet"
        documents.refuse = ConfigError("http.listen: 'x' is not host:port")
        code, _, err = await command(short_tmp, "config", "reload")
        assert code == 2 and err.startswith("nodeagent: http.listen: ")
