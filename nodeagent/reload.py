"""The configuration while the daemon runs: a changed file or SIGHUP is read again; a bad one changes nothing.

What cannot change under running seats (where state lives, whom to listen to) is kept from the start and said so.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable
from pathlib import Path

import msgspec

from nodeagent.config import Config, load
from nodeagent.errors import ConfigError
from nodeagent.metrics import Metrics

log = logging.getLogger(__name__)

LOOK_S = 2.0
"""A changed file is noticed within this; ConfigMap volumes change by renaming a directory, so the path is looked at anew."""
CHANGEABLE = ("devices", "log")
"""Sections that take effect at once; everything else does at the next start."""
NO_FILE = (0, 0, 0)


class Reload:
    """Owns the current configuration."""

    def __init__(self, path: Path, config: Config, metrics: Metrics) -> None:
        self.path = path
        self.config = config
        self.loaded_s = time.time()
        self.last_error = ""
        self.needs_restart: tuple[str, ...] = ()
        """Sections of the file that differ from what is in use until the daemon is started again."""
        self.on_config: list[Callable[[Config], None]] = []
        self.on_rejected: Callable[[str], None] = lambda _: None
        self._metrics = metrics
        self._asked = asyncio.Event()
        self._seen = self._stamp()
        self.from_file = self._seen != NO_FILE
        """False: there is no file, the defaults are in use."""

    def ask(self) -> None:
        """SIGHUP."""
        self._asked.set()

    async def run(self) -> None:
        """Watch the file until cancelled."""
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(LOOK_S):
                    await self._asked.wait()
            stamp = await asyncio.to_thread(self._stamp)
            if self._asked.is_set() or stamp != self._seen:
                self._asked.clear()
                with contextlib.suppress(ConfigError):
                    await self.reload()

    async def reload(self) -> bool:
        """Read the file now; whether it says anything new. Raises ConfigError, and the old configuration stays."""
        self._seen = await asyncio.to_thread(self._stamp)
        try:
            config = await asyncio.to_thread(load, self.path)
        except ConfigError as error:
            self.last_error = error.message
            self._metrics.config_reloads.labels("rejected").inc()
            log.error("configuration %s was not taken, the old one stays: %s", self.path, error)
            self.on_rejected(f"{self.path} was not taken, the old configuration stays: {error}")
            raise
        self.last_error = ""
        self.from_file = True
        self.loaded_s = time.time()
        self._metrics.config_reloads.labels("accepted").inc()
        names = [f.name for f in msgspec.structs.fields(Config)]
        differs = tuple(n for n in names if getattr(config, n) != getattr(self.config, n))
        self.needs_restart = tuple(n for n in differs if n not in CHANGEABLE)
        if self.needs_restart:
            log.warning(
                "configuration: %s takes effect when the daemon is started again", ", ".join(self.needs_restart)
            )
        usable = {n: getattr(config, n) for n in differs if n in CHANGEABLE}
        if usable:
            self.config = msgspec.structs.replace(self.config, **usable)
            for callback in self.on_config:
                callback(self.config)
            log.info("configuration %s: %s taken", self.path, ", ".join(usable))
        return bool(differs)

    def _stamp(self) -> tuple[int, int, int]:
        try:
            found = self.path.stat()
        except OSError:
            return NO_FILE
        return (found.st_ino, found.st_mtime_ns, found.st_size)
