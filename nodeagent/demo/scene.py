"""The scene of `make run`: where everything lives, the real daemon as a process of its own, and how its state is looked at.

Everything is in one temporary directory (and `--keep DIR`), so that a daemon of this node, its kubelet and its container
runtime are not touched. The daemon is asked by the command line, as a person would.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import socket
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import TypeVar

import msgspec
import yaml
from prometheus_client.parser import text_string_to_metric_families

from nodeagent.errors import AgentError, Reason
from nodeagent.host import run

T = TypeVar("T")

DOMAIN = "opencdi.io"
PREFIX = "nodeagent-demo-"
"""Of the temporary directory's name; short, since the paths of sockets below it must fit into 108 bytes."""
REAL_KUBELET = Path("/var/lib/kubelet/device-plugins/kubelet.sock")
POLL_S = 0.2
STOP_TIMEOUT_S = 15.0
TOOLS = {"runsc": "runsc", "lp": "cups-client", "cupsd": "cups-daemon", "gs": "ghostscript", "python3": "python3"}
"""What the main job needs on this machine: program -> Debian package."""


class Places(msgspec.Struct, frozen=True):
    """`base` is short and temporary (Unix sockets are in it); `kept` holds what is worth a look afterwards."""

    base: Path
    kept: Path

    @property
    def config(self) -> Path:
        return self.kept / "config.yaml"

    @property
    def log(self) -> Path:
        return self.kept / "nodeagent.log"

    @property
    def state(self) -> Path:
        return self.kept / "state"

    @property
    def run(self) -> Path:
        return self.base / "run"

    @property
    def slots(self) -> Path:
        return self.run / "slots"

    @property
    def kubelet(self) -> Path:
        return self.base / "kubelet"

    @property
    def device_plugins(self) -> Path:
        return self.kubelet / "device-plugins"

    @property
    def pod_resources(self) -> Path:
        return self.kubelet / "pod-resources" / "kubelet.sock"

    @property
    def cri(self) -> Path:
        return self.base / "cri.sock"

    def output(self, serial: str) -> Path:
        """Where the simulated printer puts what it is sent."""
        return self.state / "simulated" / serial / "output"


@asynccontextmanager
async def places(keep: Path | None) -> AsyncIterator[Places]:
    """Make the directories; everything but `keep` is removed at the end."""
    base = Path(await asyncio.to_thread(tempfile.mkdtemp, prefix=PREFIX))
    try:
        found = Places(base, keep.absolute() if keep else base)
        for directory in (found.kept, found.device_plugins, found.pod_resources.parent):
            directory.mkdir(parents=True, exist_ok=True)
        yield found
    finally:
        await asyncio.to_thread(shutil.rmtree, base)


def missing_tools() -> list[str]:
    """Packages that have to be installed first."""
    path = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"
    return sorted({package for program, package in TOOLS.items() if shutil.which(program, path=path) is None})


def free_port() -> int:
    """A TCP port of the loopback that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


async def kubelet_runs() -> bool:
    """Whether a real kubelet answers on this node."""
    with suppress(OSError, TimeoutError):
        async with asyncio.timeout(1):
            _, writer = await asyncio.open_unix_connection(REAL_KUBELET)
            writer.close()
            await writer.wait_closed()
            return True
    return False


class Daemon:
    """The real daemon, `nodeagent run`, while `running` lasts; its log goes to a file."""

    def __init__(self, where: Places, http_port: int) -> None:
        self._where = where
        self._http = f"http://127.0.0.1:{http_port}"
        self._process: asyncio.subprocess.Process | None = None

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        with self._where.log.open("ab") as log:
            self._process = process = await asyncio.create_subprocess_exec(
                *("setpriv", "--pdeathsig", "TERM", "--"),
                *self.command("run"),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                # Ctrl-C goes to the demo alone, which ends the desktops before the daemon.
                start_new_session=True,
            )
        try:
            yield
        finally:
            await _end(process)

    def command(self, *words: str) -> list[str]:
        return [sys.executable, "-m", "nodeagent", "--config", str(self._where.config), *words]

    async def ask(self, verb: str, kind: type[T]) -> T:
        """`nodeagent VERB -o json`. Raises AgentError with what the command line said."""
        finished = await run(self.command(verb, "-o", "json"))
        try:
            return msgspec.json.decode(finished.stdout, type=kind)
        except msgspec.DecodeError as error:
            said = (finished.stderr.strip().splitlines() or [f"exit status {finished.code}"])[0]
            raise AgentError(Reason.UPSTREAM_UNAVAILABLE, f"nodeagent {verb}: {said}") from error

    async def metrics(self) -> dict[tuple[str, str], float]:
        """The samples of /metrics: (name, the value of its only label or a=b,c=d) -> value."""
        text = await asyncio.to_thread(_fetch, f"{self._http}/metrics")
        return {
            (
                sample.name,
                ",".join(v if len(sample.labels) == 1 else f"{k}={v}" for k, v in sample.labels.items()),
            ): sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
        }

    async def until(self, what: str, probe: Callable[[], Awaitable[T | None]], timeout_s: float) -> T:
        """Ask `probe` until it has an answer. Raises AgentError when the daemon ends or `timeout_s` passes before that;
        errors of a probe count as no answer, the last one is told."""
        deadline = time.monotonic() + timeout_s
        last = ""
        while True:
            try:
                if (answer := await probe()) is not None:
                    return answer
            except AgentError as error:
                last = f"; {error.message}"
            if self._process is None or self._process.returncode is not None:
                raise AgentError(
                    Reason.NOT_RUNNING,
                    f"the daemon has ended: {self.last_words()}",
                    hint="--keep DIR leaves its log there",
                )
            if time.monotonic() > deadline:
                raise AgentError(Reason.DEADLINE, f"{what} did not happen within {timeout_s:.0f} s{last}")
            await asyncio.sleep(POLL_S)

    def last_words(self) -> str:
        """The last line of the log that is no hint."""
        lines = self._where.log.read_text(errors="replace").splitlines()
        return next((x for x in reversed(lines) if x.strip() and not x.startswith("hint:")), "it said nothing")


async def _end(process: asyncio.subprocess.Process) -> None:
    """TERM, and KILL for one that does not end in time."""
    if process.returncode is None:
        process.send_signal(signal.SIGTERM)
        with suppress(TimeoutError):
            async with asyncio.timeout(STOP_TIMEOUT_S):
                await process.wait()
    if process.returncode is None:
        process.kill()
    await process.wait()


def _fetch(url: str) -> str:
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:  # noqa: S310 (our own http:// address)
            text: str = answer.read(1 << 22).decode()
            return text
    except (OSError, urllib.error.URLError) as error:
        raise AgentError(Reason.UPSTREAM_UNAVAILABLE, f"{url}: {error}") from error


def configuration(where: Places, http_port: int, devices: dict[str, object]) -> str:
    """The configuration file of the demo's daemon."""
    return yaml.safe_dump(
        {
            "node_name": "demo",
            "state_dir": str(where.state),
            "run_dir": str(where.run),
            "log": "text",
            "kubelet": {"root_dir": str(where.kubelet), "device_plugin_dir": str(where.device_plugins)},
            "cri": {"socket": str(where.cri)},
            "http": {"listen": f"127.0.0.1:{http_port}"},
            "kubernetes": {"api": "off"},
            "devices": {"domain": DOMAIN, **devices},
        },
        sort_keys=False,
    )
