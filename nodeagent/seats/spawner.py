"""The zygote process: one thread, no gRPC, everything a seat worker needs already imported.

It forks workers, which share its memory, and programs, which it puts behind a process 1 of their own; it reaps both and
says how they ended. It is a child of the daemon and dies with it (pdeath signal; end of the control socket as second line),
and its children die with it: workers by their pdeath signal, programs with all their descendants because the kernel kills a
pid namespace whose process 1 is gone.
"""

from __future__ import annotations

import encodings.idna  # noqa: F401 (a worker cannot import what it finds missing later)
import gc
import linecache  # noqa: F401 (as above)
import os
import resource
import select
import signal
import socket
import time
import traceback  # noqa: F401 (as above)
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import msgspec

from nodeagent.seats import confine, syscalls, worker
from nodeagent.services import seat_service
from nodeagent.transports import unix
from nodeagent.wire import zygote as wire

STDERR_BYTES_OF_A_LIFE = 16 * 1024
"""What a worker may write to its standard error before nobody listens any more; each line costs LINE_BYTES more."""
LINE_BYTES = 128
EX_SOFTWARE = 70
EX_OSERR = 71
"""sysexits.h"""

FORWARDED = frozenset({signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2})
"""What the process 1 of a program passes on to it."""
IGNORED = frozenset({signal.SIGTERM, signal.SIGINT, signal.SIGHUP})
"""Service managers and terminals send these to every process of a group; here the daemon alone says when it is over."""


class Living(msgspec.Struct):
    """A child that has not been reaped. `report` is where it tells how its start went, `stderr` what it complains about."""

    number: int
    pid: int
    report: socket.socket | None
    stderr: int = -1
    stderr_left: int = STDERR_BYTES_OF_A_LIFE
    stderr_text: bytes = b""
    started: bool = False
    fault: str = ""
    ended: int | None = None


class Spawner:
    """The loop of the zygote process."""

    def __init__(self, control: socket.socket, setup: wire.Setup) -> None:
        self._control = control
        self._services = {name: seat_service(name, setup.services) for name in setup.services}
        directory = Path(setup.seccomp_dir)
        self._worker_filter = confine.compile_profile(directory / "seat-worker.json")
        self._program_filter = confine.compile_profile(directory / "seat-program.json")
        self._pid = os.getpid()
        self._pid_namespace = os.open("/proc/self/ns/pid", os.O_RDONLY | os.O_CLOEXEC)
        self._null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
        self._living: dict[int, Living] = {}  # by number
        self._sources: dict[int, Callable[[], object]] = {}  # by descriptor
        self._poll = select.poll()
        self._wake, self._wake_in = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(self._wake_in, warn_on_full_buffer=False)
        self._watch(self._wake, self._on_wake)
        self._watch(control.fileno(), self._on_control)

    def run(self) -> None:
        """Serve until the daemon closes its end; then kill and reap every child."""
        try:
            while True:
                for fd, _ in self._poll.poll():
                    if fd in self._sources:
                        self._sources[fd]()
        except (EOFError, ConnectionError):
            pass
        for child in self._living.values():
            os.kill(child.pid, signal.SIGKILL)
        for child in self._living.values():
            os.waitpid(child.pid, 0)

    def _watch(self, fd: int, on_readable: Callable[[], object]) -> None:
        self._sources[fd] = on_readable
        self._poll.register(fd, select.POLLIN)

    def _unwatch(self, fd: int) -> None:
        del self._sources[fd]
        self._poll.unregister(fd)

    def _say(self, message: wire.Message) -> None:
        self._control.send(wire.put_message(message))

    # ---- from the daemon

    def _on_control(self) -> None:
        data, fds = unix.recv(self._control, wire.MAX_MESSAGE, wire.MAX_FDS)
        try:
            message = wire.take_to_zygote(data)
            match message:
                case wire.SpawnWorker():
                    self._spawn(message, fds, expected=1)
                case wire.SpawnProgram():
                    self._spawn(message, fds, expected=3)
                case wire.Kill():
                    if message.child in self._living:
                        os.kill(self._living[message.child].pid, message.signal)
                case wire.Setup():
                    raise ValueError("a second Setup")
        finally:
            for fd in fds:
                os.close(fd)

    def _spawn(self, message: wire.SpawnWorker | wire.SpawnProgram, fds: list[int], expected: int) -> None:
        try:
            if len(fds) != expected:
                raise OSError(f"{len(fds)} descriptors where {expected} belong")
            if len(self._living) >= wire.MAX_CHILDREN:
                raise OSError(f"{wire.MAX_CHILDREN} children live already")
            self._fork(message, fds)
        except OSError as error:
            self._say(wire.Failed(child=message.child, message=error.strerror or str(error)))

    def _fork(self, message: wire.SpawnWorker | wire.SpawnProgram, fds: list[int]) -> None:
        is_worker = isinstance(message, wire.SpawnWorker)
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        errors, errors_in = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK) if is_worker else (-1, -1)
        try:
            if is_worker:
                pid = os.fork()
            else:
                # For the time of one fork: the child is process 1 of a new namespace, this process stays where it is.
                syscalls.unshare(syscalls.CLONE_NEWPID)
                try:
                    pid = os.fork()
                finally:
                    if os.getpid() == self._pid:
                        syscalls.setns(self._pid_namespace, syscalls.CLONE_NEWPID)
            if pid == 0:
                self._in_child(message, fds, theirs, errors_in)
        except OSError:
            ours.close()
            if is_worker:
                os.close(errors)
            raise
        finally:
            theirs.close()
            if is_worker:
                os.close(errors_in)
        child = Living(number=message.child, pid=pid, report=ours, stderr=errors)
        ours.setblocking(False)
        self._living[message.child] = child
        self._watch(ours.fileno(), lambda: self._on_report(child))
        if is_worker:
            self._watch(errors, lambda: self._on_stderr(child))

    # ---- from children

    def _on_wake(self) -> None:
        os.read(self._wake, 4096)
        self._reap()

    def _reap(self) -> None:
        by_pid = {child.pid: child for child in self._living.values()}
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            if pid in by_pid:
                self._bury(by_pid[pid], os.waitstatus_to_exitcode(status))

    def _bury(self, child: Living, code: int) -> None:
        while child.report is not None and self._on_report(child):
            pass
        while child.stderr >= 0 and self._on_stderr(child):
            pass
        self._close_report(child)
        self._close_stderr(child)
        del self._living[child.number]
        if child.started:
            self._say(wire.Exited(child=child.number, code=code if child.ended is None else child.ended))
        else:
            fault = child.fault or f"it ended with {code} before it was confined"
            self._say(wire.Failed(child=child.number, message=fault))

    def _on_report(self, child: Living) -> bool:
        """Take one message of the child about itself; False when there is none now."""
        assert child.report is not None
        try:
            data, _ = unix.recv(child.report, wire.MAX_MESSAGE, 0)
        except BlockingIOError:
            return False
        except (EOFError, ConnectionError):
            self._close_report(child)
            return False
        match wire.take_from_child(data):
            case wire.Started():
                child.started = True
                self._say(wire.Spawned(child=child.number, pid=child.pid))
            case wire.Faulted(message=message):
                child.fault = message
            case wire.Ended(code=code):
                child.ended = code
        return True

    def _on_stderr(self, child: Living) -> bool:
        """Pass on what a worker says, line by line, as long as it does not say too much; False when there is nothing now."""
        try:
            untrusted_data = os.read(child.stderr, 512)
        except BlockingIOError:
            return False
        child.stderr_left -= len(untrusted_data) + LINE_BYTES * untrusted_data.count(b"\n")
        *lines, child.stderr_text = (child.stderr_text + untrusted_data).split(b"\n")
        if not untrusted_data or child.stderr_left <= 0:
            lines.append(child.stderr_text)
            self._close_stderr(child)
        for line in lines:
            if line:
                text = "".join(c if c.isprintable() else "?" for c in line.decode(errors="replace"))
                self._say(wire.Said(child=child.number, untrusted_text=text[: wire.MAX_TEXT]))
        return True

    def _close_report(self, child: Living) -> None:
        if child.report is not None:
            self._unwatch(child.report.fileno())
            child.report.close()
            child.report = None

    def _close_stderr(self, child: Living) -> None:
        if child.stderr >= 0:
            self._unwatch(child.stderr)
            os.close(child.stderr)
            child.stderr = -1

    # ---- in the child

    def _in_child(
        self, message: wire.SpawnWorker | wire.SpawnProgram, fds: list[int], report: socket.socket, errors: int
    ) -> NoReturn:
        code = EX_OSERR
        try:
            signal.set_wakeup_fd(-1)
            if isinstance(message, wire.SpawnWorker):
                code = self._worker(message, fds[0], report, errors)
            else:
                code = self._program(message, fds, report)
        except OSError as error:
            _report(report, wire.Faulted(message=(error.strerror or str(error))[: wire.MAX_TEXT]))
        except BaseException as error:
            code = EX_SOFTWARE
            _report(report, wire.Faulted(message=f"{type(error).__name__}: {error}"[: wire.MAX_TEXT]))
        finally:
            os._exit(code)

    def _worker(self, message: wire.SpawnWorker, control: int, report: socket.socket, errors: int) -> int:
        """The life of a worker; returns its exit status."""
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for standard, fd in enumerate((self._null, errors, errors)):
            os.dup2(fd, standard)
        syscalls.set_name("nodeagent-seat")
        confine.join_cgroups(message.cgroup_procs)
        confine.become(message.uid, self._pid)
        confine.limit(message.limits)
        confine.hide()
        self._worker_filter.install()
        confine.close_all_but({0, 1, 2, control, report.fileno()})
        report.send(wire.put_message(wire.Started()))  # EPIPE: the zygote died before the pdeath signal was set
        report.close()
        gc.enable()
        return worker.main(socket.socket(fileno=control), self._services)

    def _program(self, message: wire.SpawnProgram, fds: list[int], report: socket.socket) -> int:
        """Process 1 of the program's pid namespace: confine, execute, pass signals on, reap, report."""
        signals = signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}
        signal.pthread_sigmask(signal.SIG_BLOCK, signals)
        syscalls.set_name("nodeagent-init")
        os.setsid()
        os.chdir("/")
        os.umask(0o077)
        confine.join_cgroups(message.cgroup_procs)
        confine.isolate(network=message.network, private_tmp_bytes=message.private_tmp_bytes, hidden=message.hidden)
        if message.uid is None:
            confine.die_with_parent(0)
        else:
            confine.become(message.uid, 0)
        confine.limit(message.limits)
        confine.hide()
        if message.uid is not None:
            self._program_filter.install()
        confine.close_all_but({0, 1, 2, *fds, report.fileno()})
        pid = _execute(message, fds, signals)
        confine.close_all_but({report.fileno()})
        report.send(wire.put_message(wire.Started()))
        while True:
            number = signal.sigwait(signals)
            if number in FORWARDED:
                os.kill(pid, number)
            elif number == signal.SIGCHLD and (code := _reap_until(pid)) is not None:
                _report(report, wire.Ended(code=code))
                return 0


def _execute(message: wire.SpawnProgram, fds: list[int], signals: set[signal.Signals]) -> int:
    """Start the program as a child of this process; returns its pid. Its environment's PATH is searched, as uid and all."""
    name = message.argv[0]
    candidates = [name] if "/" in name else [f"{d}/{name}" for d in message.env.get("PATH", os.defpath).split(":")]
    path = next((path for path in candidates if os.access(path, os.X_OK)), candidates[0])
    try:
        return os.posix_spawn(
            path,
            message.argv,
            message.env,
            file_actions=[(os.POSIX_SPAWN_DUP2, fd, standard) for standard, fd in enumerate(fds)],
            setsigmask=[],
            setsigdef=signals,
        )
    except OSError as error:
        raise OSError(error.errno, f"cannot execute {name}: {error.strerror}") from error


def _reap_until(pid: int) -> int | None:
    """Reap what has ended; the exit code of `pid` if it was among it."""
    while True:
        ended, status = os.waitpid(-1, os.WNOHANG)
        if ended == pid:
            return os.waitstatus_to_exitcode(status)
        if ended == 0:
            return None


def _report(report: socket.socket, message: wire.Message) -> None:
    try:
        report.send(wire.put_message(message))
    except OSError:
        pass  # the zygote is gone, and this process with it


def _warm_up() -> None:
    """Do once what every worker does first, so that its memory stays shared: 3.11 and later rewrite byte code as it runs."""
    for _ in range(3):
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with ours, theirs:
            ours.send(worker.GOODBYE)
            worker.main(theirs, {})
    time.localtime()  # reads /etc/localtime, which no worker can


def main(control: socket.socket) -> int:
    """The zygote process; returns its exit status."""
    gc.disable()
    setup = wire.take_to_zygote(unix.recv(control, wire.MAX_MESSAGE, 0)[0])
    if not isinstance(setup, wire.Setup):
        raise TypeError("the first message is no Setup")
    for number in IGNORED:
        signal.signal(number, signal.SIG_IGN)
    try:
        confine.die_with_parent(setup.parent)
        syscalls.set_name("nodeagent-zygote")
        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        most = confine.MAX_OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, confine.MAX_OPEN_FILES)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
        spawner = Spawner(control, setup)
        _warm_up()
        gc.freeze()  # unseen by the collector it stays shared; a collection before would leave holes for children to fill
    except Exception as error:
        control.send(wire.put_message(wire.Broken(message=f"{type(error).__name__}: {error}"[: wire.MAX_TEXT])))
        return EX_SOFTWARE
    control.send(wire.put_message(wire.Hello(pid=os.getpid())))
    spawner.run()
    return 0
