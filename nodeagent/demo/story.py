"""The main job, told step by step as it happens: two desktops, their printers, and what one cannot do to the other.

The kubelet and the container runtime are stand-ins; all between them is the real thing: the daemon, its cupsd, runsc, and the
stock CUPS client in the desktops. A step returns one line of detail or raises; see `telling` for how that is shown.
"""

from __future__ import annotations

import asyncio
import os
import signal
import time
import uuid
from contextlib import AsyncExitStack
from importlib.resources import files
from pathlib import Path
from typing import Any

import msgspec

from nodeagent.demo import scene
from nodeagent.demo.kubelet import StandInKubelet
from nodeagent.demo.pods import ContainerNotStarted, ContainerSpec, PodSpec, RunOptions
from nodeagent.demo.runtime import StandInRuntime
from nodeagent.demo.telling import Say, Step, Summary, Tell, Telling, say_error
from nodeagent.documents import DevicesDocument, SeatRow, SeatsDocument, StatusDocument
from nodeagent.errors import AgentError, Reason
from nodeagent.host import Finished, run
from nodeagent.model import SeatState

READY_S = 20.0
TO_PDF = "gs -q -dSAFER -dBATCH -dNOPAUSE -sDEVICE=pdfwrite -sOutputFile=/tmp/page.pdf - && lp -t demo /tmp/page.pdf"
PRINT_S = 60.0
RELEASE_S = 15.0
COUNTED_S = 10.0
"""Workers tell their counters once a second."""
JOB_IS_OPEN = 4
"""job-state `pending-held`: it waits for its document (RFC 8011 5.3.7)."""

PRINTERS = ("A-1", "B-1", "B-2")
"""Serials. Team B has two, so that a desktop which may not have one can be offered the free one."""
DEVICES: dict[str, object] = {
    "simulated": [{"model": "printer", "serial": serial} for serial in PRINTERS],
    "rules": [
        {
            "name": "printer-of-a",
            "match": {"class": "printer", "serial": "A-*", "simulated": True},
            "resource": "printer-a",
            "to": {"namespaces": ["team-a"]},
        },
        {
            "name": "printers-of-b",
            "match": {"class": "printer", "serial": "B-*", "simulated": True},
            "resource": "printer-b",
            "to": {"namespaces": ["team-b"], "labels": {"floor": "2"}},
        },
    ],
}
IDLE = ("sh", "-c", "trap 'exit 0' TERM; while :; do sleep 3600 & wait $!; done")
SOCKET_PLACES = ["/run", "/var", "/tmp", "/dev"]  # noqa: S108
"""Where the intruder looks for sockets, inside its desktop."""
BOX = "desktop"
SOCKET = "ipp.sock"


def desktop(team: str, name: str, floor: str) -> PodSpec:
    """A gVisor desktop that asks for one printer of its team."""
    return PodSpec(
        namespace=f"team-{team}",
        name=name,
        uid=str(uuid.uuid4()),
        labels={"app": "desktop", "floor": floor},
        handler="runsc",
        containers=(ContainerSpec(name=BOX, limits={f"{scene.DOMAIN}/printer-{team}": 1}, args=IDLE),),
    )


class Attempt(msgspec.Struct, frozen=True):
    """One line of what `intruder` reports. `ipp`: the seat's filter has to refuse and count it."""

    attempt: str
    refused: bool
    ipp: bool
    answer: str


class Story:
    """The steps in their order. What they start enters `stack`; leaving it ends all of it."""

    def __init__(self, stack: AsyncExitStack, where: scene.Places, say: Say) -> None:
        self.steps: tuple[Step, ...] = (
            Step("prepare", self.prepare),
            Step("inventory", self.inventory, ("prepare",)),
            Step("register", self.register, ("prepare",)),
            Step("allocate", self.allocate, ("register",)),
            Step("bind", self.bind, ("allocate",)),
            Step("print", self.print, ("bind",)),
            Step("isolation", self.isolation, ("bind",)),
            Step("identity", self.identity, ("register",)),
            Step("metrics", self.metrics, ("bind",)),
        )
        self.last = Step("release", self.release, ("allocate",))
        self._stack = stack
        self._where = where
        self._say = say
        self._a, self._b = desktop("a", "desk-a", "1"), desktop("b", "desk-b", "2")
        self._ids: dict[str, str] = {}  # pod uid -> container id
        self._port = 0

    # ---- steps

    async def prepare(self) -> str:
        """The stand-ins and the daemon, up to the daemon's first answer."""
        if os.geteuid() != 0:
            raise AgentError(Reason.NOT_RUNNING, "the demonstration needs root: namespaces, cgroups, uids", hint="sudo")
        if missing := scene.missing_tools():
            raise AgentError(
                Reason.UPSTREAM_UNAVAILABLE,
                f"not installed: {', '.join(missing)}",
                hint=f"apt-get install {' '.join(missing)}",
            )
        if await scene.kubelet_runs():
            self._say("a kubelet runs on this node; it is left alone, a stand-in beside it plays its part here")
        else:
            self._say("no kubelet runs on this node: a stand-in plays its part")
        where = self._where
        self._port = scene.free_port()
        where.config.write_text(scene.configuration(where, self._port, DEVICES))
        hidden = [str(where.base), str(where.kept)]
        runtime = StandInRuntime(where.base / "runtime", where.cri, hidden=hidden)
        self._runtime = await self._stack.enter_async_context(runtime)
        kubelet = StandInKubelet(where.device_plugins, where.pod_resources, self._start_container)
        self._kubelet = await self._stack.enter_async_context(kubelet)
        self._daemon = scene.Daemon(where, self._port)
        await self._stack.enter_async_context(self._daemon.running())
        self._stack.push_async_callback(self._end_all)
        self._say(f"the daemon runs with {where.config}, its log is {where.log}")

        async def answers() -> StatusDocument | None:
            status = await self._status()
            return status if status.role == "active" else None

        status = await self._daemon.until("the daemon's first answer", answers, READY_S)
        return f"nodeagent {status.version} runs as pid {status.pid}"

    async def inventory(self) -> str:
        """Every simulated printer is there and says that it is one."""

        async def seen() -> DevicesDocument | None:
            document = await self._daemon.ask("devices", DevicesDocument)
            return document if sum(d.simulated for d in document.devices) >= len(PRINTERS) else None

        found = (await self._daemon.until("the inventory of simulated printers", seen, READY_S)).devices
        for device in found:
            mark = ", simulated" if device.simulated else ""
            offered = f"offered as {device.resource}" if device.resource else f"not offered: {device.unoffered}"
            self._say(f"{device.id} ({device.name}{mark}) {offered}")
        simulated = [d for d in found if d.simulated]
        _check(all(d.resource and d.present for d in simulated), "a simulated printer is not offered or not present")
        return f"{len(simulated)} simulated printers, {len(found) - len(simulated)} real devices"

    async def register(self) -> str:
        wanted = {f"{scene.DOMAIN}/printer-a": 1, f"{scene.DOMAIN}/printer-b": 2}

        async def listed() -> bool | None:
            return all(len(self._kubelet.allocatable(name)) == count for name, count in wanted.items()) or None

        await self._daemon.until("registration with the kubelet", listed, READY_S)
        return "the kubelet can allocate " + ", ".join(f"{n} x {name}" for name, n in wanted.items())

    async def allocate(self) -> str:
        for pod in (self._a, self._b):
            await self._kubelet.admit(pod)
            self._say(f"{pod.namespace}/{pod.name} was given {', '.join(self._held(pod))}")
        return "two desktops admitted"

    async def bind(self) -> str:
        """The desktops start in gVisor, and each has a seat with its own device."""
        for pod in (self._a, self._b):
            await self._start(pod)
            self._say(f"{pod.namespace}/{pod.name} runs in gVisor as {self._ids[pod.uid][:12]}")

        async def live() -> list[SeatRow] | None:
            seats = [await self._seat(pod) for pod in (self._a, self._b)]
            found = [s for s in seats if s is not None and s.state is SeatState.LIVE]
            return found if len(found) == len(seats) else None

        seats = await self._daemon.until("binding of both seats", live, READY_S)
        for pod, seat in zip((self._a, self._b), seats, strict=True):
            _check({d.id for d in seat.devices} == set(self._held(pod)), f"seat {seat.pod} has other devices")
        workers = ", ".join(f"pid {s.worker.pid} uid {s.worker.uid}" for s in seats if s.worker)
        return f"two live seats, each with an unprivileged worker of its own ({workers})"

    async def print(self) -> str:
        """A PDF, converted on its way, and PostScript, byte for byte, from the stock client to the right printer."""
        output = self._where.output("A-1")
        (name,) = await self._printers(self._a)
        marker = f"page-{uuid.uuid4().hex[:12]}"
        source = f"%!PS\n/Helvetica findfont 24 scalefont setfont 72 700 moveto ({marker}) show showpage\n"
        pdf = (await self._in(self._a, ["sh", "-c", TO_PDF], source.encode(), must=True)).stdout
        self._say(f"desk-a: {TO_PDF}: {_first(pdf)}")

        async def page() -> str | None:
            if not output.exists() or not output.stat().st_size:
                return None
            read = await run(["gs", "-q", "-dBATCH", "-dNOPAUSE", "-sDEVICE=txtwrite", "-sOutputFile=-", str(output)])
            return read.stdout if marker in read.stdout else None

        await self._daemon.until(f"the page in {output}", page, PRINT_S)
        size = output.stat().st_size
        _check(output.read_bytes().startswith(b"%!PS"), f"{output} is not PostScript")
        self._say(f"desktop A printed a PDF on {name}; {size} bytes of PostScript are in {output}")
        for pod, serials in ((self._a, ("A-1",)), (self._b, ("B-1", "B-2"))):
            (name,) = await self._printers(pod)
            document = f"%!PS-Adobe-3.0\n%%Title: {uuid.uuid4()}\n%%Pages: 1\nshowpage\n%%EOF\n".encode()
            await self._lp(pod, name, document)

            async def arrived(document: bytes = document, serials: tuple[str, ...] = serials) -> bool | None:
                return any(document in self._output(s) for s in serials) or None

            await self._daemon.until(f"the job of {pod.name} at its printer", arrived, PRINT_S)
            others = [s for s in PRINTERS if s not in serials]
            _check(not any(document in self._output(s) for s in others), f"the job of {pod.name} is at {others} too")
        return f"the page of desktop A is at its printer ({size} bytes); PostScript arrived unchanged from A and B"

    async def isolation(self) -> str:
        """Desktop B sees its own printer only; all that it tries against A's is refused, and counted."""
        (own,), (other,) = await self._printers(self._b), await self._printers(self._a)
        _check(own != other, f"both desktops see a printer named {own}")
        job = int(await self._intruder(self._a, "open", {"own": other}))
        before, denied = self._output("A-1"), await self._denied()
        tried = await self._in(self._b, ["lp", "-d", other, "-"], b"not for you\n")
        _check(tried.code != 0, f"desktop B could print on {other}")
        self._say(f"desktop B: lp -d {other}: {_first(tried.stderr)}")
        where = self._where
        paths = [
            f"/run/opencdi/printer-a/{SOCKET}",
            *(str(p) for p in sorted(where.slots.glob(f"*/{SOCKET}"))),
            *(str(p) for p in (where.cri, where.pod_resources, where.run / "nodeagent.sock", where.run / "cups")),
        ]
        given = {"own": own, "other": other, "job": job, "paths": paths, "search": SOCKET_PLACES}
        text = await self._intruder(self._b, "attack", given)
        attempts = msgspec.json.decode(text, type=list[Attempt])
        for attempt in attempts:
            self._say(f"desktop B: {attempt.attempt}: {'refused' if attempt.refused else 'DONE'} ({attempt.answer})")
        done = [a.attempt for a in attempts if not a.refused]
        _check(not done, f"desktop B could: {', '.join(done)}")
        state = int(await self._intruder(self._a, "state", {"own": other, "job": job}))
        _check(state == JOB_IS_OPEN, f"the job of desktop A is in state {state} now")
        _check(self._output("A-1") == before, "something was printed on the printer of desktop A")
        await self._in(self._a, ["cancel", f"{other}-{job}"], must=True)
        due = sum(a.ipp for a in attempts)

        async def counted() -> float | None:
            more = await self._denied() - denied
            return more if more >= due else None

        more = await self._daemon.until(f"counting of {due} refused attempts", counted, COUNTED_S)
        return f"desktop B sees only {own}; {len(attempts) + 1} attempts refused, {more:.0f} counted as denied"

    async def identity(self) -> str:
        """A desktop whose labels do not fit is refused before its container starts."""
        pod = desktop("b", "desk-c", "3")
        await self._kubelet.admit(pod)
        self._say(f"{pod.namespace}/{pod.name} was given {', '.join(self._held(pod))}, but it is on floor 3")
        try:
            await self._start(pod)
        except ContainerNotStarted as error:
            why = str(error)
        else:
            raise AgentError(Reason.INTERNAL, f"desktop {pod.name} was started with a printer it may not have")
        finally:
            await self._end(pod)
        _check("floor" in why, f"desktop {pod.name} was refused for another reason: {why}")
        seat = await self._seat(pod)
        _check(seat is None or seat.state is SeatState.REQUESTED, f"desktop {pod.name} has a seat all the same")
        denied = (await self._daemon.metrics()).get(("nodeagent_denied_total", Reason.LABELS_DO_NOT_MATCH.value), 0)
        _check(denied > 0, "the refusal was not counted")
        return f"not started: {why.partition('desc = ')[2] or why}"

    async def metrics(self) -> str:
        values = await self._daemon.metrics()

        def total(name: str, label: str = "") -> float:
            return sum(v for (n, labels), v in values.items() if n == f"nodeagent_{name}" and label in labels)

        devices, live = total("devices", "simulated=true"), total("seats", SeatState.LIVE.value)
        allocations, registrations = total("allocations_total", "result=ok"), total("registrations_total")
        denied, jobs, moved = total("denied_total"), total("print_jobs_total"), total("seat_bytes_total")
        shown = (
            f"{devices:.0f} simulated devices, {registrations:.0f} registrations, {allocations:.0f} allocations,"
            f" {live:.0f} live seats, {jobs:.0f} print jobs, {moved:.0f} bytes moved, {denied:.0f} denied"
        )
        _check(min(devices, registrations, allocations, live, moved) > 0, f"/metrics misses something: {shown}")
        return shown

    async def release(self) -> str:
        """The desktops end; their leases, seats and directories end with them."""
        for pod in (self._a, self._b):
            await self._end(pod)
        self._say("both desktops have ended")

        async def gone() -> bool | None:
            seats = (await self._daemon.ask("seats", SeatsDocument)).seats
            leases = (await self._status()).leases
            return None if leases or any(s.state is not SeatState.CLOSED for s in seats) else True

        await self._daemon.until("the end of every lease and seat", gone, RELEASE_S)
        left = sorted(p.name for p in self._where.slots.iterdir())
        _check(not left, f"slot directories are left: {', '.join(left)}")
        return "no lease, no seat, no slot directory is left"

    def hints(self) -> list[str]:
        """What a person may try meanwhile, as lines."""
        command = " ".join(self._daemon.command())
        where = self._where
        lines = [f"  {command} {verb}" for verb in ("status", "devices", "seats")]
        lines += [f"  curl http://127.0.0.1:{self._port}/metrics", f"  tail -f {where.log}"]
        if self._a.uid in self._ids:
            inside = " ".join(self._runtime.command(self._ids[self._a.uid], "lpstat", "-v"))
            lines += [f"  {inside}", f"  less {where.output('A-1')}"]
        return ["the desktops stay; in another terminal, as root:", *lines, "Ctrl-C ends everything"]

    def log_tail(self) -> list[str]:
        """The end of the daemon's log, for a story that went wrong."""
        log = self._where.log
        if not log.exists():
            return []
        return [f"the end of {log}:", *(f"  {line}" for line in log.read_text(errors="replace").splitlines()[-20:])]

    # ---- what steps are made of

    async def _start_container(self, pod: PodSpec, container: ContainerSpec, options: RunOptions) -> None:
        self._ids[pod.uid] = await self._runtime.start_container(
            pod, container, options.env, options.mounts, options.nodes, options.cdi
        )

    async def _start(self, pod: PodSpec) -> None:
        """Sandbox, PreStartContainer, container: the order of a kubelet."""
        await self._runtime.run_pod(pod)
        await self._kubelet.start_container(pod, BOX)

    async def _end_all(self) -> None:
        """While the daemon still sees them go."""
        for pod in tuple(self._kubelet.pods.values()):
            await self._end(pod)

    async def _end(self, pod: PodSpec) -> None:
        await self._runtime.stop_pod(pod)
        self._kubelet.delete(pod)
        self._ids.pop(pod.uid, None)

    def _held(self, pod: PodSpec) -> tuple[str, ...]:
        (resource,) = pod.containers[0].limits
        return self._kubelet.held(pod, BOX, resource)

    async def _status(self) -> StatusDocument:
        return await self._daemon.ask("status", StatusDocument)

    async def _seat(self, pod: PodSpec) -> SeatRow | None:
        seats = (await self._daemon.ask("seats", SeatsDocument)).seats
        return next((s for s in seats if s.pod.uid == pod.uid), None)

    async def _denied(self) -> float:
        values = await self._daemon.metrics()
        return sum(value for (name, _), value in values.items() if name == "nodeagent_denied_total")

    async def _in(self, pod: PodSpec, argv: list[str], stdin: bytes = b"", *, must: bool = False) -> Finished:
        """Run a program in the desktop. `must`: raise when it fails."""
        finished = await self._runtime.exec(self._ids[pod.uid], argv, stdin=stdin)
        if must and finished.code:
            raise AgentError(Reason.INTERNAL, f"{argv[0]} in {pod.name}: {_first(finished.stderr or finished.stdout)}")
        return finished

    async def _printers(self, pod: PodSpec) -> list[str]:
        """What the desktop's stock CUPS client sees; exactly one is right here."""
        names = (await self._in(pod, ["lpstat", "-e"], must=True)).stdout.split()
        _check(len(names) == 1, f"{pod.name} sees {len(names)} printers: {', '.join(names)}")
        return names

    async def _lp(self, pod: PodSpec, printer: str, document: bytes) -> None:
        said = (await self._in(pod, ["lp", "-d", printer, "-t", "demo", "-"], document, must=True)).stdout
        self._say(f"{pod.name}: lp -d {printer}: {_first(said)}")

    async def _intruder(self, pod: PodSpec, verb: str, given: dict[str, Any]) -> str:
        script = files("nodeagent.demo").joinpath("intruder.py").read_text()
        words = ["python3", "-c", script, verb, msgspec.json.encode(given).decode()]
        return (await self._in(pod, words, must=True)).stdout

    def _output(self, serial: str) -> bytes:
        path = self._where.output(serial)
        return path.read_bytes() if path.exists() else b""


async def perform(*, once: bool, keep: Path | None, say: Say, tell: Tell) -> Summary:
    """Play the story and take everything down again. Unless `once`, it stays before the last step until SIGINT or SIGTERM;
    a signal before that skips the rest."""
    telling = Telling(tell)
    act = asyncio.current_task()
    assert act is not None
    over = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, act.cancel)
    began_s = time.monotonic()
    try:
        async with AsyncExitStack() as stack:
            where = await stack.enter_async_context(scene.places(keep))
            story = Story(stack, where, say)
            try:
                await telling.play(story.steps)
                if not once and telling.outcomes[0].ok:
                    for number in (signal.SIGINT, signal.SIGTERM):
                        loop.add_signal_handler(number, over.set)
                    for line in story.hints():
                        say(line)
                    await over.wait()
                await telling.play((story.last,))
                if not telling.summary().ok:
                    for line in story.log_tail():
                        say(line)
            except asyncio.CancelledError:
                act.uncancel()
            began_s = time.monotonic()
            for number in (signal.SIGINT, signal.SIGTERM):
                loop.add_signal_handler(number, say, "everything is being taken down already")
    except Exception as error:
        telling.note("teardown" if telling.outcomes else "prepare", False, began_s, say_error(error))
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(number)
    return telling.summary()


def _first(text: str) -> str:
    return (text.strip().splitlines() or ["no word"])[0]


def _check(good: bool, otherwise: str) -> None:
    if not good:
        raise AgentError(Reason.INTERNAL, otherwise)
