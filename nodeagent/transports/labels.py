"""SELinux labels of slots: a container may connect to a socket only when its file and its server both allow it.

Three questions are asked of the policy for each connection (container-selinux, container.te):

  search the directory, write to the socket's file: allowed to every container domain on `container_file_t`
  `unix_stream_socket connectto` on the *process* that listens: allowed on `spc_t`, the domain of a privileged pod
    (container_spc_stream_connect), and on nothing else a daemon could run in; not on `unconfined_service_t`, not on `init_t`
  categories: containers run as `s0:c1,c2`; a file or process of plain `s0` is below each of them, so all may reach it

Nothing relabels what a device plugin mounts, unlike a volume, so the agent sets the label itself. Which label that is says
the policy in `lxc_contexts`, where the runtimes read it too. Without SELinux nothing happens: one look at a file per daemon.
"""

from __future__ import annotations

import contextlib
import os
import re
import socket
from collections.abc import Callable
from pathlib import Path

from nodeagent.documents import Problem
from nodeagent.host import HostRoot
from nodeagent.transports.unix import listen

ATTRIBUTE = "security.selinux"
SELINUXFS = "/sys/fs/selinux"
CONTEXT = re.compile(r"[a-z0-9_.-]+:[a-z0-9_.-]+:([a-z0-9_.-]+)(:[a-z0-9_.,:-]+)?", re.IGNORECASE)
MAX_CONTEXT_BYTES = 4096
DEFAULT_FILE = "system_u:object_r:container_file_t:s0"
DEFAULT_PROCESS = "system_u:system_r:container_t:s0"
CATEGORIES = "c1,c2"
"""Any two stand for all: policies differ by type, and a plain s0 is below every set of categories."""
PROBE, SOCKET = "label-probe", "probe.sock"
QUESTIONS = (
    ("dir", "search", "may not look into a slot"),
    ("sock_file", "write", "may not use the file of a slot's socket"),
    ("unix_stream_socket", "connectto", "may not connect to this daemon's domain"),
)

SetXattr = Callable[[Path, str, bytes], None]
GetXattr = Callable[[Path, str], bytes]
Ask = Callable[[Path, bytes], bytes]
"""Write to selinuxfs `access` and read the answer from the same descriptor."""


def _set(path: Path, name: str, value: bytes) -> None:
    os.setxattr(path, name, value, follow_symlinks=False)


def _get(path: Path, name: str) -> bytes:
    return os.getxattr(path, name, follow_symlinks=False)


def _ask(path: Path, question: bytes) -> bytes:
    with open(path, "r+b", buffering=0) as file:
        file.write(question)
        return file.read(MAX_CONTEXT_BYTES)


class Labels:
    """The label of slots on this host; does nothing where SELinux is off or absent. Calls are a few reads and do not block."""

    def __init__(
        self, host: HostRoot, *, set_xattr: SetXattr = _set, get_xattr: GetXattr = _get, ask: Ask = _ask
    ) -> None:
        self._host, self._set, self._get, self._ask = host, set_xattr, get_xattr, ask
        self.enabled = host.path(f"{SELINUXFS}/enforce").exists()
        """SELinux decides on this host, whether it denies (`enforcing`) or only notes."""
        self.enforcing = self.enabled and host.attribute(f"{SELINUXFS}/enforce") == "1"
        contexts = self._contexts() if self.enabled else {}
        self.file = contexts.get("file", DEFAULT_FILE)
        self.process = contexts.get("process", DEFAULT_PROCESS)

    def apply(self, path: Path) -> Problem | None:
        """Label a slot's directory or a socket in it; says what is wrong when the kernel did not take the label."""
        if not self.enabled:
            return None
        try:
            self._set(path, ATTRIBUTE, self.file.encode() + b"\0")
        except OSError as error:
            # A file system mounted with `context=` has one label for everything and takes no other (ENOTSUP).
            if self._type_of(path) == _type(self.file):
                return None
            return self._problem(f"{path} cannot be given the SELinux label {self.file}: {error.strerror}")
        return None

    def probe(self, directory: Path) -> Problem | None:
        """Make a socket as a slot has it below `directory`, label it, look and connect; None when containers could, too.

        Also asks the policy what it allows a container, because a connection of our own proves only what we may.
        """
        if not self.enabled:
            return None
        place = directory / PROBE
        try:
            place.mkdir(exist_ok=True)
            with listen(place, SOCKET) as server:
                problem = self._look(place)
                _connect(place)
                server.accept()[0].close()
        except OSError as error:
            return self._problem(f"a test socket below {directory} cannot be used: {error.strerror}")
        finally:
            _remove(place)
        return problem

    def _look(self, place: Path) -> Problem | None:
        for path in (place, place / SOCKET):
            if (problem := self.apply(path)) is not None:
                return problem
            if (found := self._type_of(path)) != (wanted := _type(self.file)):
                return self._problem(f"{path} has the SELinux type {found or 'of nothing'} after it was given {wanted}")
        domain = self._host.attribute("/proc/self/attr/current")
        for (cls, permission, what), target in zip(QUESTIONS, (self.file, self.file, domain), strict=True):
            if self._may(target, cls, permission) is False:
                return self._problem(
                    f"SELinux: a container ({_type(self.process)}) {what} ({_type(target)}: {cls} {permission})",
                    _module(_type(self.process), _type(target), cls, permission),
                )
        return None

    def _may(self, target: str, cls: str, permission: str) -> bool | None:
        """Ask the policy (selinuxfs `access`); None where that is not possible."""
        base = self._host.path(SELINUXFS)
        try:
            number = int((base / "class" / cls / "index").read_text())
            bit = 1 << (int((base / "class" / cls / "perms" / permission).read_text()) - 1)
            return allows(
                self._ask(base / "access", question(f"{self.process}:{CATEGORIES}", target, number, bit)), bit
            )
        except (OSError, ValueError):
            return None

    def _type_of(self, path: Path) -> str:
        try:
            return _type(self._get(path, ATTRIBUTE)[:MAX_CONTEXT_BYTES].rstrip(b"\0").decode(errors="replace"))
        except OSError:
            return ""

    def _contexts(self) -> dict[str, str]:
        """`file = "system_u:object_r:container_file_t:s0"` and its like, of the policy in use."""
        kind = re.search(r"^SELINUXTYPE=([a-z0-9-]+)\s*$", self._host.attribute("/etc/selinux/config"), re.MULTILINE)
        text = self._host.attribute(f"/etc/selinux/{kind[1] if kind else 'targeted'}/contexts/lxc_contexts")
        pairs = re.findall(r'^\s*(\w+)\s*=\s*"([^"\n]+)"\s*$', text, re.MULTILINE)
        return {key: value for key, value in pairs if CONTEXT.fullmatch(value)}

    def _problem(self, message: str, hint: str = "") -> Problem:
        noted = "" if self.enforcing else " (SELinux only notes it now: permissive)"
        return Problem(
            message=message + noted,
            hint=hint or "run the daemon as a privileged pod (spc_t); ausearch -m avc -ts recent",
        )


def question(source: str, target: str, cls: int, permissions: int) -> bytes:
    """What is written to selinuxfs `access` (security/selinux/selinuxfs.c, sel_write_access)."""
    return f"{source} {target} {cls} {permissions:x}".encode()


def allows(untrusted_answer: bytes, permissions: int) -> bool:
    """Whether an answer of selinuxfs `access` allows these: hexadecimal, first what is allowed. Raises ValueError."""
    first, *_ = untrusted_answer.split(None, 1) or [b""]
    return int(first, 16) & permissions == permissions


def _type(context: str) -> str:
    found = CONTEXT.fullmatch(context)
    return found[1] if found else ""


def _module(source: str, target: str, cls: str, permission: str) -> str:
    rule = f"(allow {source} {target} ({cls} ({permission})))"
    return f"run the daemon as a privileged pod; or: echo '{rule}' > nodeagent.cil && semodule -i nodeagent.cil"


def _connect(place: Path) -> None:
    """By a descriptor of the directory, as sun_path holds 108 bytes."""
    at = os.open(place, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        with socket.socket(socket.AF_UNIX) as client:
            client.setblocking(False)
            client.connect(f"/proc/self/fd/{at}/{SOCKET}")
    finally:
        os.close(at)


def _remove(place: Path) -> None:
    with contextlib.suppress(OSError):
        (place / SOCKET).unlink(missing_ok=True)
        place.rmdir()
