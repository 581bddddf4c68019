"""A Kubernetes API server as far as Events, pods, evictions and nodes go: over real HTTP, with the moods of a real one.

async with ApiServer() as api: ...      # api.url, api.events, api.pods, api.token
await api.stop(); await api.start()      # away, and back on the same port
"""

from __future__ import annotations

import asyncio
import ssl
from collections import deque
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self

from aiohttp import web

Mood = tuple[int, dict[str, Any], dict[str, str]]


class ApiServer:
    def __init__(self, context: ssl.SSLContext | None = None) -> None:
        self.events: dict[tuple[str, str], dict[str, Any]] = {}
        """(namespace, name) -> Event, as stored."""
        self.pods: dict[tuple[str, str], dict[str, Any]] = {}
        self.budgets: set[tuple[str, str]] = set()
        """Pods that a disruption budget keeps."""
        self.evicted: list[tuple[str, str, str]] = []
        """(namespace, name, uid); an evicted pod is gone from `pods` at once."""
        self.nodes: dict[str, dict[str, Any]] = {}
        self.rivals: deque[Callable[[dict[str, Any]], None]] = deque()
        """Somebody else who writes a node, one after each time it is read."""
        self.gone: set[str] = set()
        """Namespaces that do not exist."""
        self.token = ""
        """The only bearer token that is let in; empty lets everybody in."""
        self.moods: deque[Mood] = deque()
        """What the next requests are answered with instead."""
        self.stuck: asyncio.Event | None = None
        """While set to an event, requests wait for it."""
        self.calls: list[tuple[str, str]] = []
        self.changed = asyncio.Condition()
        self._context = context
        self._port = 0
        self._runner: web.AppRunner | None = None

    @property
    def url(self) -> str:
        return f"{'https' if self._context else 'http'}://127.0.0.1:{self._port}"

    def mood(self, status: int, reason: str = "", *causes: str, times: int = 1, **headers: str) -> None:
        """Answer the next requests with a Status object."""
        body = {
            "kind": "Status",
            "reason": reason,
            "message": f"the server says {reason or status}",
            "details": {"causes": [{"reason": cause} for cause in causes]},
        }
        self.moods.extend([(status, body, {name.replace("_", "-"): value for name, value in headers.items()})] * times)

    async def until(self, *, events: int | None = None, calls: int | None = None) -> None:
        """Wait until so many Events are stored, or so many calls were made."""

        def enough() -> bool:
            return (events is None or len(self.events) >= events) and (calls is None or len(self.calls) >= calls)

        async with asyncio.timeout(5), self.changed:
            await self.changed.wait_for(enough)

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.stop()

    async def start(self) -> None:
        application = web.Application(middlewares=[self._gate])
        application.router.add_post("/api/v1/namespaces/{namespace}/events", self._create)
        application.router.add_patch("/api/v1/namespaces/{namespace}/events/{name}", self._patch)
        application.router.add_get("/api/v1/namespaces/{namespace}/pods/{name}", self._pod)
        application.router.add_post("/api/v1/namespaces/{namespace}/pods/{name}/eviction", self._evict)
        application.router.add_get("/api/v1/nodes/{name}", self._node)
        application.router.add_patch("/api/v1/nodes/{name}", self._patch_node)
        self._runner = web.AppRunner(application, handle_signals=False, access_log=None, shutdown_timeout=0.1)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", self._port, ssl_context=self._context)
        await site.start()
        self._port = site.port

    async def stop(self) -> None:
        if self._runner is not None:
            await self._runner.cleanup()
            self._runner = None

    @web.middleware
    async def _gate(self, request: web.Request, handler: Any) -> web.StreamResponse:
        async with self.changed:
            self.calls.append((request.method, request.path))
            self.changed.notify_all()
        if self.stuck is not None:
            await self.stuck.wait()
        if self.token and request.headers.get("Authorization") != f"Bearer {self.token}":
            return _status(401, "Unauthorized")
        if self.moods:
            status, body, headers = self.moods.popleft()
            return web.json_response(body, status=status, headers=headers)
        response: web.StreamResponse = await handler(request)
        async with self.changed:
            self.changed.notify_all()
        return response

    async def _create(self, request: web.Request) -> web.Response:
        """The checks of the real one (pkg/apis/core/validation/events.go, legacy Events)."""
        event, namespace = await request.json(), request.match_info["namespace"]
        about, meta = event["involvedObject"], event["metadata"]
        if namespace in self.gone:
            return _status(404, "NotFound")
        problems = [
            problem
            for problem, wrong in {
                "kind": (event["apiVersion"], event["kind"]) != ("v1", "Event"),
                "namespace": meta["namespace"] != namespace or (about.get("namespace") or "default") != namespace,
                "name": not meta["name"] or len(meta["name"]) > 253 or meta["name"] != meta["name"].lower(),
                "reason": not event["reason"].isalnum() or len(event["reason"]) > 128,
                "note": len(event["message"].encode()) > 1024,
                "type": event["type"] not in ("Normal", "Warning"),
                "count": event["count"] < 1,
            }.items()
            if wrong
        ]
        if problems:
            return _status(422, "Invalid", *problems)
        if (namespace, meta["name"]) in self.events:
            return _status(409, "AlreadyExists")
        self.events[namespace, meta["name"]] = event
        return web.json_response(event, status=201)

    async def _patch(self, request: web.Request) -> web.Response:
        key = request.match_info["namespace"], request.match_info["name"]
        if request.content_type != "application/merge-patch+json":
            return _status(415, "UnsupportedMediaType")
        if key not in self.events:
            return _status(404, "NotFound")
        self.events[key] |= await request.json()
        return web.json_response(self.events[key])

    async def _pod(self, request: web.Request) -> web.Response:
        pod = self.pods.get((request.match_info["namespace"], request.match_info["name"]))
        return web.json_response(pod) if pod else _status(404, "NotFound")

    async def _evict(self, request: web.Request) -> web.Response:
        """As pkg/registry/core/pod/storage/eviction.go answers."""
        key = request.match_info["namespace"], request.match_info["name"]
        eviction = await request.json()
        if (eviction["apiVersion"], eviction["kind"]) != ("policy/v1", "Eviction") or (
            (eviction["metadata"]["namespace"], eviction["metadata"]["name"]) != key
        ):
            return _status(400, "BadRequest")
        if key not in self.pods:
            return _status(404, "NotFound")
        uid = self.pods[key]["metadata"]["uid"]
        if eviction.get("deleteOptions", {}).get("preconditions", {}).get("uid", uid) != uid:
            return _status(409, "Conflict")
        if key in self.budgets:
            return _status(429, "TooManyRequests", "DisruptionBudget")
        del self.pods[key]
        self.evicted.append((*key, uid))
        return web.json_response({"kind": "Status", "status": "Success"}, status=201)

    def add_node(self, name: str, **labels: str) -> dict[str, Any]:
        """A node as the API server shows it, without the parts that nobody here reads."""
        node = {"kind": "Node", "metadata": {"name": name, "resourceVersion": "1", "labels": labels}, "spec": {}}
        self.nodes[name] = node
        return node

    async def _node(self, request: web.Request) -> web.Response:
        node = self.nodes.get(request.match_info["name"])
        if node is None:
            return _status(404, "NotFound")
        answer = web.json_response(node)
        if self.rivals:
            self.rivals.popleft()(node)
            _written(node)
        return answer

    async def _patch_node(self, request: web.Request) -> web.Response:
        node = self.nodes.get(request.match_info["name"])
        if request.content_type != "application/merge-patch+json":
            return _status(415, "UnsupportedMediaType")
        if node is None:
            return _status(404, "NotFound")
        change = await request.json()
        if change.get("metadata", {}).get("resourceVersion", "") not in ("", node["metadata"]["resourceVersion"]):
            return _status(409, "Conflict")
        _merge(node, change)
        _written(node)
        return web.json_response(node)


def _written(node: dict[str, Any]) -> None:
    node["metadata"]["resourceVersion"] = str(int(node["metadata"]["resourceVersion"]) + 1)


def _merge(target: dict[str, Any], change: dict[str, Any]) -> None:
    """A JSON merge patch (RFC 7386): null removes, lists are replaced."""
    for key, value in change.items():
        if value is None:
            target.pop(key, None)
        elif isinstance(value, dict):
            _merge(target.setdefault(key, {}), value)
        else:
            target[key] = value


def _status(code: int, reason: str, *causes: str) -> web.Response:
    body = {
        "kind": "Status",
        "reason": reason,
        "message": reason,
        "details": {"causes": [{"reason": c} for c in causes]},
    }
    return web.json_response(body, status=code)
