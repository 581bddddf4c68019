"""In the guest: one step with the claims of this kernel's devices, as JSON on standard output. Each run is a process of its
own, so what the next one knows is what udevd and the rules file say, as after a crash of the agent.

    claims.py claim GIVE PORT...     offers these ports and nothing else, applies, says the problems
    claims.py untold GIVE PORT...    the same where udevd cannot be told to read its rules
    claims.py conflicts PORT         who on the host uses the device
    claims.py clean GIVE PORT        the device side of the clean-up hook

HOST_ROOT is where the host's root is, by default `/`.
"""

from __future__ import annotations

import asyncio
import os
import sys
import time
from collections.abc import Sequence

import msgspec

import device_plugins
from nodeagent.devices import sysfs
from nodeagent.devices.claims import Claims
from nodeagent.devices.clean_up import clean_up
from nodeagent.devices.conflicts import conflicts
from nodeagent.devices.slow_calls import SlowCalls
from nodeagent.devices.udevd import Udevd
from nodeagent.host import Finished, HostRoot
from nodeagent.model import Device, Grant, Offer

HOST = HostRoot(os.environ.get("HOST_ROOT", "/"))
OWNER = "0123abcd"


async def not_there(argv: Sequence[str]) -> Finished:
    raise FileNotFoundError(argv[0])


async def main(verb: str, *words: str) -> object:
    found = ((u, device_plugins.classify(u)) for u in sysfs.read_devices(HOST, sysfs.usb_paths(HOST), {}))
    devices = {u.port: Device(id=u.port, cls=cls, usb=u) for u, cls in found if cls}
    if verb == "conflicts":
        return conflicts(HOST, [devices[words[0]]])
    give, *ports = words
    if verb == "clean":
        begun = time.monotonic()
        reports = await clean_up(HOST, devices[ports[0]], give, SlowCalls(), timeout_s=20)
        return [(r.did, str(r.error or "")) for r in reports], time.monotonic() - begun
    udevd = Udevd(HOST, run=not_there) if verb == "untold" else Udevd(HOST)
    claims = Claims(HOST, OWNER, SlowCalls(), udevd=udevd)
    claims.set([Offer(device=devices[p], rule="", grant=Grant(), give=give) for p in ports], devices)
    begun = time.monotonic()
    problems = await claims.apply()
    return problems, time.monotonic() - begun


sys.stdout.buffer.write(msgspec.json.encode(asyncio.run(main(*sys.argv[1:]))))
