"""Runs the stages of a plan for one document: under the seat's uid, in its cgroup, without network, with a /tmp of its own.

The daemon opens the files and hands descriptors over; it reads nothing of what is in them.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
from collections.abc import Callable
from pathlib import Path

import msgspec

from nodeagent.config import PrintingConfig
from nodeagent.errors import AgentError, Reason
from nodeagent.services.printing.convert import Stage
from nodeagent.services.printing.programs import Spawn, listen_to_end
from nodeagent.wire.zygote import Limits

log = logging.getLogger(__name__)

PRIVATE_TMP_BYTES = 256 << 20
"""Counts as memory of the seat's cgroup while it is in use."""
TAIL_BYTES = 2000
"""Kept of what a filter says."""
NOTHING_PRINTED = b"No pages will be processed"
"""Ghostscript 10 says this of a PDF that it cannot read, makes an empty page and exits with 0."""
ENVIRONMENT = {
    "PATH": "/usr/local/bin:/usr/bin:/bin",
    "HOME": "/tmp",  # noqa: S108 (its own)
    "TMPDIR": "/tmp",  # noqa: S108
    "LANG": "C.UTF-8",
    "CHARSET": "utf-8",
}


class SeatContext(msgspec.Struct, frozen=True):
    """Whom the programs of a seat belong to."""

    uid: int
    cgroup_procs: tuple[Path, ...]


class Filters:
    """`seat_context(seat)` raises AgentError while the seat is not there; `hidden` are directories that filters find empty."""

    def __init__(
        self,
        limits: PrintingConfig,
        spawn: Spawn,
        seat_context: Callable[[str], SeatContext],
        hidden: tuple[str, ...] = (),
    ) -> None:
        self._hidden = hidden
        self._spawn = spawn
        self._context = seat_context
        self._timeout_s = limits.filter_timeout
        self._limits = Limits(file_bytes=limits.spool_per_seat_mib << 20)

    async def __call__(self, seat: str, stages: tuple[Stage, ...], source: Path, target: Path) -> None:
        """Convert `source` into the new file `target`. Raises AgentError; then there is no `target`.

        Both are regular files that anybody with a descriptor may read; the time limit is for all stages together.
        """
        assert stages
        context = self._context(seat)
        between = [target.with_suffix(f".{number}.stage") for number in range(len(stages) - 1)]
        files = [source, *between, target]
        try:
            async with asyncio.timeout(self._timeout_s):
                for stage, input_, output in zip(stages, files, files[1:], strict=False):
                    await self._run(context, stage, input_, output)
        except TimeoutError:
            target.unlink(missing_ok=True)
            raise AgentError(
                Reason.DEADLINE, f"the document could not be converted within {self._timeout_s:.0f} s"
            ) from None
        except BaseException:
            target.unlink(missing_ok=True)
            raise
        finally:
            for path in between:
                path.unlink(missing_ok=True)

    async def _run(self, context: SeatContext, stage: Stage, source: Path, target: Path) -> None:
        said = b""

        def hear(data: bytes) -> None:
            nonlocal said
            said = (said + data)[-TAIL_BYTES:]

        fds = [os.open(source, os.O_RDONLY | os.O_CLOEXEC)]
        try:
            fds.append(os.open(target, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o444))
            os.fchmod(fds[1], 0o444)  # the umask notwithstanding
            async with listen_to_end(hear) as stderr:
                program = await self._spawn(
                    stage.argv, uid=context.uid, cgroup_procs=context.cgroup_procs, stdin=fds[0], stdout=fds[1],
                    stderr=stderr, env=ENVIRONMENT | stage.env, network=False, private_tmp_bytes=PRIVATE_TMP_BYTES,
                    hidden=self._hidden, limits=self._limits,
                )  # fmt: skip
                try:
                    code = (await program.wait()).code
                finally:
                    program.kill()
                    await program.wait()
        except OSError as error:
            raise AgentError(Reason.INTERNAL, f"cannot run {stage.name}: {error.strerror or error}") from error
        finally:
            for fd in fds:
                os.close(fd)
        if code != 0 or NOTHING_PRINTED in said or not target.stat().st_size:
            log.info("%s ended with %d, saying: %s", stage.name, code, _printable(said))
            raise AgentError(Reason.MALFORMED, f"the document could not be converted: {stage.name} {_outcome(code)}")


def _outcome(code: int) -> str:
    if code == 0:
        return "found nothing to print in it"
    if code == -signal.SIGXFSZ:
        return "made more of it than the spool may hold"
    return f"was killed by signal {-code}" if code < 0 else f"failed with status {code}"


def _printable(untrusted_text: bytes) -> str:
    return "".join(c if c.isprintable() else " " for c in untrusted_text.decode(errors="replace"))[-500:]
