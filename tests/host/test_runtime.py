"""The stand-in runtime over the real runc and runsc: containers as a kubelet and nodeagent see them."""

from __future__ import annotations

import asyncio
import json
import os
import socket
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import pytest

from nodeagent import rpc, sandboxes
from nodeagent.demo.bundles import cgroup_roots
from nodeagent.demo.pods import ContainerSpec, NodeSpec, PodSpec
from nodeagent.demo.records import State
from nodeagent.demo.runtime import StandInRuntime
from nodeagent.devices.cri import Cri
from nodeagent.devices.plugin import MountSpec
from nodeagent.errors import AgentError, Reason
from nodeagent.host import HostRoot
from nodeagent.wire.pb.cri.v1 import api_pb2 as pb

pytestmark = pytest.mark.root

LIVE = ("sh", "-c", "trap 'exit 0' TERM; while :; do sleep 3600 & wait $!; done")
HANDLERS = ["runc", "runsc"]


def pod_of(handler: str, uid: str = "11111111-2222-3333-4444-555555555555") -> PodSpec:
    return PodSpec(
        namespace="team-a", name="desk-a", uid=uid, labels={"app": "desktop"}, handler=handler, containers=(box(),)
    )


def box(args: tuple[str, ...] = LIVE) -> ContainerSpec:
    return ContainerSpec(name="desktop", args=args)


@pytest.fixture
async def runtime(short_tmp: Path) -> AsyncIterator[StandInRuntime]:
    async with StandInRuntime(short_tmp / "rt", short_tmp / "cri.sock") as runtime:
        yield runtime
    assert not list((short_tmp / "rt").iterdir())


@pytest.fixture(params=HANDLERS)
def pod(request: pytest.FixtureRequest) -> PodSpec:
    return pod_of(request.param)


def sh(script: str) -> ContainerSpec:
    return box(("sh", "-c", script))


async def ran(runtime: StandInRuntime, pod: PodSpec, script: str, **how: object) -> str:
    """What a container that runs only this script has said."""
    await runtime.run_pod(pod)
    started = await runtime.start_container(pod, sh(script), **how)  # type: ignore[arg-type]
    async with asyncio.timeout(30):
        await runtime.wait(started)
    return runtime.output(started)


async def test_exit_code_and_output(runtime: StandInRuntime, pod: PodSpec) -> None:
    await runtime.run_pod(pod)
    started = await runtime.start_container(pod, sh("echo out; echo err >&2; exit 7"))
    assert await runtime.wait(started) == 7
    assert sorted(runtime.output(started).split()) == ["err", "out"]
    (record,) = runtime.containers()
    assert record.state is State.EXITED
    assert record.exit_code == 7
    assert record.finished_ns >= record.created_ns > 0


async def test_exec_has_the_containers_user_and_variables(runtime: StandInRuntime, pod: PodSpec) -> None:
    await runtime.run_pod(pod)
    started = await runtime.start_container(pod, box(), env={"CUPS_SERVER": "/a"})
    done = await runtime.exec(
        started,
        ["sh", "-c", "id -u; id -g; pwd; echo $CUPS_SERVER; grep CapEff /proc/self/status; cat; echo bad >&2; exit 3"],
        stdin=b"in",
    )
    assert done.stdout.split() == ["1000", "1000", "/tmp", "/a", "CapEff:", "0000000000000000", "in"]
    assert (done.code, done.stderr.strip()) == (3, "bad")


async def test_root_is_read_only_and_the_machine_is_out_of_sight(
    runtime: StandInRuntime, pod: PodSpec, short_tmp: Path
) -> None:
    secret = Path("/var/tmp") / f"nodeagent-test-{os.getpid()}"
    secret.write_text("secret")
    try:
        script = (
            f"touch /etc/x 2>/dev/null || echo ro; cat {secret} {short_tmp}/cri.sock 2>/dev/null || echo hidden;"
            "touch /tmp/x && echo scratch; grep -c : /proc/net/dev; grep CapEff /proc/self/status; echo /run/*"
        )
        said = await ran(runtime, pod, script)
    finally:
        secret.unlink()
    assert said.split() == ["ro", "hidden", "scratch", "1", "CapEff:", "0000000000000000", "/run/*"]


async def test_a_mount_is_read_only_and_missing_host_paths_are_made(
    runtime: StandInRuntime, pod: PodSpec, short_tmp: Path
) -> None:
    slot = short_tmp / "slots" / "s"
    slot.mkdir(parents=True)
    (slot / "slot.json").write_text("{}")
    slot.parent.chmod(0o700)
    missing = short_tmp / "gone" / "deep"
    mounts = [
        MountSpec(container_path="/run/opencdi/printer", read_only=True, host_path=str(slot)),
        MountSpec(container_path="/run/opencdi/printer", read_only=True, host_path="/etc"),
        MountSpec(container_path="/run/opencdi/none", read_only=True, host_path=str(missing)),
    ]
    script = "cd /run/opencdi; cat printer/slot.json; touch printer/x 2>/dev/null || echo ro; find . | sort"
    said = await ran(runtime, pod, script, mounts=mounts)
    assert said.split() == ["{}ro", ".", "./none", "./printer", "./printer/slot.json"]
    assert missing.is_dir()
    assert not list(missing.iterdir())


async def test_a_socket_in_a_mounted_directory_can_be_connected_to(
    runtime: StandInRuntime, pod: PodSpec, short_tmp: Path
) -> None:
    slot = short_tmp / "s"
    slot.mkdir()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(slot / "ipp.sock"))
        (slot / "ipp.sock").chmod(0o666)
        listener.listen()
        listener.setblocking(False)
        client = (
            "import socket; s = socket.socket(socket.AF_UNIX); s.connect('/run/opencdi/p/ipp.sock');"
            "s.sendall(b'hello'); print(s.recv(9).decode())"
        )
        await runtime.run_pod(pod)
        started = await runtime.start_container(
            pod,
            box(("/usr/bin/python3", "-c", client)),
            mounts=[MountSpec(container_path="/run/opencdi/p", read_only=True, host_path=str(slot))],
        )
        loop = asyncio.get_running_loop()
        async with asyncio.timeout(30):
            peer, _ = await loop.sock_accept(listener)
            with peer:
                assert await loop.sock_recv(peer, 9) == b"hello"
                await loop.sock_sendall(peer, b"welcome")
            assert await runtime.wait(started) == 0
    assert runtime.output(started).strip() == "welcome"


async def test_a_device_node_is_there_under_runc(runtime: StandInRuntime) -> None:
    nodes = [NodeSpec(container_path="/dev/lp7", host_path="/dev/zero", permissions="r")]
    said = await ran(runtime, pod_of("runc"), "head -c 3 /dev/lp7 | od -An -tx1; ls -l /dev/lp7 | cut -c1", nodes=nodes)
    assert said.split() == ["00", "00", "00", "c"]
    with pytest.raises(AgentError, match="not a device node"):
        await runtime.start_container(
            pod_of("runc"), box(), nodes=[NodeSpec(container_path="/dev/x", host_path="/etc/hostname", permissions="r")]
        )


async def test_cri_as_the_daemon_reads_it(runtime: StandInRuntime, pod: PodSpec) -> None:
    async with Cri(HostRoot("/"), str(runtime.socket)) as cri:
        sandbox = await runtime.run_pod(pod)
        (seen,) = await cri.sandboxes()
        assert (seen.id, seen.ready, seen.labels, seen.handler) == (sandbox, True, {"app": "desktop"}, pod.handler)
        assert (seen.pod.namespace, seen.pod.name, seen.pod.uid) == (pod.namespace, pod.name, pod.uid)
        assert await cri.containers() == ()

        started = await runtime.start_container(
            pod, box(), mounts=[MountSpec(container_path="/run/a", read_only=True, host_path="/etc/apt")]
        )
        (seen_box,) = await cri.containers()
        assert (seen_box.id, seen_box.sandbox_id, seen_box.name) == (started, sandbox, "desktop")
        assert seen_box.mounts["/run/a"] == "/etc/apt"
        assert started in Path(f"/proc/{seen_box.pid}/cgroup").read_text()
        kind = sandboxes.kind_of(seen, {})
        root = await asyncio.to_thread(sandboxes.mounted, HostRoot("/"), kind, seen_box, "/run/a")
        assert root is not None
        assert root.endswith("/etc/apt")

        await cri.stop_container(started, 1)
        assert await cri.containers() == ()
        again = await runtime.start_container(pod, box())
        assert [c.attempt for c in runtime.containers()] == [0, 1]
        assert [c.id for c in await cri.containers()] == [again]

        await runtime.stop_pod(pod)
        assert await cri.sandboxes() == ()
        await cri.stop_container(again, 1)


async def test_verbose_status_and_unknown_containers(runtime: StandInRuntime) -> None:
    pod = pod_of("runc")
    await runtime.run_pod(pod)
    started = await runtime.start_container(pod, box())
    async with rpc.channel(runtime.socket) as channel:
        status = rpc.unary(channel, "/runtime.v1.RuntimeService/ContainerStatus", pb.ContainerStatusResponse)
        answer = await status(pb.ContainerStatusRequest(container_id=started, verbose=True), timeout=5)
        info = json.loads(answer.info["info"])
        assert info["pid"] > 1
        assert info["runtimeSpec"]["hostname"] == "desk-a"
        assert answer.status.state == pb.CONTAINER_RUNNING
        plain = await status(pb.ContainerStatusRequest(container_id=started), timeout=5)
        assert not plain.info
        with pytest.raises(grpc.aio.AioRpcError) as refusal:
            await status(pb.ContainerStatusRequest(container_id="nothing"), timeout=5)
        assert refusal.value.code() is grpc.StatusCode.NOT_FOUND
        version = rpc.unary(channel, "/runtime.v1.RuntimeService/Version", pb.VersionResponse)
        assert (await version(pb.VersionRequest(), timeout=5)).runtime_api_version == "v1"


async def test_a_container_that_ignores_term_is_killed(runtime: StandInRuntime, pod: PodSpec) -> None:
    await runtime.run_pod(pod)
    started = await runtime.start_container(pod, sh("trap '' TERM; echo up; while :; do sleep 60; done"))
    async with asyncio.timeout(20):
        await runtime.stop(started, 0.1)
    assert await runtime.wait(started) == 128 + 9
    await runtime.stop(started, 0.1)


async def test_leaving_the_block_ends_what_still_runs(short_tmp: Path) -> None:
    async with StandInRuntime(short_tmp / "rt", short_tmp / "cri.sock") as runtime:
        pids = []
        for handler in HANDLERS:
            pod = pod_of(handler, uid=f"uid-{handler}")
            await runtime.run_pod(pod)
            await runtime.start_container(pod, box())
        pids = [c.pid for c in runtime.containers()]
        assert all(Path(f"/proc/{pid}").exists() for pid in pids)
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)
    assert not list((short_tmp / "rt").iterdir())
    assert not (short_tmp / "cri.sock").exists()
    assert not [c for root in cgroup_roots() for c in root.glob(f"nodeagent-demo-{os.getpid()}-*")]


async def test_what_cannot_start_says_why(
    runtime: StandInRuntime, short_tmp: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(AgentError, match="no runtime for handler 'kata'"):
        await runtime.run_pod(pod_of("kata"))
    with pytest.raises(AgentError, match="has no sandbox"):
        await runtime.start_container(pod_of("runc"), box())
    pod = pod_of("runc")
    await runtime.run_pod(pod)
    with pytest.raises(AgentError, match="nothing-here"):
        await runtime.start_container(pod, box(("/nothing-here",)))
    monkeypatch.setattr("nodeagent.demo.bundles.shutil.which", lambda _: None)
    with pytest.raises(AgentError, match="runsc is not installed") as missing:
        await runtime.run_pod(pod_of("runsc", uid="other"))
    assert missing.value.reason is Reason.UPSTREAM_UNAVAILABLE
    assert missing.value.hint == "apt-get install runsc"
