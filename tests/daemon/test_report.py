"""Events and look-ups against an API server over real HTTP: away, slow, busy, forbidding, forgetting."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import ssl
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from nodeagent.config import KubernetesConfig
from nodeagent.errors import ConfigError, Reason
from nodeagent.metrics import Metrics
from nodeagent.model import PodRef
from nodeagent.report import events as ev
from nodeagent.report import outbox as box
from nodeagent.report.endpoint import Endpoint, discover
from nodeagent.report.events import Events, camel, cut
from nodeagent.report.kube import ApiError, KubeClient, retry_after
from nodeagent.report.outbox import Outbox
from tests.fakes.apiserver import ApiServer
from tests.fakes.pki import issue, make_ca

DESK = PodRef("office", "desk-1", "7f3c")


@pytest.fixture
async def api() -> AsyncIterator[ApiServer]:
    async with ApiServer() as server:
        yield server


@contextlib.asynccontextmanager
async def client(api: ApiServer, metrics: Metrics, **options: Any) -> AsyncIterator[KubeClient]:
    async with KubeClient(options.pop("endpoint", Endpoint(server=api.url)), metrics, **options) as made:
        yield made


@contextlib.asynccontextmanager
async def reporting(path: Path, metrics: Metrics, api: ApiServer | None, **options: Any) -> AsyncIterator[Events]:
    options = {"pace_s": 0, "backoff_s": (0.01, 0.05), **options}
    async with contextlib.AsyncExitStack() as stack:
        outbox = await stack.enter_async_context(Outbox(path / box.NAME, metrics))
        kube = await stack.enter_async_context(client(api, metrics, timeout_s=0.5)) if api else None
        tasks = await stack.enter_async_context(asyncio.TaskGroup())
        events = Events(outbox, "node-1", metrics, kube, **options)
        task = tasks.create_task(events.run())
        yield events
        task.cancel()


async def settled(events: Events, left: int = 0) -> None:
    """Wait until only `left` reports wait."""
    async with asyncio.timeout(5):
        while events._waiting.qsize() or events._outbox.state.length != left:
            await asyncio.sleep(0.01)


def sample(metrics: Metrics, name: str, **labels: str) -> float:
    return metrics.registry.get_sample_value(name, labels) or 0.0


# ---- Events


async def test_an_event_about_a_pod(api: ApiServer, metrics: Metrics, tmp_path: Path) -> None:
    async with reporting(tmp_path, metrics, api) as events:
        events.pod_event(DESK, Reason.LABELS_DO_NOT_MATCH, "rule 'p' asks for label a=b")
        await api.until(events=1)
        await settled(events)
    ((namespace, name), event) = next(iter(api.events.items()))
    assert namespace == "office" and name.startswith("desk-1.")
    assert event["involvedObject"] == {
        "apiVersion": "v1",
        "kind": "Pod",
        "namespace": "office",
        "name": "desk-1",
        "uid": "7f3c",
    }
    assert (event["reason"], event["type"], event["count"]) == ("LabelsDoNotMatch", "Warning", 1)
    assert event["message"] == "rule 'p' asks for label a=b"
    assert event["reportingComponent"] == "nodeagent" and event["source"] == {
        "component": "nodeagent",
        "host": "node-1",
    }
    assert sample(metrics, "nodeagent_apiserver_connected") == 1


async def test_an_event_about_the_node(api: ApiServer, metrics: Metrics, tmp_path: Path) -> None:
    async with reporting(tmp_path, metrics, api) as events:
        events.node_event("config_rejected", "devices: unknown key", warning=False)
        await api.until(events=1)
    ((namespace, _), event) = next(iter(api.events.items()))
    assert namespace == "default" and event["type"] == "Normal"
    assert event["involvedObject"] == {"apiVersion": "v1", "kind": "Node", "name": "node-1", "uid": "node-1"}


async def test_repetitions_become_a_count(
    api: ApiServer, metrics: Metrics, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ev, "REPEAT_S", 0.0)
    async with reporting(tmp_path, metrics, api) as events:
        events.pod_event(DESK, "worker_died", "killed for memory")
        await api.until(events=1)
        for _ in range(3):
            events.pod_event(DESK, "worker_died", "killed for memory")
        async with asyncio.timeout(5):
            while next(iter(api.events.values()))["count"] < 4:
                await asyncio.sleep(0.01)
    assert len(api.events) == 1


async def test_events_wait_while_the_server_is_away_and_over_a_restart(
    api: ApiServer, metrics: Metrics, tmp_path: Path
) -> None:
    await api.stop()
    async with reporting(tmp_path, metrics, api) as events:
        events.pod_event(DESK, "first", "before")
        async with asyncio.timeout(5):
            while events._failures < 2:
                await asyncio.sleep(0.01)
        assert sample(metrics, "nodeagent_apiserver_connected") == 0
    await api.start()
    async with reporting(tmp_path, metrics, api) as events:
        events.pod_event(DESK, "second", "after")
        await api.until(events=2)
    assert {event["reason"] for event in api.events.values()} == {"First", "Second"}


async def test_the_server_goes_and_comes_back(api: ApiServer, metrics: Metrics, tmp_path: Path) -> None:
    async with reporting(tmp_path, metrics, api) as events:
        events.pod_event(DESK, "one", "")
        await api.until(events=1)
        await api.stop()
        events.pod_event(DESK, "two", "")
        async with asyncio.timeout(5):
            while events._failures < 2:
                await asyncio.sleep(0.01)
        await api.start()
        await api.until(events=2)


async def test_what_is_taken_at_the_last_moment_is_kept(api: ApiServer, metrics: Metrics, tmp_path: Path) -> None:
    await api.stop()
    async with reporting(tmp_path, metrics, api) as events:
        await asyncio.sleep(0)  # it runs
        events.pod_event(DESK, "late", "")
    async with Outbox(tmp_path / box.NAME, metrics) as outbox:
        assert outbox.state.length == 1


async def test_without_an_api_server_events_are_logged(
    metrics: Metrics, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    async with reporting(tmp_path, metrics, None) as events:
        events.pod_event(DESK, Reason.NOT_YOURS, "asked for another's job")
        assert events._waiting.qsize() == 0, "nothing would ever take it out of the outbox"
    assert "event NotYours about Pod desk-1: asked for another's job" in caplog.text


async def test_an_event_that_arrived_before_a_crash_is_not_sent_twice(
    api: ApiServer, metrics: Metrics, tmp_path: Path
) -> None:
    async with Outbox(tmp_path / box.NAME, metrics) as outbox, client(api, metrics) as kube:
        events = Events(outbox, "node-1", metrics, kube)
        events.pod_event(DESK, "once", "")
        await events._keep(*events._waiting.get_nowait())
        report = await outbox.due()
        assert report is not None
        await events._send_one(kube, report)
        assert await events._send_one(kube, report) == ev.PACE_S  # as after a crash before it was noted
    assert len(api.events) == 1 and [method for method, _ in api.calls] == ["POST", "POST", "PATCH"]


async def test_busy_servers_are_left_alone_as_long_as_they_ask(
    api: ApiServer, metrics: Metrics, tmp_path: Path
) -> None:
    api.mood(429, "TooManyRequests", Retry_After="7")
    async with Outbox(tmp_path / box.NAME, metrics) as outbox, client(api, metrics) as kube:
        events = Events(outbox, "node-1", metrics, kube)
        events.pod_event(DESK, "busy", "")
        await events._keep(*events._waiting.get_nowait())
        report = await outbox.due()
        assert report is not None
        assert 7 * 0.75 <= await events._send_one(kube, report) <= 7 * 1.25
        assert await events._send_one(kube, report) == ev.PACE_S
    assert len(api.events) == 1


async def test_failures_back_off(api: ApiServer, metrics: Metrics, tmp_path: Path) -> None:
    api.mood(500, "InternalError", times=20)
    async with Outbox(tmp_path / box.NAME, metrics) as outbox, client(api, metrics) as kube:
        events = Events(outbox, "node-1", metrics, kube)
        events.pod_event(DESK, "x", "")
        await events._keep(*events._waiting.get_nowait())
        report = await outbox.due()
        assert report is not None
        waits = [await events._send_one(kube, report) for _ in range(10)]
    assert waits[0] < 2 and 45 <= waits[-1] <= 75


@pytest.mark.parametrize(
    ("mood", "left"),
    [
        ((404, "NotFound"), 0),
        ((403, "Forbidden", "NamespaceTerminating"), 0),
        ((422, "Invalid"), 0),
        ((403, "Forbidden"), 1),
    ],
)
async def test_what_cannot_be_sent_does_not_hold_up_the_rest(
    api: ApiServer, metrics: Metrics, tmp_path: Path, mood: tuple[int, str], left: int
) -> None:
    api.mood(*mood)
    async with reporting(tmp_path, metrics, api) as events:
        events.pod_event(DESK, "doomed", "")
        events.pod_event(DESK, "fine", "")
        await api.until(events=1)
        await settled(events, left)
    assert [event["reason"] for event in api.events.values()] == ["Fine"]


async def test_an_event_that_expired_is_made_anew(
    api: ApiServer, metrics: Metrics, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ev, "REPEAT_S", 0.0)
    async with reporting(tmp_path, metrics, api) as events:
        events.pod_event(DESK, "again", "")
        await api.until(events=1)
        api.events.clear()
        events.pod_event(DESK, "again", "")
        await api.until(events=1)
    assert next(iter(api.events.values()))["count"] == 2


async def test_one_object_cannot_flood(api: ApiServer, metrics: Metrics, tmp_path: Path) -> None:
    now = 1000.0
    async with Outbox(tmp_path / box.NAME, metrics) as outbox, client(api, metrics) as kube:
        events = Events(outbox, "node-1", metrics, kube, now=lambda: now)
        for number in range(100):
            events.pod_event(DESK, "many", str(number))
        events.pod_event(PodRef("office", "desk-2", "other"), "many", "")
        assert events._waiting.qsize() == ev.BURST + 1
        assert sample(metrics, "nodeagent_dropped_total", queue="events") == 75
        now += ev.REFILL_S
        events.pod_event(DESK, "many", "later")
        assert events._waiting.qsize() == ev.BURST + 2
        for number in range(3 * ev.MAX_OBJECTS):
            events.pod_event(PodRef("office", f"p{number}", f"u{number}"), "many", "")
        assert events._waiting.qsize() == ev.MAX_WAITING and len(events._allowance) == ev.MAX_OBJECTS


def test_words() -> None:
    assert camel(Reason.NAMESPACE_NOT_ALLOWED) == "NamespaceNotAllowed"
    assert len(cut("ä" * 5000).encode()) <= ev.MAX_NOTE_BYTES and cut("short") == "short"


async def test_names_are_names_to_kubernetes(api: ApiServer, metrics: Metrics, tmp_path: Path) -> None:
    long = PodRef("office", "a" * 219 + "-" + "b" * 33, "u1")
    async with reporting(tmp_path, metrics, api) as events:
        events.pod_event(long, "long", "€" * 5000)
        await api.until(events=1)
    ((_, name),) = api.events
    assert len(name) <= 253 and "-." not in name


# ---- look-ups


def pod(uid: str, account: str = "artist") -> dict[str, Any]:
    return {"metadata": {"uid": uid}, "spec": {"serviceAccountName": account, "containers": [{"name": "x"}]}}


async def test_a_service_account_is_asked_for_once(api: ApiServer, metrics: Metrics) -> None:
    api.pods["office", "desk-1"] = pod(DESK.uid)
    async with client(api, metrics) as kube:
        assert [await kube.service_account(DESK) for _ in range(3)] == ["artist"] * 3
        await api.stop()
        assert await kube.service_account(DESK) == "artist", "it never changes for a pod"
    assert len(api.calls) == 1


async def test_the_account_of_another_pod_of_that_name_is_not_taken(api: ApiServer, metrics: Metrics) -> None:
    api.pods["office", "desk-1"] = pod("another")
    async with client(api, metrics) as kube:
        assert await kube.service_account(DESK) is None
        api.pods["office", "desk-1"] = pod(DESK.uid, "")
        assert await kube.service_account(DESK) == "default"


async def test_look_ups_do_not_wait_again_for_a_server_that_is_stuck(api: ApiServer, metrics: Metrics) -> None:
    now = 0.0
    api.pods["office", "desk-1"] = pod(DESK.uid)
    api.stuck = asyncio.Event()
    async with client(api, metrics, timeout_s=0.1, monotonic=lambda: now) as kube:
        assert await kube.service_account(DESK) is None
        assert kube.peer.state == "unreachable" and "does not answer within 0.1 s" in kube.peer.message
        assert await kube.service_account(DESK) is None
        assert len(api.calls) == 1
        api.stuck.set()
        now += 5
        assert await kube.service_account(DESK) == "artist"
        assert kube.peer.state == "connected"


@pytest.mark.parametrize("body", [b"<html>proxy</html>", b'{"metadata": 7}', b"[]", b""])
async def test_an_answer_that_is_no_pod(api: ApiServer, metrics: Metrics, body: bytes) -> None:
    async def strange(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\nConnection: close\r\n\r\n%s" % (len(body), body))
        writer.close()

    server = await asyncio.start_server(strange, "127.0.0.1", 0)
    async with server:
        port = server.sockets[0].getsockname()[1]
        async with client(api, metrics, endpoint=Endpoint(server=f"http://127.0.0.1:{port}")) as kube:
            assert await kube.service_account(DESK) is None


async def test_an_endless_answer_is_cut(api: ApiServer, metrics: Metrics, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nodeagent.report.kube.MAX_ANSWER_BYTES", 1000)
    api.pods["office", "desk-1"] = pod(DESK.uid) | {"status": "x" * 5000}
    async with client(api, metrics) as kube:
        assert await kube.service_account(DESK) is None
        assert "more than 1000 bytes" in kube.peer.message


async def test_a_rotated_token_is_read_again(api: ApiServer, metrics: Metrics, tmp_path: Path) -> None:
    now = 0.0
    token = tmp_path / "token"
    token.write_text("one\n")
    api.token = "one"
    api.pods["office", "desk-1"] = pod(DESK.uid)
    endpoint = Endpoint(server=api.url, token_file=str(token))
    async with client(api, metrics, endpoint=endpoint, monotonic=lambda: now) as kube:
        assert await kube.service_account(DESK) == "artist"
        token.write_text("two")
        api.token = "two"
        now += 61
        await kube.create_event("office", EVENT | {"metadata": {"name": "a-minute-later", "namespace": "office"}})
        assert len(api.calls) == 2
        token.write_text("three")
        api.token = "three"
        await kube.create_event("office", EVENT)
        assert len(api.calls) == 4, "a 401, and at once again with the new token"
        api.token = "four"
        with pytest.raises(ApiError) as refused:
            await kube.create_event("office", EVENT)
        assert refused.value.status == 401
        token.unlink()
        with pytest.raises(ApiError, match="token"):
            await kube.create_event("office", EVENT)


EVENT = {
    "apiVersion": "v1",
    "kind": "Event",
    "metadata": {"name": "e", "namespace": "office"},
    "involvedObject": {"namespace": "office"},
    "reason": "R",
    "message": "",
    "type": "Normal",
    "count": 1,
}


@pytest.mark.parametrize(
    ("header", "wait"),
    [
        ("", None),
        ("7", 7.0),
        ("0", 0.0),
        ("-3", None),
        ("soon", None),
        ("99999999999", 300.0),
        ("Thu, 01 Jan 1970 00:01:40 GMT", 40.0),
        ("Thu, 01 Jan 1970 00:00:40 GMT", 0.0),
    ],
)
def test_retry_after(header: str, wait: float | None) -> None:
    assert retry_after(header, 60.0) == wait


async def test_tls_with_a_client_certificate(metrics: Metrics, tmp_path: Path) -> None:
    for ca in ("ca", "stranger"):
        make_ca(tmp_path, ca)
    for name in ("server", "node"):
        issue(tmp_path, "ca", name)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "server.crt", tmp_path / "server.key")
    context.load_verify_locations(tmp_path / "ca.crt")
    context.verify_mode = ssl.CERT_REQUIRED

    def data(name: str) -> str:
        return base64.b64encode((tmp_path / name).read_bytes()).decode()

    user = {"client-certificate-data": data("node.crt"), "client-key-data": data("node.key")}
    async with ApiServer(context) as api:
        api.pods["office", "desk-1"] = pod(DESK.uid)
        for ca, account in (("ca", "artist"), ("stranger", None)):
            cluster = {"server": api.url, "certificate-authority-data": data(f"{ca}.crt")}
            endpoint = discover(KubernetesConfig(), kubeconfig(tmp_path / "k", cluster, user))
            async with client(api, metrics, endpoint=endpoint) as kube:
                assert await kube.service_account(DESK) == account, kube.peer
        assert len(api.calls) == 1


# ---- where the server is


def test_no_server_no_client(tmp_path: Path) -> None:
    assert discover(KubernetesConfig(), {}, tmp_path) is None
    assert discover(KubernetesConfig(), {"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, tmp_path) is None


def test_the_service_account_of_a_pod(tmp_path: Path) -> None:
    (tmp_path / "token").write_text("t")
    env = {"KUBERNETES_SERVICE_HOST": "fd00::1", "KUBERNETES_SERVICE_PORT": "443"}
    endpoint = discover(KubernetesConfig(), env, tmp_path)
    assert endpoint is not None and endpoint.server == "https://[fd00::1]:443" and endpoint.read_token() == "t"
    assert discover(KubernetesConfig(api="off"), env, tmp_path) is None


def kubeconfig(path: Path, cluster: dict[str, Any], user: dict[str, Any]) -> dict[str, str]:
    path.write_text(
        yaml.safe_dump(
            {
                "apiVersion": "v1",
                "kind": "Config",
                "current-context": "c",
                "contexts": [{"name": "c", "context": {"cluster": "k", "user": "u", "namespace": "x"}}],
                "clusters": [{"name": "k", "cluster": cluster}],
                "users": [{"name": "u", "user": user}],
            }
        )
    )
    return {"KUBECONFIG": f"{path}:/ignored"}


def test_a_kubeconfig(tmp_path: Path) -> None:
    env = kubeconfig(tmp_path / "k", {"server": "https://a:1/", "certificate-authority": "ca.crt"}, {"tokenFile": "t"})
    endpoint = discover(KubernetesConfig(), env, tmp_path)
    assert endpoint == Endpoint(server="https://a:1", ca_file=str(tmp_path / "ca.crt"), token_file=str(tmp_path / "t"))


@pytest.mark.parametrize(
    ("cluster", "user", "said"),
    [
        ({}, {}, "server"),
        ({"server": "ftp://x"}, {}, "not a URL"),
        ({"server": "https://x", "insecure-skip-tls-verify": True}, {}, "insecure"),
        ({"server": "https://x"}, {"exec": {"command": "aws"}}, "from a program"),
        ({"server": "https://x", "certificate-authority-data": "?"}, {}, "base64"),
    ],
)
def test_a_kubeconfig_that_cannot_be_used(
    tmp_path: Path, cluster: dict[str, Any], user: dict[str, Any], said: str
) -> None:
    with pytest.raises(ConfigError, match=said) as refused:
        discover(KubernetesConfig(), kubeconfig(tmp_path / "k", cluster, user), tmp_path)
    assert refused.value.message.startswith(f"KUBECONFIG {tmp_path}/k")


def test_a_kubeconfig_that_is_absent_or_no_yaml(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        discover(KubernetesConfig(), {"KUBECONFIG": "/nonexistent"}, tmp_path)
    (tmp_path / "k").write_text("{")
    with pytest.raises(ConfigError):
        discover(KubernetesConfig(), {"KUBECONFIG": str(tmp_path / "k")}, tmp_path)
