"""The control socket: what the command line asks a running daemon (`nodeagent.v1.Agent`, see proto/).

gRPC treats a Unix socket's path as its own: binding unlinks a socket that another process serves, and closing unlinks
whatever is at the path by then (both seen with grpcio 1.85). With two daemons on a node during a hand-over each would
take the other's away. So the server binds in a private directory, and the socket is renamed to its public name only
when nobody answers there, or when this daemon is the active one (`claim()`); on leaving, the name is removed only
while it still is ours.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import socket
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any, TypeVar

import grpc
import grpc.aio
import msgspec

from nodeagent import logs, rpc
from nodeagent.documents import Document, Documents
from nodeagent.errors import AgentError, Reason
from nodeagent.wire.pb.nodeagent.v1 import agent_pb2

log = logs.logger(__name__)

SERVICE = "nodeagent.v1.Agent"
NAME = "nodeagent.sock"
LOOK_S = 1.0
"""How often it is checked whether the name is free (while it is not ours) or still ours (while it is)."""
MAX_CALLS = 16
GRACE_S = 1.0
_PRIVATE = ".control-"

CODES = {
    Reason.CONFIG_INVALID: grpc.StatusCode.FAILED_PRECONDITION,
    Reason.STATE_INVALID: grpc.StatusCode.FAILED_PRECONDITION,
    Reason.NOT_RUNNING: grpc.StatusCode.UNAVAILABLE,
    Reason.DEADLINE: grpc.StatusCode.DEADLINE_EXCEEDED,
    Reason.NOT_SUPPORTED: grpc.StatusCode.UNIMPLEMENTED,
}
R = TypeVar("R")


class Control:
    """Serves `documents` at `<run_dir>/nodeagent.sock`, mode 0600, while `run()` runs."""

    def __init__(self, run_dir: Path, documents: Documents, *, look_s: float = LOOK_S) -> None:
        self.path = run_dir / NAME
        self._documents = documents
        self._look_s = look_s
        self._active = asyncio.Event()
        self.published = asyncio.Event()
        """Set while the public name is ours."""

    def claim(self) -> None:
        """This daemon is the active one: the name is taken from whoever still has it."""
        self._active.set()

    async def run(self) -> None:
        """Serve until cancelled. A name that is lost (a wiped directory, another daemon) starts the next life."""
        _sweep(self.path.parent)
        while True:
            await self.run_once()

    async def run_once(self) -> None:
        """Wait until the name may be ours, serve while it is."""
        await self._wait_for_name()
        async with self._server() as bound:
            inode = bound.stat().st_ino
            bound.rename(self.path)
            self.published.set()
            try:
                while _inode(self.path) == inode:  # noqa: ASYNC110 (nothing tells when a name is lost)
                    await asyncio.sleep(self._look_s)
                log.warning("the control socket was taken away; making a new one", extra={"path": str(self.path)})
            finally:
                self.published.clear()
                if _inode(self.path) == inode:
                    self.path.unlink(missing_ok=True)

    async def _wait_for_name(self) -> None:
        waiting = False
        while not self._active.is_set() and answers(self.path):
            if not waiting:
                log.info("another daemon serves the control socket; waiting for it", extra={"path": str(self.path)})
                waiting = True
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._look_s):
                    await self._active.wait()

    @contextlib.asynccontextmanager
    async def _server(self) -> AsyncIterator[Path]:
        """A started server on a socket of its own in a directory that only root may enter."""
        server = grpc.aio.server(options=rpc.OPTIONS, maximum_concurrent_rpcs=MAX_CALLS)
        table: dict[str, tuple[type[Any], rpc.Unary]] = {
            "Get": (agent_pb2.GetRequest, self._get),
            "Reload": (agent_pb2.ReloadRequest, self._reload),
        }
        server.add_generic_rpc_handlers((rpc.service(SERVICE, table),))
        self.path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
        private = Path(tempfile.mkdtemp(prefix=_PRIVATE, dir=self.path.parent))
        try:
            bound = private / "s"
            server.add_insecure_port(f"unix:{bound}")
            await server.start()
            bound.chmod(0o600)
            yield bound
        finally:
            await server.stop(GRACE_S)
            shutil.rmtree(private, ignore_errors=True)

    async def _get(self, request: agent_pb2.GetRequest, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
        async def document() -> Document:
            try:
                return self._documents.document(request.verb)
            except KeyError:
                raise AgentError(Reason.NOT_SUPPORTED, f"this daemon has no document {request.verb[:40]!r}") from None

        return await _answered(document, context)

    async def _reload(self, request: agent_pb2.ReloadRequest, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
        return await _answered(self._documents.reload, context)


async def _answered(make: Callable[[], Awaitable[Document]], context: grpc.aio.ServicerContext[Any, Any]) -> Any:
    """A document as a message; an AgentError as a status with its reason, message and hint beside it."""
    try:
        document = await make()
    except AgentError as error:
        await context.abort(
            CODES.get(error.reason, grpc.StatusCode.INTERNAL),
            str(error),
            trailing_metadata=(
                ("nodeagent-reason", str(error.reason)),
                ("nodeagent-message-bin", error.message.encode()),
                ("nodeagent-hint-bin", error.hint.encode()),
            ),
        )
        raise
    except Exception:
        log.exception("a question on the control socket could not be answered")
        await context.abort(grpc.StatusCode.INTERNAL, "an internal error, which is in the daemon's log")
        raise
    return agent_pb2.Document(schema=str(getattr(document, "schema", "")), json=msgspec.json.encode(document))


def answers(path: Path) -> bool:
    """Somebody listens on the socket at `path`, even if it is too busy to accept."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as sock:
        try:
            sock.connect(str(path))
        except BlockingIOError:
            return True  # its queue is full (unix(7))
        except OSError:
            return False
    return True


def _inode(path: Path) -> int | None:
    try:
        return os.lstat(path).st_ino
    except OSError:
        return None


def _sweep(run_dir: Path) -> None:
    """Remove the private directories of daemons that were killed."""
    for private in run_dir.glob(f"{_PRIVATE}*"):
        if not answers(private / "s"):
            shutil.rmtree(private, ignore_errors=True)
