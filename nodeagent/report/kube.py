"""The API server, as far as the agent needs it: Events, a pod's service account, evictions, the marks of its own node.

Plain HTTP over aiohttp, which the daemon has loaded anyway: the official client's typed API costs another 45 MiB, half of
what the whole daemon may use (docs/decisions/0005-api-client.md). The token is read again every minute, since projected
tokens rotate (the kubelet renews them at 80 % of their life), and at once after a 401.
"""

from __future__ import annotations

import asyncio
import logging
import ssl
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from contextlib import suppress
from email.utils import parsedate_to_datetime
from types import TracebackType
from typing import Any, Self
from urllib.parse import quote

import aiohttp
import msgspec

from nodeagent.documents import Peer
from nodeagent.errors import AgentError, Reason
from nodeagent.marks import Taint
from nodeagent.metrics import Metrics
from nodeagent.model import PodRef
from nodeagent.report.endpoint import Endpoint

log = logging.getLogger(__name__)

TIMEOUT_S = 10.0
CONNECT_TIMEOUT_S = 3.0
TOKEN_AGE_S = 60.0
MAX_ANSWER_BYTES = 4 << 20
"""Above etcd's limit of 1.5 MiB per object."""
MAX_ACCOUNTS = 4096
MAX_RETRY_AFTER_S = 300.0
QUIET_S = 5.0
"""After the server did not answer, look-ups say `unknown` at once for so long: a seat waits for them."""
MERGE_PATCH = "application/merge-patch+json"
BUDGET = "DisruptionBudget"
"""The cause of a 429 that is an answer about a pod and not the server's load (policy/v1 DisruptionBudgetCause)."""


class ApiError(AgentError):
    """The API server refused or did not answer. `status` is the HTTP status, 0 without an answer.

    `word` is the `reason` of its Status object (`AlreadyExists`), `causes` the reasons in its details.
    """

    def __init__(
        self,
        message: str,
        *,
        status: int = 0,
        word: str = "",
        causes: tuple[str, ...] = (),
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(Reason.UPSTREAM_UNAVAILABLE, message)
        self.status = status
        self.word = word
        self.causes = causes
        self.retry_after_s = retry_after_s


class _Cause(msgspec.Struct, frozen=True):
    reason: str = ""


class _Details(msgspec.Struct, frozen=True):
    causes: tuple[_Cause, ...] | None = None


class _Status(msgspec.Struct, frozen=True):
    """metav1.Status, as much as decides what to do next."""

    message: str = ""
    reason: str = ""
    details: _Details | None = None


class _Metadata(msgspec.Struct, frozen=True):
    uid: str = ""


class _PodSpec(msgspec.Struct, frozen=True):
    serviceAccountName: str = ""


class _Pod(msgspec.Struct, frozen=True):
    metadata: _Metadata
    spec: _PodSpec = _PodSpec()


class _SeenTaint(msgspec.Struct, frozen=True):
    key: str
    effect: str
    value: str = ""


class _NodeMetadata(msgspec.Struct, frozen=True):
    resourceVersion: str
    labels: dict[str, str] = {}


class _NodeSpec(msgspec.Struct, frozen=True):
    taints: tuple[msgspec.Raw, ...] = ()


class _Node(msgspec.Struct, frozen=True):
    metadata: _NodeMetadata
    spec: _NodeSpec = _NodeSpec()


class NodeTaint(msgspec.Struct, frozen=True):
    """A taint that a node has. `raw` is all of it as the server wrote it, so that what we do not know stays in it."""

    taint: Taint
    raw: msgspec.Raw


class NodeState(msgspec.Struct, frozen=True):
    """What the scheduler goes by, and the version of the Node object that said so."""

    resource_version: str
    taints: tuple[NodeTaint, ...]
    labels: dict[str, str]


class KubeClient:
    """`async with KubeClient(endpoint, metrics) as api`. Every method raises ApiError, and nothing else, for the server."""

    def __init__(
        self,
        endpoint: Endpoint,
        metrics: Metrics,
        *,
        timeout_s: float = TIMEOUT_S,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._endpoint = endpoint
        self._metrics = metrics
        self._timeout_s = timeout_s
        self._monotonic = monotonic
        self._session: aiohttp.ClientSession | None = None
        self._token = ""
        self._token_read: float | None = None
        self._accounts: OrderedDict[str, str] = OrderedDict()
        self._quiet_until = float("-inf")
        self._peer = Peer(name="API server", state="starting", message=endpoint.server)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._hang_up()

    @property
    def peer(self) -> Peer:
        """What the last call told."""
        return self._peer

    async def create_event(self, namespace: str, event: Mapping[str, Any]) -> None:
        await self._call("POST", f"/api/v1/namespaces/{quote(namespace, safe='')}/events", event)

    async def patch_event(self, namespace: str, name: str, change: Mapping[str, Any]) -> None:
        path = f"/api/v1/namespaces/{quote(namespace, safe='')}/events/{quote(name, safe='')}"
        await self._call("PATCH", path, change, MERGE_PATCH)

    async def evict(self, pod: PodRef) -> bool:
        """Ask for the end of exactly this pod; False when it is gone already, or another pod has its name now.

        Raises ApiError; its status is 429 when a disruption budget or the server's load does not allow it now.
        """
        path = f"/api/v1/namespaces/{quote(pod.namespace, safe='')}/pods/{quote(pod.name, safe='')}/eviction"
        eviction = {
            "apiVersion": "policy/v1",
            "kind": "Eviction",
            "metadata": {"name": pod.name, "namespace": pod.namespace},
            "deleteOptions": {"preconditions": {"uid": pod.uid}},
        }
        try:
            await self._call("POST", path, eviction)
        except ApiError as error:
            # 409 Conflict: the precondition does not hold (registry/rest: "UID in precondition ... UID in object meta").
            if error.status in (404, 409):
                return False
            raise
        return True

    async def node(self, name: str) -> NodeState:
        """Taints and labels of a node. Raises ApiError."""
        data = await self._call("GET", f"/api/v1/nodes/{quote(name, safe='')}")
        try:
            node = msgspec.json.decode(data, type=_Node)
            taints = tuple(
                NodeTaint(Taint(seen.key, seen.effect, seen.value), raw)
                for raw in node.spec.taints
                for seen in [msgspec.json.decode(raw, type=_SeenTaint)]
            )
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise ApiError(f"API server {self._endpoint.server}: node {name}: not a Node: {error}") from error
        return NodeState(node.metadata.resourceVersion, taints, node.metadata.labels)

    async def patch_node(self, name: str, change: Mapping[str, Any]) -> None:
        """Change a node by a JSON merge patch. Raises ApiError, with status 409 if `change` names an older version."""
        await self._call("PATCH", f"/api/v1/nodes/{quote(name, safe='')}", change, MERGE_PATCH)

    async def service_account(self, pod: PodRef) -> str | None:
        """The service account of exactly this pod (same uid), or None when that cannot be learned now.

        It never changes for a pod, so one answer per uid is enough.
        """
        if pod.uid in self._accounts:
            self._accounts.move_to_end(pod.uid)
            return self._accounts[pod.uid]
        if self._monotonic() < self._quiet_until:
            return None
        path = f"/api/v1/namespaces/{quote(pod.namespace, safe='')}/pods/{quote(pod.name, safe='')}"
        try:
            answer = msgspec.json.decode(await self._call("GET", path), type=_Pod)
        except ApiError as error:
            if error.status in (0, 429) or error.status >= 500:
                self._quiet_until = self._monotonic() + QUIET_S
            log.warning("the service account of pod %s cannot be looked up: %s", pod, error)
            return None
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            log.warning("the API server's answer about pod %s is not a Pod: %s", pod, error)
            return None
        if answer.metadata.uid != pod.uid:
            log.warning("pod %s of the API server has another uid than the one on this node", pod)
            return None
        account = answer.spec.serviceAccountName or "default"
        self._accounts[pod.uid] = account
        if len(self._accounts) > MAX_ACCOUNTS:
            self._accounts.popitem(last=False)
        return account

    # ---- one call

    async def _call(
        self, method: str, path: str, body: Mapping[str, Any] | None = None, kind: str = "application/json"
    ) -> bytes:
        try:
            status, data, headers = await self._exchange(method, path, body, kind)
            if status == 401:
                self._token_read = None
                status, data, headers = await self._exchange(method, path, body, kind)
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            # What it trusts and who it is are read anew for the next call: certificates rotate too.
            await self._hang_up()
            what = f"does not answer within {self._timeout_s:g} s" if isinstance(error, TimeoutError) else str(error)
            failure = ApiError(f"API server {self._endpoint.server}: {what}")
            self._saw(False, failure.message)
            raise failure from error
        if status < 300:
            self._saw(True)
            return data
        failure = _refusal(f"API server {self._endpoint.server}: {method} {path}", status, data, headers)
        self._saw(status in (403, 404, 409, 422) or BUDGET in failure.causes, failure.message)
        raise failure

    async def _exchange(
        self, method: str, path: str, body: Mapping[str, Any] | None, kind: str
    ) -> tuple[int, bytes, Mapping[str, str]]:
        session = await self._connected()
        headers = {"Accept": "application/json", "User-Agent": "nodeagent"}
        if token := await self._current_token():
            headers["Authorization"] = f"Bearer {token}"
        content = None
        if body is not None:
            content = msgspec.json.encode(body)
            headers["Content-Type"] = kind
        async with session.request(
            method, self._endpoint.server + path, data=content, headers=headers, allow_redirects=False
        ) as response:
            data = bytearray()
            async for chunk in response.content.iter_chunked(64 * 1024):
                data += chunk
                if len(data) > MAX_ANSWER_BYTES:
                    raise aiohttp.ClientPayloadError(f"an answer of more than {MAX_ANSWER_BYTES} bytes")
            return response.status, bytes(data), response.headers

    async def _connected(self) -> aiohttp.ClientSession:
        if self._session is None:
            context: ssl.SSLContext | bool = True
            if self._endpoint.server.startswith("https:"):
                context = await asyncio.to_thread(self._endpoint.ssl_context)
            self._session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=4, ssl=context),
                timeout=aiohttp.ClientTimeout(total=self._timeout_s, connect=CONNECT_TIMEOUT_S),
                cookie_jar=aiohttp.DummyCookieJar(),
                auto_decompress=True,
                trust_env=False,
            )
        return self._session

    async def _hang_up(self) -> None:
        session, self._session = self._session, None
        if session is not None:
            await session.close()

    async def _current_token(self) -> str:
        now = self._monotonic()
        if self._token_read is None or now - self._token_read >= TOKEN_AGE_S:
            self._token = await asyncio.to_thread(self._endpoint.read_token)
            self._token_read = now
        return self._token

    def _saw(self, connected: bool, message: str = "") -> None:
        self._metrics.apiserver_connected.set(1 if connected else 0)
        state = "connected" if connected else "unreachable"
        since_s = self._peer.since_s if self._peer.state == state else time.time()
        self._peer = Peer(
            name="API server",
            state="connected" if connected else "unreachable",
            since_s=since_s,
            message=message or self._endpoint.server,
        )


def _refusal(what: str, status: int, untrusted_data: bytes, headers: Mapping[str, str]) -> ApiError:
    try:
        told = msgspec.json.decode(untrusted_data, type=_Status)
    except (msgspec.DecodeError, UnicodeDecodeError):
        told = _Status()  # a proxy's error page
    causes = tuple(cause.reason for cause in told.details.causes or ()) if told.details else ()
    return ApiError(
        f"{what}: {status} {told.message[:300] or told.reason[:60]}".rstrip(),
        status=status,
        word=told.reason,
        causes=causes,
        retry_after_s=retry_after(headers.get("Retry-After", ""), time.time()),
    )


def retry_after(untrusted_value: str, now_s: float) -> float | None:
    """Seconds to wait by a Retry-After header (RFC 9110 10.2.3: seconds or a date), at most MAX_RETRY_AFTER_S."""
    wait: float | None = None
    if untrusted_value.isascii() and untrusted_value.isdigit():
        wait = float(untrusted_value[:6])
    elif untrusted_value:
        with suppress(ValueError, OverflowError):
            wait = parsedate_to_datetime(untrusted_value).timestamp() - now_s
    return None if wait is None else min(max(wait, 0.0), MAX_RETRY_AFTER_S)
