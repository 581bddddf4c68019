"""The spool on disk: `<seat>/<job>.json` of accepted jobs, their documents `<job>-<n>.doc`, and the seat's next job number.

    <directory>/<seat>/seat.json      {"next_job": 101}: every number below it may have been given out
                      /7.json         an accepted job, written when everything of it is on disk
                      /7-1.doc        its first document
                      /7-1.out        the same, device-ready; made again after a restart
                      /7-1.printed    the back end has sent its last byte (cups_files.BACKEND)
    <directory>/.aside/...            what could not be understood, for a person to look at

Everything here blocks on disk and belongs into a thread, unless it says otherwise. Raises OSError.
"""

from __future__ import annotations

import fcntl
import logging
import os
import re
import shutil
import time
from enum import IntEnum
from pathlib import Path
from typing import Annotated, Literal, TypeVar

import msgspec
from msgspec import Meta

from nodeagent.host import write_atomically

log = logging.getLogger(__name__)

T = TypeVar("T")

MAX_ASIDE = 64
MAX_RECORD_BYTES = 64 * 1024
SEAT_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,127}\Z")
_DOCUMENT = re.compile(r"([1-9][0-9]{0,9})-([1-9][0-9]{0,3})\.doc\Z")
_MARK = re.compile(r"([1-9][0-9]{0,9})-[1-9][0-9]{0,3}\.printed\Z")
_RECORD = re.compile(r"([1-9][0-9]{0,9})\.json\Z")
_TEMPORARY = re.compile(r".*\.(out|stage|tmp)\Z")
DELETE_TRIES = 5
DELETE_PAUSE_S = 0.05
MAX_JOB = 2**31 - 1
NUMBERS_AHEAD = 100
"""Job numbers reserved by one write; that many are lost at most when the daemon dies."""


class State(IntEnum):
    """IPP job-state (RFC 8011 5.3.7)."""

    PENDING = 3
    INCOMING = 4
    PROCESSING = 5
    CANCELLED = 7
    ABORTED = 8
    COMPLETED = 9

    @property
    def finished(self) -> bool:
        return self >= State.CANCELLED


MOVES: dict[State, frozenset[State]] = {
    State.INCOMING: frozenset({State.PENDING, State.CANCELLED, State.ABORTED}),
    State.PENDING: frozenset({State.PROCESSING, State.CANCELLED, State.ABORTED}),
    State.PROCESSING: frozenset({State.PENDING, State.COMPLETED, State.CANCELLED, State.ABORTED}),
    State.CANCELLED: frozenset(),
    State.ABORTED: frozenset(),
    State.COMPLETED: frozenset(),
}
"""Incoming: documents arrive. Pending: accepted, on disk. Processing: being converted or with cupsd; back to pending when
the printer is gone or cupsd has lost it."""


class Document(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    format: str
    size: int


class Record(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A job as it lies on disk and as the spool has it in memory. Times are Unix seconds, 0 = not yet."""

    schema: Literal["nodeagent.job/v1"] = "nodeagent.job/v1"
    id: int
    token: str
    """Random: cupsd must not take this job for another one of the same number."""
    printer: str
    title: str
    user: str = ""
    copies: int = 1
    state: State
    reason: str = "none"
    message: str = ""
    documents: tuple[Document, ...] = ()
    created_s: int
    processing_s: int = 0
    completed_s: int = 0

    @property
    def size_bytes(self) -> int:
        return sum(document.size for document in self.documents)


class _Seat(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    next_job: Annotated[int, Meta(ge=1, le=MAX_JOB)]


class LoadedSeat(msgspec.Struct, frozen=True):
    """What a restart finds of a seat."""

    next_job: int
    records: tuple[Record, ...]
    """By number."""


class SpoolStore:
    """The only one who writes there."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def document(self, seat: str, job: int, number: int) -> Path:
        """Where the nth document (from 1) is. Does not block."""
        return self._directory / seat / f"{job}-{number}.doc"

    def converted(self, seat: str, job: int, number: int) -> Path:
        """Where its device-ready form goes. Does not block."""
        return self._directory / seat / f"{job}-{number}.out"

    def size(self, seat: str, job: int, number: int) -> int:
        """Bytes of a document so far; 0 for none. Does not block."""
        try:
            return self.document(seat, job, number).stat().st_size
        except FileNotFoundError:
            return 0

    def free_bytes(self) -> int:
        found = os.statvfs(self._directory)
        return found.f_bavail * found.f_frsize

    def reserve(self, seat: str, next_job: int) -> None:
        """Remember on disk that numbers below `next_job` are taken."""
        directory = self._directory / seat
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        write_atomically(directory / "seat.json", msgspec.json.encode(_Seat(next_job)))

    def printed(self, seat: str, job: int, number: int) -> Path:
        """The mark that the nth document is on paper. Does not block."""
        return self._directory / seat / f"{job}-{number}.printed"

    def begin(self, seat: str, job: int, number: int) -> int:
        """A descriptor that takes a new document.

        Mode 0444, so that who has a descriptor may open it again for reading and nobody for writing; the directories
        above keep everybody out who has none.
        """
        path = self.document(seat, job, number)
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o444)
        os.fchmod(fd, 0o444)
        return fd

    def seal(self, path: Path) -> int | None:
        """Put a document on disk; returns its size, or None while somebody may still write into it."""
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            if has_writer(fd):
                return None
            os.fsync(fd)
            return os.fstat(fd).st_size
        finally:
            os.close(fd)

    def write(self, seat: str, record: Record) -> None:
        """Put a job on disk: from now on it survives."""
        write_atomically(self._directory / seat / f"{record.id}.json", msgspec.json.encode(record))

    def forget(self, seat: str, job: int) -> None:
        """Delete the record of a job that is told to nobody any more."""
        (self._directory / seat / f"{job}.json").unlink(missing_ok=True)

    def delete_documents(self, seat: str, job: int, count: int) -> list[int]:
        """Delete a job's documents. Returns a descriptor of each that somebody may still write into: its blocks stay in
        use for so long. The caller closes them."""
        held = []
        for number in range(1, count + 1):
            self.converted(seat, job, number).unlink(missing_ok=True)
            self.printed(seat, job, number).unlink(missing_ok=True)
            path = self.document(seat, job, number)
            try:
                fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            except FileNotFoundError:
                continue
            path.unlink()
            if has_writer(fd):
                held.append(fd)
            else:
                os.close(fd)
        return held

    def delete_seat(self, seat: str) -> None:
        """Delete everything of a seat, also what another thread is just adding."""
        for _ in range(DELETE_TRIES):
            shutil.rmtree(self._directory / seat, ignore_errors=True)
            if not (self._directory / seat).exists():
                return
            time.sleep(DELETE_PAUSE_S)
        log.error("spool: %s cannot be deleted", self._directory / seat)

    # ---- after a restart

    def load(self) -> dict[str, LoadedSeat]:
        """What there is, by seat. Never fails because of what a file contains: that goes aside and is logged."""
        self._directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        seats = {}
        for entry in sorted(self._directory.iterdir()):
            if entry.name == ".aside":
                continue
            if entry.is_dir() and not entry.is_symlink() and SEAT_NAME.match(entry.name):
                seats[entry.name] = self._load_seat(entry)
            else:
                self._put_aside(entry, "is no directory of a seat")
        return seats

    def _load_seat(self, directory: Path) -> LoadedSeat:
        records: dict[int, Record] = {}
        documents: dict[int, dict[int, Path]] = {}
        marks: list[tuple[int, Path]] = []
        next_job = 1
        for path in sorted(directory.iterdir()):
            if not path.is_file() or path.is_symlink():
                self._put_aside(path, "is no file of a spool")
            elif path.name == "seat.json":
                next_job = (self._take(path, _Seat) or _Seat(1)).next_job
            elif match := _DOCUMENT.match(path.name):
                documents.setdefault(int(match[1]), {})[int(match[2])] = path
            elif match := _MARK.match(path.name):
                marks.append((int(match[1]), path))
            elif match := _RECORD.match(path.name):
                record = self._take(path, Record)
                if record is not None and record.id == int(match[1]):
                    records[record.id] = record
                elif record is not None:
                    self._put_aside(path, f"calls itself job {record.id}")
            elif _TEMPORARY.match(path.name):
                path.unlink()
            else:
                self._put_aside(path, "is no file of a spool")
        for job in tuple(records):
            if not self._is_whole(directory, records[job], documents.get(job, {})):
                del records[job]
        next_job = max(next_job, *(job + 1 for job in (*records, *documents, 0)))
        for job, paths in documents.items():
            if job not in records or records[job].state.finished:
                for path in paths.values():  # of a job that was never accepted, or has ended
                    path.unlink(missing_ok=True)
        for job, path in marks:
            if job not in records or records[job].state.finished:
                path.unlink()
        return LoadedSeat(next_job, tuple(records[job] for job in sorted(records)))

    def _is_whole(self, directory: Path, record: Record, documents: dict[int, Path]) -> bool:
        """Whether everything of the job is there; if not, its record goes aside and its documents are deleted."""
        if record.state.finished:
            return True
        fault = ""
        if record.state is State.INCOMING or not record.documents:
            fault = "was never accepted"
        for number, document in enumerate(record.documents, 1):
            path = documents.get(number)
            if path is None:
                fault = f"lacks its document {number}"
            elif path.stat().st_size != document.size:
                fault = f"has a document {number} of {path.stat().st_size} bytes instead of {document.size}"
        if fault:
            self._put_aside(directory / f"{record.id}.json", fault)
            for path in documents.values():
                path.unlink()
        return not fault

    def _take(self, path: Path, kind: type[T]) -> T | None:
        try:
            if path.stat().st_size > MAX_RECORD_BYTES:
                raise msgspec.ValidationError(f"larger than {MAX_RECORD_BYTES} bytes")
            return msgspec.json.decode(path.read_bytes(), type=kind)
        except msgspec.MsgspecError as error:
            self._put_aside(path, f"cannot be read ({error})")
            return None

    def _put_aside(self, path: Path, fault: str) -> None:
        aside = self._directory / ".aside"
        aside.mkdir(exist_ok=True, mode=0o700)
        there = sorted(aside.iterdir(), key=lambda p: p.lstat().st_mtime)
        for old in there[: max(0, len(there) + 1 - MAX_ASIDE)]:
            shutil.rmtree(old, ignore_errors=True) if old.is_dir() else old.unlink()
        target = aside / f"{path.parent.name}.{path.name}"
        if target.exists() and target.is_dir():
            shutil.rmtree(target)
        path.replace(target)
        log.error("spool: %s/%s %s; it was put aside as %s", path.parent.name, path.name, fault, target)


def has_writer(fd: int) -> bool:
    """Whether somebody has the file of this read-only descriptor open for writing, or a descriptor is on its way to him.

    A read lease is granted only on a file that nobody writes to (fcntl(2), F_SETLEASE). Does not block. On file systems
    without leases nobody knows, and False is returned.
    """
    try:
        fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_RDLCK)
    except BlockingIOError:
        return True
    except OSError:
        return False
    fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_UNLCK)
    return False
