"""HTTP over a real port: pages, health, TLS, and what a hostile client may take."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import shutil
import socket
import ssl
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import pytest

from nodeagent.config import HttpConfig, TlsConfig
from nodeagent.metrics import Metrics
from nodeagent.web import app, listener
from nodeagent.web.app import Web, accepts_gzip
from tests.fakes.documents import FakeDocuments
from tests.fakes.pki import client, issue, make_ca

ANY = HttpConfig(listen="127.0.0.1:0")


@contextlib.asynccontextmanager
async def served(web: Web) -> AsyncIterator[tuple[str, int]]:
    async with asyncio.TaskGroup() as tasks:
        task = tasks.create_task(web.run())
        async with asyncio.timeout(5):
            await web.listening.wait()
        assert web.address is not None
        yield web.address
        task.cancel()


async def get(
    address: tuple[str, int], path: str, context: ssl.SSLContext | None = None, method: str = "GET", **headers: str
) -> tuple[int, bytes, dict[str, str]]:
    scheme = "https" if context else "http"
    headers = {"Accept-Encoding": "identity", **headers}
    async with (
        aiohttp.ClientSession(auto_decompress=False) as session,
        session.request(
            method, f"{scheme}://{address[0]}:{address[1]}{path}", headers=headers, ssl=context or True
        ) as response,
    ):
        return response.status, await response.read(), dict(response.headers)


# ---- pages


async def test_metrics(metrics: Metrics) -> None:
    metrics.denied.labels("not_yours").inc()
    async with served(Web(ANY, metrics, FakeDocuments())) as address:
        status, body, headers = await get(address, "/metrics")
        assert status == 200 and headers["Content-Type"].startswith("text/plain")
        lines = body.decode().splitlines()
        assert 'nodeagent_denied_total{reason="not_yours"} 1.0' in lines
        values = dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
        assert float(values["nodeagent_self_rss_bytes"]) > 10e6
        assert 5 < float(values["nodeagent_self_open_fds"]) < 1000
        assert (values["nodeagent_outbox_length"], values["nodeagent_outbox_oldest_seconds"]) == ("3.0", "7.0")
        _, packed, headers = await get(address, "/metrics", **{"Accept-Encoding": "deflate, gzip;q=0.5"})
        assert headers["Content-Encoding"] == "gzip" and b"nodeagent_denied_total" in gzip.decompress(packed)
        _, _, headers = await get(address, "/metrics", Accept="application/openmetrics-text; version=1.0.0")
        assert headers["Content-Type"].startswith("application/openmetrics-text")


@pytest.mark.parametrize(
    ("header", "accepted"),
    [
        ("", False),
        ("gzip", True),
        ("GZIP ;q=1", True),
        ("gzip;q=0", False),
        ("gzip; q=0.0", False),
        ("*", True),
        ("br", False),
    ],
)
def test_accepts_gzip(header: str, accepted: bool) -> None:
    assert accepts_gzip(header) is accepted


async def test_documents(metrics: Metrics) -> None:
    async with served(Web(ANY, metrics, FakeDocuments())) as address:
        for verb in app.VERBS:
            status, body, headers = await get(address, f"/api/v1/{verb}")
            assert status == 200 and f'"schema":"nodeagent.{verb}/v1"'.encode() in body
            assert headers["Content-Type"] == "application/json" and headers["Cache-Control"] == "no-store"
        status, body, _ = await get(address, "/")
        assert status == 200 and b"/api/v1/seats" in body


async def test_only_known_pages_and_only_reading(metrics: Metrics) -> None:
    async with served(Web(ANY, metrics, FakeDocuments())) as address:
        for path in ("/nothing", "/api/v1/config", "/api/v1/../../etc/passwd", "/metrics/"):
            assert (await get(address, path))[0] == 404, path
        status, _, headers = await get(address, "/api/v1/status", method="POST")
        assert status == 405 and headers["Allow"] == "GET,HEAD"
        assert (await get(address, "/healthz", method="HEAD"))[0] == 200


async def test_ready_and_not_ready(metrics: Metrics) -> None:
    documents = FakeDocuments()
    async with served(Web(ANY, metrics, documents)) as address:
        assert await get(address, "/readyz") == (200, b'{"ready":true}', await headers_of(address, "/readyz"))
        documents.unready("the kubelet does not answer")
        status, body, _ = await get(address, "/readyz")
        assert (status, body) == (503, b'{"ready":false,"reasons":["the kubelet does not answer"]}')
        assert (await get(address, "/healthz"))[:2] == (200, b"ok\n")


async def headers_of(address: tuple[str, int], path: str) -> dict[str, str]:
    return (await get(address, path))[2]


async def test_a_page_that_fails_says_so_without_details(metrics: Metrics) -> None:
    documents = FakeDocuments()
    async with served(Web(ANY, metrics, documents)) as address:
        documents.refuse = RuntimeError("with a secret")
        status, body, _ = await get(address, "/api/v1/status")
        assert status == 500 and b"secret" not in body
        documents.refuse = None
        assert (await get(address, "/api/v1/status"))[0] == 200


# ---- the port


async def test_a_port_in_use_is_waited_for(metrics: Metrics, caplog: pytest.LogCaptureFixture) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        http = HttpConfig(listen=f"127.0.0.1:{other.getsockname()[1]}")
        web = Web(http, metrics, FakeDocuments(), retry_s=0.02)
        task = asyncio.create_task(web.run())
        await asyncio.sleep(0.2)
        assert not web.listening.is_set()
        assert len([r for r in caplog.records if "trying again" in r.message]) == 1
    async with asyncio.timeout(5):
        await web.listening.wait()
    assert web.address is not None and (await get(web.address, "/healthz"))[0] == 200
    task.cancel()
    await asyncio.wait([task])


async def test_no_address_serves_nothing(metrics: Metrics) -> None:
    web = Web(HttpConfig(listen=""), metrics, FakeDocuments())
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.05):
            await web.run()
    assert not web.listening.is_set()


# ---- hostile clients


async def test_endless_headers_are_cut(metrics: Metrics) -> None:
    async with served(Web(ANY, metrics, FakeDocuments())) as address:
        reader, writer = await asyncio.open_connection(*address)
        writer.write(b"GET /healthz HTTP/1.1\r\nHost: x\r\nX-Long: " + b"a" * 100_000)
        assert b" 400 " in await asyncio.wait_for(reader.readline(), 5)
        await asyncio.wait_for(ended(reader), 5)
        writer.close()
        assert (await get(address, "/healthz"))[0] == 200


async def test_garbage_gets_400(metrics: Metrics) -> None:
    async with served(Web(ANY, metrics, FakeDocuments())) as address:
        reader, writer = await asyncio.open_connection(*address)
        writer.write(b"\x16\x03\x01 not http\r\n\r\n")
        assert b" 400 " in await asyncio.wait_for(reader.readline(), 5)
        writer.close()


async def test_a_client_that_says_nothing_is_closed(metrics: Metrics, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listener, "IDLE_S", 0.1)
    async with served(Web(ANY, metrics, FakeDocuments())) as address:
        for start in (b"", b"GET /healthz HT", b"GET /healthz HTTP/1.1\r\nHost: x\r\n"):
            reader, writer = await asyncio.open_connection(*address)
            writer.write(start)
            await asyncio.wait_for(ended(reader), 5)
            writer.close()


async def test_a_client_that_reads_nothing_is_closed(metrics: Metrics, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(app, "RESPONSE_S", 0.2)
    for number in range(20_000):  # an answer that no socket buffer holds
        metrics.denied.labels(f"reason {number:0>200}").inc()
    async with served(Web(ANY, metrics, FakeDocuments())) as address:
        with socket.socket() as deaf:
            deaf.setblocking(False)
            deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            loop = asyncio.get_running_loop()
            await loop.sock_connect(deaf, address)
            await loop.sock_sendall(deaf, b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n")
            deadline = loop.time() + 10
            while state(deaf) != TCP_CLOSE and loop.time() < deadline:
                await asyncio.sleep(0.05)
            assert state(deaf) == TCP_CLOSE, "the connection was reset"


TCP_CLOSE = 7  # include/net/tcp_states.h


def state(sock: socket.socket) -> int:
    return sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0]


async def ended(reader: asyncio.StreamReader) -> None:
    with contextlib.suppress(ConnectionError):
        while await reader.read(65536):
            pass


async def test_hoarded_connections_do_not_keep_others_out(metrics: Metrics) -> None:
    async with served(Web(ANY, metrics, FakeDocuments(), max_connections=4)) as address:
        hoard = [await asyncio.open_connection(*address) for _ in range(20)]
        for _, writer in hoard:
            writer.write(b"GET /heal")
        for _ in range(5):
            assert (await get(address, "/healthz"))[0] == 200
        closed = [asyncio.create_task(ended(reader)) for reader, _ in hoard]
        await asyncio.sleep(0.1)
        assert sum(task.done() for task in closed) >= 16
        for task in closed:
            task.cancel()
        await asyncio.wait(closed)
        for _, writer in hoard:
            writer.close()


# ---- TLS


@pytest.fixture(scope="module")
def pki(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("pki")
    for ca, names in (("ca", ("server", "prometheus")), ("stranger", ("spy", "renewed"))):
        make_ca(directory, ca)
        for name in names:
            issue(directory, ca, name)
    return directory


def tls(directory: Path, client_ca: str = "") -> TlsConfig:
    return TlsConfig(cert=str(directory / "server.crt"), key=str(directory / "server.key"), client_ca=client_ca)


async def test_tls(metrics: Metrics, pki: Path) -> None:
    http = HttpConfig(listen="127.0.0.1:0", tls=tls(pki, str(pki / "ca.crt")))  # auth: none
    documents = FakeDocuments()
    documents.unready("this")
    async with served(Web(http, metrics, documents)) as address:
        assert (await get(address, "/metrics", client(pki)))[0] == 200
        assert b"this" in (await get(address, "/readyz", client(pki)))[1]
        with pytest.raises(aiohttp.ClientError):
            await get(address, "/metrics", client(pki, ca="stranger"))
        with pytest.raises(aiohttp.ClientError):
            await get(address, "/metrics")


async def test_mtls(metrics: Metrics, pki: Path) -> None:
    http = HttpConfig(listen="127.0.0.1:0", tls=tls(pki, str(pki / "ca.crt")), auth="mtls")
    documents = FakeDocuments()
    documents.unready("nothing is ready")
    async with served(Web(http, metrics, documents)) as address:
        for path in ("/metrics", "/api/v1/status", "/"):
            assert (await get(address, path, client(pki, "prometheus")))[0] == 200
            status, body, _ = await get(address, path, client(pki))
            assert status == 401 and b"client certificate" in body
        # The kubelet's probes come without one and learn yes or no.
        assert (await get(address, "/healthz", client(pki)))[0] == 200
        assert (await get(address, "/readyz", client(pki)))[:2] == (503, b'{"ready":false}')
        assert b"nothing is ready" in (await get(address, "/readyz", client(pki, "prometheus")))[1]
        # With TLS 1.3 the refusal of a stranger's certificate comes after the client has begun to speak.
        with pytest.raises((aiohttp.ClientError, ConnectionError, ssl.SSLError)):
            await get(address, "/healthz", client(pki, "spy"))


async def test_a_renewed_certificate_is_served(
    metrics: Metrics, pki: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listener, "CERTIFICATE_LOOK_S", 0)
    for part in ("crt", "key"):
        shutil.copy(pki / f"server.{part}", tmp_path / f"server.{part}")
    http = HttpConfig(listen="127.0.0.1:0", tls=tls(tmp_path))
    async with served(Web(http, metrics, FakeDocuments())) as address:
        assert (await get(address, "/healthz", client(pki)))[0] == 200
        (tmp_path / "server.crt").write_text("half a certificate")
        assert (await get(address, "/healthz", client(pki)))[0] == 200, "the old one stays"
        for part in ("crt", "key"):
            shutil.copy(pki / f"renewed.{part}", tmp_path / f"server.{part}")
        assert (await get(address, "/healthz", client(pki, ca="stranger")))[0] == 200


async def test_certificates_that_come_late_are_waited_for(metrics: Metrics, pki: Path, tmp_path: Path) -> None:
    http = HttpConfig(listen="127.0.0.1:0", tls=tls(tmp_path))
    web = Web(http, metrics, FakeDocuments(), retry_s=0.02)
    async with served(web):
        await asyncio.sleep(0.1)
        for part in ("key", "crt"):
            shutil.copy(pki / f"server.{part}", tmp_path / f"server.{part}")
        async with asyncio.timeout(5):
            while True:
                with contextlib.suppress(aiohttp.ClientError, OSError):
                    if web.address and (await get(web.address, "/healthz", client(pki)))[0] == 200:
                        break
                await asyncio.sleep(0.02)


async def test_a_silent_handshake_ends(metrics: Metrics, pki: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listener, "HANDSHAKE_S", 0.1)
    http = HttpConfig(listen="127.0.0.1:0", tls=tls(pki))
    async with served(Web(http, metrics, FakeDocuments())) as address:
        reader, writer = await asyncio.open_connection(*address)
        await asyncio.wait_for(ended(reader), 5)
        writer.close()
        assert (await get(address, "/healthz", client(pki)))[0] == 200
