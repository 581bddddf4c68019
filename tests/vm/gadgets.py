"""USB devices that the guest's own kernel plays, on the loop-back controllers of dummy_hcd (gadget_configfs.rst of the kernel).

A gadget is described by a frozen value and made by a shell script of mkdir, printf and ln; binding it to a controller plugs
it in, unbinding unplugs it. Each of the six controllers is a bus of its own, so another controller is another port.

Seen on 6.1: what the printer function tells as its IEEE 1284 id loses its last two characters, hence the padding; audio
functions do not bind here, as dummy_hcd has no isochronous endpoints.
"""

from __future__ import annotations

import base64
import shlex
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import msgspec

from tests.vm.lab import Vm
from tests.vm.rootfs import LabFailed

CONTROLLERS = 6
PLACE = "/sys/kernel/config/usb_gadget"
VENDOR = 0x1D6B
"""The Linux Foundation, whose ids the kernel's own gadgets carry."""

FIDO_REPORT = bytes.fromhex("06d0f10901a1010920150026ff007508954081020921150026ff00750895409102c0")
"""The report descriptor of a FIDO authenticator: usage page F1D0, two reports of 64 bytes (CTAP 2.1, 11.2.8.1)."""
KEYBOARD_REPORT = bytes.fromhex(
    "05010906a101050719e029e71500250175019508810295017508810195057501"
    "050819012905910295017503910195067508150025650507190029658100c0"
)
"""The boot keyboard of HID 1.11, appendix E.6."""


class Function(msgspec.Struct, frozen=True, kw_only=True):
    """One function of a gadget: `hid.a`, and its attributes as configfs files."""

    name: str
    attributes: dict[str, str | bytes] = {}


class Gadget(msgspec.Struct, frozen=True, kw_only=True):
    """Two gadgets with one serial number are twins; without one a device is known by its port."""

    name: str
    product: int
    functions: tuple[Function, ...]
    serial: str = ""

    @property
    def usb_id(self) -> str:
        return f"{VENDOR:04x}:{self.product:04x}"


def printer(serial: str = "PRN1") -> Gadget:
    pnp = f"MFG:Lab;MDL:Virtual Printer;CLS:PRINTER;CMD:POSTSCRIPT,PDF;SN:{serial};  "
    function = Function(name="printer.a", attributes={"pnp_string": pnp, "q_len": "10"})
    return Gadget(name="printer", product=0xA4A8, functions=(function,), serial=serial)


def fido(name: str = "fido", serial: str = "FIDO1") -> Gadget:
    return Gadget(name=name, product=0x0407, functions=(_hid(f"hid.{name}", FIDO_REPORT, 64),), serial=serial)


def keyboard(serial: str = "KBD1") -> Gadget:
    function = _hid("hid.keyboard", KEYBOARD_REPORT, 8, boot_protocol=1)
    return Gadget(name="keyboard", product=0x0104, functions=(function,), serial=serial)


def stick(image: str, name: str = "stick", serial: str = "MSC1") -> Gadget:
    """A stick whose content is the file `image` of the guest."""
    attributes: dict[str, str | bytes] = {"lun.0/removable": "1", "lun.0/file": image}
    function = Function(name=f"mass_storage.{name}", attributes=attributes)
    return Gadget(name=name, product=0xA4A5, functions=(function,), serial=serial)


def _hid(name: str, report: bytes, length: int, boot_protocol: int = 0) -> Function:
    protocol = str(boot_protocol)
    attributes: dict[str, str | bytes] = {"protocol": protocol, "subclass": "1" if boot_protocol else "0"}
    return Function(name=name, attributes={**attributes, "report_length": str(length), "report_desc": report})


def script(gadget: Gadget) -> str:
    """What makes it, not yet bound."""
    top = f"{PLACE}/{gadget.name}"
    lines = [f"mkdir {top}", f"mkdir {top}/configs/c.1"]
    values: list[tuple[str, str | bytes]] = [
        ("idVendor", f"0x{VENDOR:04x}"), ("idProduct", f"0x{gadget.product:04x}"), ("bcdUSB", "0x0200"),
    ]  # fmt: skip
    if gadget.serial:
        lines.append(f"mkdir {top}/strings/0x409")
        texts = {"serialnumber": gadget.serial, "manufacturer": "Lab", "product": f"Lab {gadget.name}"}
        values += [(f"strings/0x409/{key}", text) for key, text in texts.items()]
    for function in gadget.functions:
        lines.append(f"mkdir {top}/functions/{function.name}")
        values += [(f"functions/{function.name}/{key}", value) for key, value in function.attributes.items()]
    lines += [_write(f"{top}/{key}", value) for key, value in values]
    lines += [f"ln -s {top}/functions/{f.name} {top}/configs/c.1/" for f in gadget.functions]
    return "\n".join(lines)


def _write(path: str, value: str | bytes) -> str:
    if isinstance(value, bytes):
        return f"printf %s {base64.b64encode(value).decode()} | base64 -d >{path}"
    return f"printf %s {shlex.quote(value)} >{path}"


class Bench:
    """The gadgets of one guest. `async with bench(vm)` makes it."""

    def __init__(self, vm: Vm) -> None:
        self._vm = vm
        self._at: dict[str, int] = {}
        self._made: dict[str, Gadget] = {}

    @property
    def plugged(self) -> tuple[Gadget, ...]:
        return tuple(self._made[name] for name in self._at)

    async def add(self, gadget: Gadget) -> None:
        """Make it; it is plugged in nowhere yet."""
        await self._vm.sh(script(gadget))
        self._made[gadget.name] = gadget

    async def plug(self, gadget: Gadget, controller: int = -1) -> int:
        """Bind it to a controller, by default the first that is free; the number of that controller."""
        free = [n for n in range(CONTROLLERS) if n not in self._at.values()]
        if controller < 0:
            if not free:
                raise LabFailed(f"all {CONTROLLERS} controllers of the guest are taken")
            controller = free[0]
        await self._vm.sh(f"echo dummy_udc.{controller} >{PLACE}/{gadget.name}/UDC")
        self._at[gadget.name] = controller
        return controller

    async def unplug(self, gadget: Gadget) -> None:
        await self._vm.sh(f"echo >{PLACE}/{gadget.name}/UDC")
        del self._at[gadget.name]

    async def remove(self, gadget: Gadget) -> None:
        """Unplug it if it is plugged in, and take it apart."""
        top = f"{PLACE}/{gadget.name}"
        if gadget.name in self._at:
            await self.unplug(gadget)
        lines = [f"rm {top}/configs/c.1/{f.name}" for f in gadget.functions]
        lines += [f"rmdir {top}/functions/{f.name}" for f in gadget.functions]
        await self._vm.sh(
            "\n".join([*lines, f"rmdir {top}/configs/c.1 {top}/strings/0x409 2>/dev/null || true", f"rmdir {top}"])
        )

    async def hid_node(self, gadget: Gadget) -> str:
        """The gadget's own end of its (first) HID function, `/dev/hidg0`."""
        number = await self._vm.sh(f"cat {PLACE}/{gadget.name}/functions/{gadget.functions[0].name}/dev")
        return "/dev/" + (await self._vm.sh(f"sed -n s/^DEVNAME=//p /sys/dev/char/{number.strip()}/uevent")).strip()

    async def port(self, controller: int) -> str:
        """The kernel's name of the port that a controller has, `3-1` (its root hub has one)."""
        found = await self._vm.sh(f"cat /sys/bus/platform/devices/dummy_hcd.{controller}/usb*/busnum")
        return f"{found.strip()}-1"


@asynccontextmanager
async def bench(vm: Vm) -> AsyncIterator[Bench]:
    """Load what gadgets need. They end with the guest."""
    await vm.sh(
        f"modprobe dummy_hcd num={CONTROLLERS} && modprobe libcomposite && "
        f"{{ mountpoint -q /sys/kernel/config || mount -t configfs configfs /sys/kernel/config; }}"
    )
    yield Bench(vm)
