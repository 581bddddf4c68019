"""One virtual machine: `async with Vm(Lab()) as vm`, then run commands in it, put and get files, plug and unplug.

The guest has the checkout at /repo and the Python packages of this environment at /site, both read-only over 9p. Its root is
a read-only directory under an overlay in memory, so nothing of a run is kept. Leaving the block ends QEMU and removes
everything that was made for it.
"""

from __future__ import annotations

import asyncio
import base64
import compileall
import contextlib
import os
import shlex
import shutil
import sysconfig
import tempfile
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any, Literal, Self, TypeVar

import msgspec

from tests.vm import rootfs
from tests.vm.initramfs import initramfs
from tests.vm.lines import Calls, Gone
from tests.vm.qmp import Qmp
from tests.vm.rootfs import LabFailed, Root

T = TypeVar("T")

REPOSITORY = Path(__file__).parents[2]
PLACES = f"/tmp/navm{os.getpid()}-"
"""How the directories of this process's guests begin; short, as Unix sockets are in them."""
BOOT_TIMEOUT_S = 180.0
"""6 s on a quiet machine with two cores, 20 s were seen on a busy one."""
RUN_TIMEOUT_S = 60.0
AGENT_GRACE_S = 30.0
"""Longer than what the guest is told, so that its own answer comes first."""
QUIT_TIMEOUT_S = 10.0
UNPLUG_TIMEOUT_S = 30.0
CHUNK_BYTES = 1 << 20
LOG_TAIL_BYTES = 256 << 10
KERNEL_ARGS = (
    *("console=ttyS0", "quiet", "loglevel=4", "panic=-1", "psi=1", "audit=0"),
    *("mitigations=off", "nokaslr", "random.trust_cpu=on", "tsc=reliable"),
)
"""psi=1: Debian compiles pressure stall information in and leaves it off (CONFIG_PSI_DEFAULT_DISABLED)."""


class Lab(msgspec.Struct, frozen=True, kw_only=True):
    """What is booted. A suite's kernel: bullseye 5.10, bookworm 6.1, trixie 6.12."""

    suite: str = "bookworm"
    packages: tuple[str, ...] = rootfs.PACKAGES

    def root(self, say: Callable[[str], object] = lambda _: None) -> Root:
        """Builds it when it is not there. Blocks; raises LabFailed."""
        return rootfs.obtain(self.suite, self.packages, say)


class Ran(msgspec.Struct, frozen=True, kw_only=True):
    """A command that ran in the guest to its end; 124 when its time was over. `cut`: it wrote more than the agent carries."""

    code: int
    stdout: bytes
    stderr: bytes
    cut: bool = False

    @property
    def text(self) -> str:
        return self.stdout.decode(errors="replace")


def qemu(
    root: Root,
    initrd: Path,
    *,
    memory_mib: int,
    cpus: int,
    shares: Mapping[str, Path],
    kernel_args: Sequence[str],
) -> list[str]:
    """The command line that every guest has in common: q35, an xHCI controller, the 9p shares. `shares`: guest path -> ours."""
    command = [
        *("qemu-system-x86_64", "-accel", "tcg,thread=multi", "-machine", "q35", "-cpu", "max"),
        *("-smp", str(cpus), "-m", str(memory_mib), "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"),
        *("-kernel", str(root.kernel), "-initrd", str(initrd)),
        *_share("root", root.directory),
        *("-device", "qemu-xhci,id=usb,p2=8,p3=8", "-device", "virtio-serial-pci,max_ports=16"),
    ]
    words = [*KERNEL_ARGS, *kernel_args]
    for number, (where, directory) in enumerate(shares.items()):
        command += _share(f"share{number}", directory)
        words.append(f"lab.share=share{number}:{where}")
    return [*command, "-append", " ".join(words)]


def checkout() -> dict[str, Path]:
    """The shares with which the guest can run nodeagent. An environment may be a link into another checkout."""
    return {"/repo": REPOSITORY, "/site": Path(sysconfig.get_paths()["purelib"]).resolve()}


def _compile() -> None:
    """Bytecode of ours beside its source, as running it here would leave it: the guest cannot write, and compiling everything
    at each start of Python takes it seconds."""
    for name in ("nodeagent", "device_plugins"):
        compileall.compile_dir(REPOSITORY / name, quiet=2)


def _share(tag: str, directory: Path) -> list[str]:
    path = str(directory).replace(",", ",,")
    return [
        *("-fsdev", f"local,id={tag},path={path},security_model=none,readonly=on,multidevs=remap"),
        *("-device", f"virtio-9p-pci,fsdev={tag},mount_tag={tag}"),
    ]


class Vm:
    """An async context manager. `ports` are further virtio-serial ports: we find their socket at `socket(name)`, the guest
    its end by the name. `logs` are ports that the guest only writes to: see `log_of(name)`.
    """

    def __init__(
        self,
        lab: Lab,
        *,
        memory_mib: int = 1536,
        cpus: int = 2,
        cgroup: Literal["v1", "v2"] = "v2",
        kernel_args: Sequence[str] = (),
        qemu_args: Sequence[str] = (),
        ports: Sequence[str] = (),
        logs: Sequence[str] = (),
        shares: Mapping[str, Path] = MappingProxyType({}),
        say: Callable[[str], object] = lambda _: None,
    ) -> None:
        self.boot_s = 0.0
        """From the start of QEMU to the agent's first word."""
        self.release = ""
        self._lab, self._say = lab, say
        self._memory_mib, self._cpus = memory_mib, cpus
        self._kernel_args = [f"lab.cgroup={cgroup}", *kernel_args]
        self._qemu_args = qemu_args
        self._ports, self._logs = tuple(ports), tuple(logs)
        self._shares = {**checkout(), **shares}
        self._group = asyncio.TaskGroup()
        self._stack = AsyncExitStack()
        self._up: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
        self._agent = Calls("the guest's agent", self._on_told)
        self._qmp = Qmp()
        self._names = 0

    async def __aenter__(self) -> Self:
        root = await asyncio.to_thread(self._lab.root, self._say)
        await asyncio.to_thread(_compile)
        async with AsyncExitStack() as stack:
            stack.enter_context(root.in_use())
            self.directory = Path(tempfile.mkdtemp(prefix=PLACES))
            stack.push_async_callback(asyncio.to_thread, shutil.rmtree, self.directory)
            await asyncio.to_thread(
                (self.directory / "initrd").write_bytes,
                await asyncio.to_thread(initramfs, root.directory, root.release),
            )
            await stack.enter_async_context(self._group)
            await self._start(stack, root)
            self._stack = stack.pop_all()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool | None:
        return await self._stack.__aexit__(kind, error, trace)

    # ---- commands and files

    async def run(
        self,
        argv: Sequence[str],
        *,
        timeout_s: float = RUN_TIMEOUT_S,
        stdin: bytes = b"",
        env: Mapping[str, str] = MappingProxyType({}),
        check: bool = True,
    ) -> Ran:
        """Run one command in the guest, as root, to its end. Raises LabFailed when it fails and `check` is true."""
        request = {"argv": [*argv], "timeout_s": timeout_s, "stdin": base64.b64encode(stdin).decode(), "env": {**env}}
        try:
            answer = await self._agent.call(request, timeout_s + AGENT_GRACE_S)
        except (Gone, TimeoutError) as error:
            raise LabFailed(f"{shlex.join(argv)}: no answer from the guest ({error!r})\n{self.log}") from error
        ran = Ran(
            code=answer["code"],
            stdout=base64.b64decode(answer["stdout"]),
            stderr=base64.b64decode(answer["stderr"]),
            cut=answer["cut"],
        )
        if check and ran.code:
            raise LabFailed(f"{shlex.join(argv)}: exit {ran.code}\n{ran.text}{ran.stderr.decode(errors='replace')}")
        return ran

    async def sh(self, script: str, **how: Any) -> str:
        """What a shell script in the guest prints."""
        return (await self.run(["sh", "-ec", script], **how)).text

    async def put(self, path: str, data: bytes, *, mode: int = 0o644) -> None:
        """Write a file of the guest."""
        quoted = shlex.quote(path)
        await self.sh(f"install -D -m {mode:o} /dev/null {quoted}")
        for at in range(0, len(data), CHUNK_BYTES):
            await self.sh(f"cat >>{quoted}", stdin=data[at : at + CHUNK_BYTES])

    async def get(self, path: str, *, limit_bytes: int = 64 << 20) -> bytes:
        """Read a file of the guest. Raises LabFailed when it is longer than `limit_bytes`."""
        data = bytearray()
        while True:
            part = await self.run(["dd", f"if={path}", "status=none", f"bs={CHUNK_BYTES}", "count=1",
                                   f"skip={len(data)}", "iflag=skip_bytes,fullblock"])  # fmt: skip
            data += part.stdout
            if len(data) > limit_bytes:
                raise LabFailed(f"{path} is longer than {limit_bytes} bytes")
            if len(part.stdout) < CHUNK_BYTES:
                return bytes(data)

    # ---- hardware

    async def plug(self, driver: str, **properties: object) -> str:
        """`device_add`: the id of the new device, which is `id` if that is given."""
        name = str(properties.pop("id", "")) or self.new_name(driver)
        await self._qmp.execute("device_add", driver=driver, id=name, **properties)
        return name

    async def unplug(self, device: str) -> None:
        """`device_del`; returns when QEMU has no such device any more."""
        gone = self._qmp.expect("DEVICE_DELETED", device)
        await self._qmp.execute("device_del", id=device)
        await self._qmp.answer(gone, UNPLUG_TIMEOUT_S)

    async def qmp(self, command: str, **arguments: Any) -> Any:
        """Any other command of QEMU; its `return`. Raises LabFailed."""
        return await self._qmp.execute(command, **arguments)

    def new_name(self, stem: str) -> str:
        self._names += 1
        return f"{stem}-{self._names}"

    # ---- what it says

    @property
    def log(self) -> str:
        """The end of the guest's console and of what QEMU itself complained about."""
        return f"{_tail(self.directory / 'console')}{_tail(self.directory / 'qemu')}"

    def log_of(self, name: str) -> str:
        """The end of what the guest has written to the log port of that name."""
        return _tail(self.directory / f"log-{name}")

    def socket(self, name: str) -> Path:
        """Where QEMU listens for the other end of a port."""
        return self.directory / f"port-{name}"

    # ---- its life

    async def _start(self, stack: AsyncExitStack, root: Root) -> None:
        begun = time.monotonic()
        command = [
            *qemu(
                root,
                self.directory / "initrd",
                memory_mib=self._memory_mib,
                cpus=self._cpus,
                shares=self._shares,
                kernel_args=self._kernel_args,
            ),
            *(
                "-serial",
                f"file:{self.directory}/console",
                "-audiodev",
                f"wav,id=audio,path={self.directory}/audio,out.frequency=48000",
            ),
            *("-qmp", f"unix:{self.directory}/qmp,server=on,wait=off"),
            *self._port_args(),
            *self._qemu_args,
        ]
        with (self.directory / "qemu").open("ab") as said:
            process = await asyncio.create_subprocess_exec(
                *("setpriv", "--pdeathsig", "KILL", "--", *command),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=said,
                stderr=said,
                start_new_session=True,  # Ctrl-C is for the test run, which ends the guest in its own order
            )
        stack.push_async_callback(self._stop, process)
        await self._unless_ended(process, self._boot())
        self.boot_s = time.monotonic() - begun

    def _port_args(self) -> list[str]:
        args = []
        for name in ("agent", *self._ports):
            args += ["-chardev", f"socket,id=port-{name},path={self.socket(name)},server=on,wait=off"]
            args += ["-device", f"virtserialport,chardev=port-{name},name=lab.{name}"]
        for name in self._logs:
            args += ["-chardev", f"file,id=log-{name},path={self.directory}/log-{name}"]
            args += ["-device", f"virtserialport,chardev=log-{name},name=lab.log.{name}"]
        return args

    async def _boot(self) -> None:
        for lines, name in ((self._qmp, "qmp"), (self._agent, "port-agent")):
            await lines.connect(self.directory / name)
            self._group.create_task(lines.run(), name=f"vm {name}")
        await self._qmp.execute("qmp_capabilities")
        self.release = (await self._agent.answer(self._up, BOOT_TIMEOUT_S))["release"]

    async def _unless_ended(self, process: asyncio.subprocess.Process, work: Awaitable[T]) -> T:
        """`work`, or LabFailed with what there is to read when QEMU ends or it takes too long."""
        ended, working = asyncio.ensure_future(process.wait()), asyncio.ensure_future(work)
        try:
            await asyncio.wait((ended, working), return_when=asyncio.FIRST_COMPLETED)
            if not working.done():
                raise LabFailed(f"QEMU ended with {process.returncode}\n{self.log}")
            try:
                return working.result()
            except (Gone, TimeoutError) as error:
                raise LabFailed(f"the guest did not come up ({error!r})\n{self.log}") from error
        finally:
            for task in (ended, working):
                task.cancel()
            await asyncio.wait((ended, working))

    async def _stop(self, process: asyncio.subprocess.Process) -> None:
        with contextlib.suppress(Gone, LabFailed, TimeoutError):
            await self._qmp.execute("quit")
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(QUIT_TIMEOUT_S):
                await process.wait()
        if process.returncode is None:
            process.kill()
            await process.wait()

    def _on_told(self, message: dict[str, Any]) -> None:
        if "up_s" in message and not self._up.done():
            self._up.set_result(message)


def _tail(path: Path) -> str:
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - LOG_TAIL_BYTES))
            return file.read().decode(errors="replace")
    except OSError:
        return ""
