"""Asking the daemon, on `<run_dir>/nodeagent.sock`."""

from __future__ import annotations

import errno
import os
import signal
import socket
import threading
from pathlib import Path
from typing import TypeVar

import msgspec

from nodeagent.documents import Document
from nodeagent.errors import AgentError, Reason

TIMEOUT_S = 5.0
SOCKET = "nodeagent.sock"

D = TypeVar("D", bound=Document)


class NotRunning(AgentError):
    """No daemon listens there."""

    def __init__(self, path: Path, why: str) -> None:
        super().__init__(
            Reason.NOT_RUNNING,
            f"no daemon answers at {path}: {why}",
            hint="start it with 'nodeagent run', or name its configuration with --config if its run_dir is another one",
        )


def ask(run_dir: str | Path, verb: str) -> bytes:
    """The JSON document of one verb from the running daemon.

    Raises NotRunning when none listens, AgentError when it does not answer within TIMEOUT_S or refuses.
    """
    from nodeagent.wire.pb.nodeagent.v1 import agent_pb2

    return _call(run_dir, "Get", agent_pb2.GetRequest(verb=verb))


def reload(run_dir: str | Path) -> bytes:
    """Have the daemon read its configuration again. Raises ConfigError's reason when the new file cannot be used."""
    from nodeagent.wire.pb.nodeagent.v1 import agent_pb2

    return _call(run_dir, "Reload", agent_pb2.ReloadRequest())


def decode(raw: bytes, kind: type[D]) -> D:
    """A document as its struct; unknown fields of a newer daemon are passed over."""
    try:
        return msgspec.json.decode(raw, type=kind)
    except msgspec.DecodeError as error:
        raise AgentError(
            Reason.INTERNAL,
            f"the daemon's answer is not understood: {error}",
            hint="its version is probably not this command's; -o json shows the answer as it is",
        ) from error


def probe(path: Path) -> None:
    """Say precisely why nobody can be asked there, before gRPC says it in its own words."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.settimeout(TIMEOUT_S)
        try:
            sock.connect(str(path))
        except FileNotFoundError:
            raise NotRunning(path, "there is no such socket") from None
        except ConnectionRefusedError:
            raise NotRunning(path, "the socket is left over from one that has ended") from None
        except PermissionError:
            raise AgentError(
                Reason.NOT_RUNNING, f"{path} may not be opened by uid {os.geteuid()}", hint="run this command as root"
            ) from None
        except (TimeoutError, BlockingIOError):  # EAGAIN: nobody accepts and the queue is full (unix(7))
            raise _silent(path) from None
        except OSError as error:
            raise NotRunning(path, error.strerror or errno.errorcode.get(error.errno or 0, str(error))) from None


def _silent(path: Path) -> AgentError:
    return AgentError(
        Reason.DEADLINE,
        f"the daemon at {path} does not answer within {TIMEOUT_S:g} s",
        hint="its log says what it is doing; an overloaded node can be the cause",
    )


def _call(run_dir: str | Path, method: str, request: object) -> bytes:
    path = Path(run_dir) / SOCKET
    probe(path)
    # gRPC writes its own lines to stderr; this one is for a person who asked for a table.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    import grpc

    from nodeagent.wire.pb.nodeagent.v1 import agent_pb2

    # Ctrl-C ends the command by itself: a KeyboardInterrupt that falls into one of gRPC's callbacks is swallowed there.
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    options = [
        ("grpc.max_receive_message_length", 16 << 20),
        ("grpc.enable_http_proxy", 0),
        ("grpc.default_authority", "localhost"),
    ]
    with grpc.insecure_channel(f"unix:{path}", options=options) as channel:
        call = channel.unary_unary(
            f"/nodeagent.v1.Agent/{method}",
            request_serializer=lambda message: message.SerializeToString(),
            response_deserializer=agent_pb2.Document.FromString,
        )
        try:
            answer = call(request, timeout=TIMEOUT_S)
        except grpc.RpcError as error:
            raise _refused(path, error) from None
    raw: bytes = answer.json
    return raw


def _refused(path: Path, error: object) -> AgentError:
    import grpc

    assert isinstance(error, grpc.Call)
    code, details = error.code(), error.details() or ""
    if code is grpc.StatusCode.DEADLINE_EXCEEDED:
        return _silent(path)
    if code is grpc.StatusCode.UNAVAILABLE:
        return NotRunning(path, details or "the connection was closed")
    named = dict(error.trailing_metadata() or ())
    message = named.get("nodeagent-message-bin", details.encode())
    hint = named.get("nodeagent-hint-bin", b"")
    known = str(named.get("nodeagent-reason", ""))
    return AgentError(Reason(known) if known in set(Reason) else Reason.INTERNAL, _text(message), hint=_text(hint))


def _text(value: str | bytes) -> str:
    return value.decode(errors="replace") if isinstance(value, bytes) else value
