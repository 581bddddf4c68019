"""The device side of the clean-up hook: what is done to a device when a lease of it has ended.

Nothing that a holder left in a device may reach the next one, and nothing it left in the host may keep the device busy.
Every step makes sure that it still has the same device before it touches it, may be repeated, and is bounded: a device that
no longer answers costs its time-out, not the caller.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import functools
import logging
import os
import stat
from collections.abc import Callable, Iterator, Mapping
from enum import StrEnum
from pathlib import Path

import msgspec

from nodeagent.devices.conflicts import Mount, is_system, lies_on_top, mounts
from nodeagent.devices.slow_calls import SlowCalls
from nodeagent.errors import AgentError, Reason
from nodeagent.host import HostRoot
from nodeagent.model import Device, DeviceClass, DeviceNode, Give, UsbDevice

log = logging.getLogger(__name__)

USBDEVFS_RESET = 0x5514
"""_IO('U', 20), linux/usbdevice_fs.h: a port reset; the device keeps its number on the bus."""
BLKFLSBUF = 0x1261
"""_IO(0x12, 97), linux/fs.h: write what is dirty and forget what is cached. Needs CAP_SYS_ADMIN."""
MNT_DETACH, UMOUNT_NOFOLLOW = 0x2, 0x8
CLONE_FS, CLONE_NEWNS = 0x200, 0x20000
MAX_DETACHED = 64
STEP_TIMEOUT_S = 2.5
"""One step. A seat has 3 s to close; the flush of a slow stick goes on behind its back."""


class Step(StrEnum):
    PORT_RESET = "port_reset"
    FLUSH = "flush"


class StepReport(msgspec.Struct, frozen=True, kw_only=True):
    """What one step did, as a sentence; `error` when it could not."""

    step: Step
    did: str = ""
    error: AgentError | None = None


STEPS: Mapping[tuple[DeviceClass, Give], tuple[Step, ...]] = {
    (DeviceClass.UKEY, "node"): (Step.PORT_RESET,),
    (DeviceClass.USB, "node"): (Step.PORT_RESET,),
    (DeviceClass.STORAGE, "node"): (Step.FLUSH,),
    (DeviceClass.STORAGE, "block"): (Step.FLUSH,),
    (DeviceClass.STORAGE, "files"): (Step.FLUSH,),
    **{(cls, "usb"): (Step.PORT_RESET,) for cls in DeviceClass},
}
"""Class and way of giving -> steps; no row: none.

A key's PIN stays verified until its card loses power or is reset, and whoever held its node could leave any state in it.
Whoever had a device raw (`usb`) could have set any configuration, whatever its class. A printer or a sound card given by its
node has no such state, and a reset would end a print job of its firmware; services clean up behind themselves.
"""


def steps(cls: DeviceClass, give: Give) -> tuple[Step, ...]:
    """What is done to a device of this class that was given this way."""
    return STEPS.get((cls, give), ())


async def clean_up(
    host: HostRoot, device: Device, give: Give, slow: SlowCalls, *, timeout_s: float = STEP_TIMEOUT_S
) -> tuple[StepReport, ...]:
    """Every step that applies, one after the other, at most `timeout_s` each; never raises AgentError.

    A device that was unplugged, or is simulated, needs none.
    """
    if device.usb.simulated or not device.usb.sysfs:
        return ()
    reports = []
    for step in steps(device.cls, give):
        call: Callable[[], str] = functools.partial(
            {Step.PORT_RESET: port_reset, Step.FLUSH: flush}[step], host, device.usb
        )
        try:
            did = await slow(f"{step} of {device.id}", call, timeout_s=timeout_s)
            reports.append(StepReport(step=step, did=did))
            log.info("%s: %s", device.id, did)
        except AgentError as error:
            if error.reason is Reason.DEVICE_UNPLUGGED:
                reports.append(StepReport(step=step, did=f"nothing: {error.message}"))
            else:
                reports.append(StepReport(step=step, error=error))
                log.warning("%s was not cleaned up: %s", device.id, error)
    return tuple(reports)


def port_reset(host: HostRoot, usb: UsbDevice) -> str:
    """Reset the device at its port; its drivers are told or bound anew by the kernel.

    Raises AgentError: `device_unplugged` when it is not the device it was, else why the kernel refused.
    """
    node = usb.bus_node
    if node is None or host.attribute(f"{usb.sysfs}/dev") != f"{node.major}:{node.minor}":
        raise _gone(usb)
    with _opened(host, usb, node, os.O_RDWR) as fd:
        try:
            fcntl.ioctl(fd, USBDEVFS_RESET, 0)
        except OSError as error:
            # ENODEV: unplugged, or re-enumerated because its descriptors changed with the reset (usb_reset_device).
            raise _failed(usb, f"the port reset of {usb.port}", error) from error
    return f"reset port {usb.port}"


def flush(host: HostRoot, usb: UsbDevice) -> str:
    """Detach what the host still has mounted from the device, write what is dirty, forget what is cached.

    Raises AgentError: `device_unplugged`; `not_supported` when the node itself lives on it, in which case nothing was done.
    """
    left = mounts(host, usb)
    if system := [m.place for m in left if is_system(m.place)]:
        raise AgentError(
            Reason.NOT_SUPPORTED,
            f"the device at port {usb.port} holds {system[0]} of the node, so it was left alone",
            hint=f"take port {usb.port} out of devices.rules",
        )
    nodes = [n for n in usb.nodes if n.subsystem == "block"]
    if not nodes:
        return "nothing: it has no block device"
    flushed = []
    with contextlib.ExitStack() as stack:
        # Opened first: `detach` may take this thread to where the host's paths have other names.
        opened = [(n, stack.enter_context(_opened(host, usb, n, os.O_RDONLY))) for n in nodes]
        detached = detach(host, left)
        for node, fd in opened:
            try:
                os.fsync(fd)
                fcntl.ioctl(fd, BLKFLSBUF, 0)
            except OSError as error:
                raise _failed(usb, f"the flush of {node.path}", error) from error
            flushed.append(node.path)
    return "; ".join(
        part for part in (f"detached {', '.join(detached)}" * bool(detached), f"flushed {', '.join(flushed)}") if part
    )


def detach(host: HostRoot, left: tuple[Mount, ...]) -> list[str]:
    """Detach these mounts in the host's mount namespace; returns the places where that was done.

    Moves the calling thread into that namespace for good when it is in another one, so call it in a thread of its own.
    """
    if not left:
        return []
    libc = ctypes.CDLL(None, use_errno=True)
    done = []
    try:
        _enter_host_mounts(host, libc)
        # The last one mounted lies on top.
        for mount in left[: -MAX_DETACHED - 1 : -1]:
            if not lies_on_top(mount):
                continue  # something else was mounted over it, or it has gone
            if libc.umount2(os.fsencode(mount.place), MNT_DETACH | UMOUNT_NOFOLLOW) != 0:
                raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
            done.append(mount.place)
    except OSError as error:
        raise AgentError(
            Reason.INTERNAL,
            f"{left[-1].source} stays mounted on the host at {left[-1].place}: {error.strerror}",
            hint=f"umount --lazy {left[-1].place}",
        ) from error
    return done


def _enter_host_mounts(host: HostRoot, libc: ctypes.CDLL) -> None:
    with open(host.path("/proc/1/ns/mnt"), "rb") as namespace:
        theirs, ours = os.fstat(namespace.fileno()), os.stat("/proc/thread-self/ns/mnt")  # noqa: PTH116
        if (theirs.st_dev, theirs.st_ino) == (ours.st_dev, ours.st_ino):
            return
        # A thread shares its root and working directory with the others until it says no, and then may enter (setns(2)).
        if libc.unshare(CLONE_FS) != 0 or libc.setns(namespace.fileno(), CLONE_NEWNS) != 0:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


@contextlib.contextmanager
def _opened(host: HostRoot, usb: UsbDevice, node: DeviceNode, flags: int) -> Iterator[int]:
    """The node, proved to belong to this device: the numbers are given to the next one that is plugged in."""
    kind, right_type = ("block", stat.S_ISBLK) if node.kind == "b" else ("char", stat.S_ISCHR)
    try:
        fd = os.open(host.path(node.path), flags | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOFOLLOW)
    except FileNotFoundError:
        raise _gone(usb) from None
    except OSError as error:
        raise _failed(usb, f"opening {node.path}", error) from error
    try:
        status = os.fstat(fd)
        if not right_type(status.st_mode) or (os.major(status.st_rdev), os.minor(status.st_rdev)) != (
            node.major,
            node.minor,
        ):
            raise _gone(usb)
        if not _is_below(host.path(f"/sys/dev/{kind}/{node.major}:{node.minor}"), host.path(usb.sysfs)):
            raise _gone(usb)
        yield fd
    finally:
        os.close(fd)


def _is_below(link: Path, top: Path) -> bool:
    try:
        return link.resolve(strict=True).is_relative_to(top.resolve(strict=True))
    except (OSError, RuntimeError):
        return False


def _gone(usb: UsbDevice) -> AgentError:
    return AgentError(Reason.DEVICE_UNPLUGGED, f"the device at port {usb.port} was unplugged")


def _failed(usb: UsbDevice, what: str, error: OSError) -> AgentError:
    if isinstance(error, FileNotFoundError) or error.errno in (6, 19):  # ENXIO, ENODEV
        return _gone(usb)
    return AgentError(
        Reason.INTERNAL,
        f"{what} failed: {error.strerror}",
        hint=f"unplug the device at port {usb.port} and plug it in again",
    )
