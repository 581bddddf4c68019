"""A bounded HTTP server on one address: aiohttp's protocol behind an accept loop of our own.

aiohttp accepts without limit and holds a certificate for the life of the server. Here at most `MAX_CONNECTIONS` are
open; a new one closes the oldest, so that a client that hoards connections cannot keep the kubelet's probes out. TLS
files are looked at before they are used, and a renewed certificate is served from the next connection on.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import socket
import ssl
import struct
from collections.abc import AsyncIterator
from pathlib import Path

from aiohttp import web

from nodeagent import logs
from nodeagent.config import HttpConfig, TlsConfig
from nodeagent.errors import ConfigError

log = logs.logger(__name__)

MAX_CONNECTIONS = 64
MAX_HANDSHAKES = 32
HANDSHAKE_S = 5.0
IDLE_S = 15.0
"""A connection without a whole request for so long is closed."""
MAX_HEADER_BYTES = 8190
RETRY_S = 1.0
CERTIFICATE_LOOK_S = 5.0

_CLIENTS_FAULT = (errno.ECONNABORTED, errno.EPROTO, errno.EPERM)
"""What accept(2) says of a connection that has ended already or that a firewall forbids."""


class Certificates:
    """The TLS context of the files as they are now. A renewal that cannot be used leaves the old one in place."""

    def __init__(self, tls: TlsConfig, *, ask: bool) -> None:
        self._tls = tls
        self._ask = ask
        """Ask clients for a certificate of `client_ca`."""
        self._stamp: tuple[object, ...] = ()
        self._looked = float("-inf")
        self._context: ssl.SSLContext | None = None

    async def current(self) -> ssl.SSLContext | None:
        """None: plain HTTP. Raises ConfigError when there never was a usable certificate."""
        if not self._tls.cert:
            return None
        now = asyncio.get_running_loop().time()
        if self._context is None or now - self._looked >= CERTIFICATE_LOOK_S:
            self._looked = now
            await asyncio.to_thread(self._look)
        return self._context

    def _look(self) -> None:
        files = [Path(name) for name in (self._tls.cert, self._tls.key, self._tls.client_ca) if name]
        try:
            stamp = tuple((s.st_mtime_ns, s.st_ino, s.st_size) for s in (file.stat() for file in files))
            if self._context is not None and stamp == self._stamp:
                return
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.minimum_version = ssl.TLSVersion.TLSv1_2
            context.load_cert_chain(self._tls.cert, self._tls.key, password=_no_password)
            if self._ask:
                context.load_verify_locations(self._tls.client_ca)
                # Optional in the handshake, asked for by path: the kubelet's probes have no certificate to show.
                context.verify_mode = ssl.CERT_OPTIONAL
        except (OSError, ValueError) as error:
            problem = f"http.tls: {', '.join(map(str, files))}: {error}"
            if self._context is None:
                raise ConfigError(problem, hint="PEM files that belong together, the key without a password") from error
            log.warning("the renewed certificate is not used: %s", problem)
            return
        self._context, self._stamp = context, stamp


def _no_password() -> str:
    raise ValueError("the key has a password")


async def bind(listen: str) -> list[socket.socket]:
    """Listening sockets for `host:port`, one per address of the host. Raises OSError."""
    host, _, port = listen.rpartition(":")
    loop = asyncio.get_running_loop()
    found = await loop.getaddrinfo(
        host.strip("[]"), int(port), type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE | socket.AI_NUMERICSERV
    )
    sockets: list[socket.socket] = []
    try:
        for family, kind, protocol, _, address in dict.fromkeys(found):
            sock = socket.socket(family, kind | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC, protocol)
            sockets.append(sock)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, int(host != "[::]"))
            sock.bind(address)
            sock.listen(MAX_CONNECTIONS)
    except BaseException:
        for sock in sockets:
            sock.close()
        raise
    return sockets


@contextlib.asynccontextmanager
async def bound(listen: str, retry_s: float = RETRY_S) -> AsyncIterator[list[socket.socket]]:
    """Sockets for `listen`, as soon as they can be had: during a hand-over the other daemon still has the port."""
    said = ""
    while True:
        try:
            sockets = await bind(listen)
            break
        except OSError as error:
            if said != str(error):
                said = str(error)
                log.warning("http.listen %s: %s; trying again every %g s", listen, error.strerror or error, retry_s)
            await asyncio.sleep(retry_s)
    try:
        yield sockets
    finally:
        for sock in sockets:
            sock.close()


def reset(transport: asyncio.BaseTransport | None) -> None:
    """End a connection at once, with what still waits to be sent: the kernel would keep that for a client that reads
    nothing (SO_LINGER with 0 seconds, socket(7))."""
    if isinstance(transport, asyncio.Transport):
        with contextlib.suppress(OSError):
            sock = transport.get_extra_info("socket")
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        transport.abort()


class Listener:
    """Serves an application on listening sockets until cancelled."""

    def __init__(
        self, application: web.Application, http: HttpConfig, *, max_connections: int = MAX_CONNECTIONS
    ) -> None:
        self._certificates = Certificates(http.tls, ask=http.auth == "mtls")
        self._max_connections = max_connections
        self._handshakes = 0
        self._runner = web.AppRunner(
            application,
            handle_signals=False,
            access_log=None,
            keepalive_timeout=IDLE_S,
            lingering_time=1.0,
            max_line_size=MAX_HEADER_BYTES,
            max_field_size=MAX_HEADER_BYTES,
            shutdown_timeout=1.0,
        )

    async def run(self, sockets: list[socket.socket]) -> None:
        """Accept until cancelled. Raises ConfigError when TLS is asked for and its files cannot be used."""
        await self._certificates.current()
        await self._runner.setup()
        try:
            async with asyncio.TaskGroup() as tasks:
                for sock in sockets:
                    tasks.create_task(self._accept(sock, tasks))
        finally:
            await self._runner.cleanup()

    async def _accept(self, listening: socket.socket, tasks: asyncio.TaskGroup) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                sock, _ = await loop.sock_accept(listening)
            except OSError as error:
                if error.errno not in _CLIENTS_FAULT:
                    log.warning("no HTTP connection can be accepted: %s", error.strerror)
                    await asyncio.sleep(RETRY_S)
                continue
            if self._handshakes >= MAX_HANDSHAKES:
                sock.close()
                continue
            self._handshakes += 1
            tasks.create_task(self._begin(sock))

    async def _begin(self, sock: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        server = self._runner.server
        assert server is not None
        try:
            context = await self._certificates.current()
            while len(server.connections) >= self._max_connections:
                oldest = server.connections[0]
                if oldest.transport is None:
                    break
                reset(oldest.transport)
                await asyncio.sleep(0)
            await loop.connect_accepted_socket(
                server, sock, ssl=context, ssl_handshake_timeout=HANDSHAKE_S if context else None
            )
        except (OSError, ConfigError) as error:  # ssl.SSLError and a handshake that takes too long are OSErrors
            log.debug("an HTTP connection came to nothing: %s", error)
            sock.close()
        except BaseException:
            sock.close()
            raise
        finally:
            self._handshakes -= 1
