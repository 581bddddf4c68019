"""What the daemon and its zygote say to each other, and what a new child says to the zygote.

One message is one SOCK_SEQPACKET datagram: MessagePack of a tagged struct, descriptors beside it. Children are named by
numbers that the daemon gives, never by pids, so that nothing can hit a stranger whose pid was used before.

    daemon                                   zygote                          child
    Setup(parent, services, seccomp)  ->
                                      <-     Hello
    SpawnWorker(child=1) + control    ->     forks
                                                                     <-      Started | Failed
                                      <-     Spawned(child=1, pid) | Failed(child=1)
    Kill(child=1, signal)             ->
                                      <-     Said(child=1, untrusted_text)
                                      <-     Exited(child=1, code)
"""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta

MAX_MESSAGE = 64 * 1024
MAX_FDS = 4
MAX_CHILDREN = 4096
"""Living children of one zygote: far above what a node runs, far below its descriptors and pids."""
MAX_TEXT = 500

Number = Annotated[int, Meta(ge=1)]
Uid = Annotated[int, Meta(ge=1, le=0xFFFF_FFFE)]
"""A seat's uid, which is also its gid. Never root; 0xFFFFFFFF means "no change" to setresuid(2)."""


class Message(msgspec.Struct, frozen=True, kw_only=True, tag=True, forbid_unknown_fields=True):
    """Base of every message; the tag is the class name."""


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """Resource limits of one process (setrlimit(2)); 0 sets none. Memory and processes are limited by the cgroup."""

    cpu_s: int = 0
    file_bytes: int = 0
    """The largest file it may write, and the furthest offset in a descriptor it was given."""
    files: int = 256
    """Open descriptors."""


# ---- daemon -> zygote


class Setup(Message, frozen=True, kw_only=True):
    """The first message."""

    parent: int
    """The daemon's pid: the zygote ends at once if its parent is somebody else by then."""
    services: dict[str, str]
    """Service -> `module:Class` of its seat side; all are imported before any seat exists."""
    seccomp_dir: str


class SpawnWorker(Message, frozen=True, kw_only=True):
    """Fork a seat worker. The descriptor beside it is the worker's control socket."""

    child: Number
    name: str
    uid: Uid
    cgroup_procs: tuple[str, ...]
    limits: Limits


class SpawnProgram(Message, frozen=True, kw_only=True):
    """Fork and execute a program. The descriptors beside it are its standard input, output and error."""

    child: Number
    argv: Annotated[tuple[str, ...], Meta(min_length=1)]
    uid: Uid | None
    cgroup_procs: tuple[str, ...]
    env: dict[str, str]
    network: bool
    private_tmp_bytes: int
    hidden: tuple[str, ...]
    limits: Limits


class Kill(Message, frozen=True, kw_only=True):
    """Send a signal to a child; one that has ended is no error."""

    child: Number
    signal: Annotated[int, Meta(ge=1, le=64)]


ToZygote = Setup | SpawnWorker | SpawnProgram | Kill


# ---- zygote -> daemon


class Hello(Message, frozen=True, kw_only=True):
    """Everything is imported and compiled."""

    pid: int


class Broken(Message, frozen=True, kw_only=True):
    """The zygote cannot work, and ends."""

    message: str


class Spawned(Message, frozen=True, kw_only=True):
    """The child is confined and runs: a worker has entered its main function, a program was executed."""

    child: Number
    pid: int


class Failed(Message, frozen=True, kw_only=True):
    """The child could not be started; nothing of it is left."""

    child: Number
    message: str


class Said(Message, frozen=True, kw_only=True):
    """A line that a worker wrote to its standard error: printable characters only, at most MAX_TEXT."""

    child: Number
    untrusted_text: str


class Exited(Message, frozen=True, kw_only=True):
    """The child is gone and reaped. `code`: exit status, or minus the signal that killed it."""

    child: Number
    code: int


FromZygote = Hello | Broken | Spawned | Failed | Said | Exited


# ---- child -> zygote, over a pair of its own


class Started(Message, frozen=True, kw_only=True):
    """The child is confined; a program was executed."""


class Faulted(Message, frozen=True, kw_only=True):
    """The child could not be confined or executed, and why."""

    message: str


class Ended(Message, frozen=True, kw_only=True):
    """The program in the child's pid namespace ended like this. (Its init cannot die by the same signal.)"""

    code: int


FromChild = Started | Faulted | Ended

_encoder = msgspec.msgpack.Encoder()
_to_zygote: msgspec.msgpack.Decoder[ToZygote] = msgspec.msgpack.Decoder(ToZygote)
_from_zygote: msgspec.msgpack.Decoder[FromZygote] = msgspec.msgpack.Decoder(FromZygote)
_from_child: msgspec.msgpack.Decoder[FromChild] = msgspec.msgpack.Decoder(FromChild)


def put_message(message: Message) -> bytes:
    """Encode one message; raises ValueError when it would not fit into one datagram."""
    data = _encoder.encode(message)
    if len(data) > MAX_MESSAGE:
        raise ValueError(f"{type(message).__name__} of {len(data)} bytes is over {MAX_MESSAGE}")
    return data


def take_to_zygote(data: bytes) -> ToZygote:
    """Decode or raise msgspec.DecodeError, as the other two."""
    return _to_zygote.decode(data)


def take_from_zygote(data: bytes) -> FromZygote:
    return _from_zygote.decode(data)


def take_from_child(data: bytes) -> FromChild:
    return _from_child.decode(data)
