"""HTTP: metrics for Prometheus, health for the kubelet, and the JSON of the command line under /api/v1.

    /metrics  /healthz  /readyz  /api/v1/{status,devices,seats}

Reading only. With `http.auth: mtls` everything but the two health pages wants a client certificate of `client_ca`; the
kubelet's probes have none, and get to see no more than yes or no.
"""

from __future__ import annotations

import asyncio
import gzip
from collections.abc import Awaitable, Callable

import msgspec
from aiohttp import hdrs, web
from prometheus_client.exposition import choose_encoder

from nodeagent import __version__, logs
from nodeagent.config import HttpConfig
from nodeagent.documents import Documents, StatusDocument
from nodeagent.errors import ConfigError
from nodeagent.metrics import Metrics
from nodeagent.web import listener, process

log = logs.logger(__name__)

VERBS = ("status", "devices", "seats")
HEALTH = ("/healthz", "/readyz")
RESPONSE_S = 10.0
"""A client that does not take its answer in this time loses its connection."""
WORTH_GZIP_BYTES = 1024
_HEADERS = {hdrs.CACHE_CONTROL: "no-store", "X-Content-Type-Options": "nosniff", hdrs.SERVER: "nodeagent"}
_Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Web:
    """The HTTP side of a daemon: what `documents` and `metrics` say, on the address of `http`."""

    def __init__(
        self,
        http: HttpConfig,
        metrics: Metrics,
        documents: Documents,
        *,
        retry_s: float = listener.RETRY_S,
        max_connections: int = listener.MAX_CONNECTIONS,
    ) -> None:
        self._http = http
        self._documents = documents
        self._metrics = metrics
        self._retry_s = retry_s
        self._max_connections = max_connections
        self.address: tuple[str, int] | None = None
        """Where it listens now; port 0 in the configuration becomes the real one here."""
        self.listening = asyncio.Event()

    async def run(self) -> None:
        """Serve until cancelled. A port in use and TLS files that cannot be used (a secret may be
        mounted late) are logged and tried again every second: without metrics the desktops still have their devices."""
        http = self._http
        if not http.listen:
            await asyncio.Event().wait()
        while True:
            async with listener.bound(http.listen, self._retry_s) as sockets:
                self.address = sockets[0].getsockname()[:2]
                log.info("http on %s", " ".join(str(sock.getsockname()[:2]) for sock in sockets))
                self.listening.set()
                try:
                    await listener.Listener(self._application(), http, max_connections=self._max_connections).run(
                        sockets
                    )
                except ConfigError as error:
                    log.error("http is not served: %s", error)
                finally:
                    self.listening.clear()
                    self.address = None
            await asyncio.sleep(self._retry_s)

    def _application(self) -> web.Application:
        application = web.Application(
            middlewares=[_sent_in_time, _certified] if self._http.auth == "mtls" else [_sent_in_time]
        )
        application.router.add_get("/", self._index)
        application.router.add_get("/metrics", self._exposition)
        application.router.add_get("/healthz", self._healthz)
        application.router.add_get("/readyz", self._readyz)
        for verb in VERBS:
            application.router.add_get(f"/api/v1/{verb}", self._document)
        return application

    def _status(self) -> StatusDocument:
        status = self._documents.document("status")
        assert isinstance(status, StatusDocument)
        return status

    async def _index(self, request: web.Request) -> web.Response:
        pages = ["/metrics", *HEALTH, *(f"/api/v1/{verb}" for verb in VERBS)]
        return web.Response(text="\n".join([f"nodeagent {__version__}", "", *pages, ""]))

    async def _healthz(self, request: web.Request) -> web.Response:
        return web.Response(text="ok\n")

    async def _readyz(self, request: web.Request) -> web.Response:
        status = self._status()
        told: dict[str, object] = {"ready": status.ready}
        if not status.ready and not _anonymous(request):
            told["reasons"] = list(status.not_ready)
        return web.json_response(told, status=200 if status.ready else 503, dumps=_dumps)

    async def _document(self, request: web.Request) -> web.StreamResponse:
        document = self._documents.document(request.path.rpartition("/")[2])
        return await _compressed(request, msgspec.json.encode(document), "application/json")

    async def _exposition(self, request: web.Request) -> web.StreamResponse:
        for measure in self._metrics.on_scrape:
            measure()
        outbox = self._status().outbox
        self._metrics.outbox_length.set(outbox.length)
        self._metrics.outbox_oldest.set(outbox.oldest_s)
        self._metrics.self_rss.set(process.rss_bytes())
        self._metrics.self_open_fds.set(process.open_fds())
        encode, kind = choose_encoder(request.headers.get(hdrs.ACCEPT, ""))
        return await _compressed(request, encode(self._metrics.registry), kind)


def _dumps(value: object) -> str:
    return msgspec.json.encode(value).decode()


async def _compressed(request: web.Request, body: bytes, kind: str) -> web.StreamResponse:
    headers = {hdrs.CONTENT_TYPE: kind, hdrs.VARY: hdrs.ACCEPT_ENCODING}
    if len(body) >= WORTH_GZIP_BYTES and accepts_gzip(request.headers.get(hdrs.ACCEPT_ENCODING, "")):
        body = await asyncio.to_thread(gzip.compress, body, 5)
        headers[hdrs.CONTENT_ENCODING] = "gzip"
    return web.Response(body=body, headers=headers)


def accepts_gzip(header: str) -> bool:
    """Whether Accept-Encoding names gzip (or everything) without a weight of zero (RFC 9110 12.5.3)."""
    weights = {}
    for choice in header.lower().split(","):
        name, _, weight = choice.partition(";")
        weights[name.strip()] = weight.replace(" ", "") not in ("q=0", "q=0.0", "q=0.00", "q=0.000")
    return weights.get("gzip", weights.get("*", False))


def _anonymous(request: web.Request) -> bool:
    """TLS clients are asked for a certificate, and this one showed none."""
    tls = request.transport.get_extra_info("ssl_object") if request.transport else None
    return tls is not None and bool(tls.context.verify_mode) and not tls.getpeercert()


@web.middleware
async def _certified(request: web.Request, handler: _Handler) -> web.StreamResponse:
    if request.path not in HEALTH and _anonymous(request):
        raise web.HTTPUnauthorized(text="a client certificate is needed here (http.auth: mtls)\n")
    return await handler(request)


@web.middleware
async def _sent_in_time(request: web.Request, handler: _Handler) -> web.StreamResponse:
    """Send the answer here, where its time can be limited: a client that reads nothing would hold its task for ever."""
    response: web.StreamResponse = web.Response(status=503)
    try:
        async with asyncio.timeout(RESPONSE_S):
            response = await _answered(request, handler)
            response.headers.update(_HEADERS)
            await response.prepare(request)
            await response.write_eof()
    except TimeoutError:
        listener.reset(request.transport)
    except ConnectionError:
        pass  # the client has gone; aiohttp finds out when it looks at the response
    return response


async def _answered(request: web.Request, handler: _Handler) -> web.StreamResponse:
    try:
        return await handler(request)
    except web.HTTPException as refusal:
        return web.Response(
            status=refusal.status, text=refusal.text, headers=_allow(refusal), content_type="text/plain"
        )
    except (ConnectionError, TimeoutError):
        raise
    except Exception:
        log.exception("%s %s could not be answered", request.method, request.path)
        return web.Response(status=500, text="an internal error, which is in the daemon's log\n")


def _allow(refusal: web.HTTPException) -> dict[str, str]:
    return {hdrs.ALLOW: refusal.headers[hdrs.ALLOW]} if hdrs.ALLOW in refusal.headers else {}
