"""A daemon with nothing but a zygote, two workers and two programs, run as a process of its own so that it can be killed.

Prints `ready` when everything lives. With `pid1` it is meant to be process 1 of a pid namespace.
"""

from __future__ import annotations

import asyncio
import os
import socket

from nodeagent.seats.zygote import Zygote
from nodeagent.transports.unix import Channel


async def main() -> None:
    null = os.open(os.devnull, os.O_RDWR)
    async with Zygote(services={"echo": "tests.fakes.seat_services:Echo"}) as zygote:
        channels = []
        for number in range(2):
            ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            with theirs:
                await zygote.spawn_worker(uid=0x7100_0000 + number, cgroup_procs=(), control=theirs, name=f"w{number}")
            channels.append(Channel(ours))
        for uid in (None, 0x7100_0000):
            # A shell with a child of its own that left its process group and ignores what it can.
            await zygote.spawn_program(
                ["/bin/sh", "-c", "trap '' TERM HUP; setsid sleep 600 & setsid sleep 600; true"],
                uid=uid, cgroup_procs=(), stdin=null, stdout=null, stderr=null, env={"PATH": "/usr/bin:/bin"},
                network=False, private_tmp_bytes=1 << 20,
            )  # fmt: skip
        print("ready", flush=True)
        await asyncio.Event().wait()


asyncio.run(main())
