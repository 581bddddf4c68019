"""CDI devices in real containers: found in the configured directories, and refused by name where they are not."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest

from nodeagent.demo.pods import ContainerSpec, PodSpec
from nodeagent.demo.runtime import StandInRuntime
from nodeagent.errors import AgentError, Reason

pytestmark = pytest.mark.root


async def test_a_container_with_a_cdi_device(short_tmp: Path) -> None:
    directory = short_tmp / "cdi"
    directory.mkdir()
    node = {"path": "/dev/given", "hostPath": "/dev/zero", "permissions": "r"}
    (directory / "x.json").write_text(
        json.dumps(
            {
                "cdiVersion": "0.5.0",
                "kind": "opencdi.io/ukey",
                "devices": [{"name": "ukey-a", "containerEdits": {"deviceNodes": [node], "env": ["GIVEN=yes"]}}],
            }
        )
    )
    box = ContainerSpec(
        name="desktop", args=("sh", "-c", "echo $GIVEN; head -c 2 /dev/given | od -An -tx1; stat -c %u /dev/given")
    )
    pod = PodSpec(name="desk", uid="uid-desk", handler="runc", containers=(box,))
    runtime = StandInRuntime(short_tmp / "rt", short_tmp / "cri.sock", cdi_dirs=[str(short_tmp / "no"), str(directory)])
    async with runtime:
        await runtime.run_pod(pod)
        started = await runtime.start_container(pod, box, cdi_devices=["opencdi.io/ukey=ukey-a"])
        async with asyncio.timeout(30):
            assert await runtime.wait(started) == 0, runtime.output(started)
        assert runtime.output(started).split() == ["yes", "00", "00", "1000"]
        with pytest.raises(AgentError, match=r"unresolvable CDI devices .*=gone") as refused:
            await runtime.start_container(pod, box, cdi_devices=["opencdi.io/ukey=ukey-a", "opencdi.io/ukey=gone"])
        assert refused.value.reason is Reason.DEVICE_UNKNOWN
        assert len(runtime.containers()) == 1
