"""Registration against a kubelet that does everything wrong: never a crash, never a hang, and by itself well again."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from nodeagent.demo.kubelet import StandInKubelet
from nodeagent.demo.pods import PodRejected
from nodeagent.devices.kubelet import RegistrationState
from nodeagent.metrics import Metrics
from tests.fakes import scripted_kubelet as fault
from tests.fakes.allocator import resource
from tests.fakes.node import PRINTERS, QUICK, Node, is_registered, until
from tests.fakes.plugin import FakePlugin
from tests.fakes.pods import pod
from tests.fakes.scripted_kubelet import Act, ScriptedKubelet, good

OFFER = {"printer-a": "Healthy", "printer-b": "Unhealthy"}


@pytest.fixture
async def node(short_tmp: Path, metrics: Metrics) -> AsyncIterator[Node]:
    node = Node(short_tmp, metrics)
    async with node.stack:
        yield node


def offer(node: Node) -> None:
    node.registrar.set_resources({PRINTERS: resource(a=True, b=False)})


@pytest.fixture
async def scripted(node: Node) -> AsyncIterator[ScriptedKubelet]:
    kubelet = ScriptedKubelet(node.directory, good)
    await node.stack.enter_async_context(kubelet)
    return kubelet


async def well_again(node: Node, scripted: ScriptedKubelet) -> None:
    """Registered, the whole list told, one socket."""
    await is_registered(node.registrar)
    await scripted.until(lambda: scripted.lists and scripted.lists[-1] == OFFER)
    await until(lambda: len(node.sockets) == 1)
    assert node.registrar.registrations[0].detail == ""


async def registered(node: Node, scripted: ScriptedKubelet) -> None:
    """Everything begins well."""
    node.registrar = await node.start_registrar()
    offer(node)
    await well_again(node, scripted)


ACTS: list[tuple[Act, str]] = [
    (fault.hung, "deadline_exceeded"),
    (fault.slow(QUICK.register + 0.2), "deadline_exceeded"),
    (fault.forgetful, "does not read its devices"),
    (fault.refusing, "unknown: no"),
    (fault.unimplemented, "unimplemented: unknown service"),
    (fault.broken, "internal: the answer to /v1beta1.Registration/Register is no v1beta1.Empty"),
    (fault.enormous, "resource_exhausted"),
    (fault.vanishing, "unavailable: Socket closed"),
    (fault.dropping(0), "does not read its devices"),
]


@pytest.mark.parametrize(("act", "said"), ACTS, ids=[f"{a.__qualname__}-{n}" for n, (a, _) in enumerate(ACTS)])
async def test_a_registration_that_goes_wrong_is_said_and_made_again(
    node: Node, scripted: ScriptedKubelet, act: Act, said: str
) -> None:
    scripted.perform(act, act, good)
    node.registrar = await node.start_registrar()
    offer(node)
    details: set[str] = set()

    def failing() -> bool:
        details.update(r.detail for r in node.registrar.registrations if r.state is RegistrationState.FAILING)
        return any(said in d for d in details)

    await until(failing)
    assert all(len(d) < 600 and d.isprintable() for d in details), "a kubelet's words are cut and on one line"
    await well_again(node, scripted)
    assert len(scripted.registers) == 3
    assert len({r.endpoint for r in scripted.registers}) == 3, "every attempt has a socket of its own"


async def test_a_slow_kubelet_is_waited_for(node: Node, scripted: ScriptedKubelet) -> None:
    scripted.perform(fault.slow(QUICK.register / 2))
    await registered(node, scripted)
    assert len(scripted.registers) == 1


async def test_calls_of_nonsense_during_register_do_no_harm(node: Node, scripted: ScriptedKubelet) -> None:
    scripted.perform(fault.dialling_wildly)
    await registered(node, scripted)
    assert node.allocator.allocated == []


@pytest.mark.parametrize("messages", range(1, 6))
async def test_a_stream_dropped_at_any_message_is_made_again(
    node: Node, scripted: ScriptedKubelet, messages: int
) -> None:
    scripted.perform(fault.dropping(messages), good)
    node.registrar = await node.start_registrar()
    offer(node)
    for n in range(1, messages):
        await scripted.until(lambda n=n: len(scripted.lists) >= n)
        node.registrar.set_resources({PRINTERS: resource(a=True, b=n % 2 == 1)})
    await scripted.until(lambda: len(scripted.registers) == 2)
    offer(node)
    await well_again(node, scripted)
    assert node.registered_count() == 2


RAW = {
    "nothing": b"",
    "http/1": b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n",
    "tls": b"\x16\x03\x01\x00\xc8\x01\x00\x00\xc4\x03\x03" + bytes(200),
    "zeros": bytes(4096),
    "many": b"\xff" * 300_000,
    "settings, then silence": fault.SETTINGS,
    "settings, then nonsense": fault.SETTINGS + b"\x00\x00\x08\x7f\xff\xff\xff\xff\xff" + bytes(64),
    "a frame of 16 MiB": b"\xff\xff\xff\x00\x00\x00\x00\x00\x01" + bytes(1000),
    "goaway": fault.SETTINGS + b"\x00\x00\x08\x07\x00\x00\x00\x00\x00" + bytes(4) + b"\x00\x00\x00\x0b",
    "the client's own preface": fault.PREFACE + fault.SETTINGS,
}


@pytest.mark.parametrize("then_close", [True, False])
@pytest.mark.parametrize("answer", RAW.values(), ids=RAW)
async def test_what_is_no_grpc_is_a_kubelet_that_does_not_answer(node: Node, answer: bytes, then_close: bool) -> None:
    node.registrar = await node.start_registrar()
    async with fault.speaking(node.directory, answer, then_close=then_close):
        offer(node)
        await until(lambda: node.registrar.state(PRINTERS) is RegistrationState.FAILING)
        assert "the kubelet did not register" in node.registrar.registrations[0].detail
    async with ScriptedKubelet(node.directory, good) as kubelet:
        await well_again(node, kubelet)


async def test_a_socket_that_nobody_accepts_from(node: Node) -> None:
    node.registrar = await node.start_registrar()
    with fault.deaf(node.directory):
        offer(node)
        waited_s = await until(lambda: node.registrar.state(PRINTERS) is RegistrationState.FAILING)
        assert waited_s < QUICK.register + 1
    async with ScriptedKubelet(node.directory, good) as kubelet:
        await well_again(node, kubelet)


@pytest.mark.parametrize("leave_socket", [True, False])
async def test_a_kubelet_that_is_killed_and_returns(node: Node, scripted: ScriptedKubelet, leave_socket: bool) -> None:
    await registered(node, scripted)
    await scripted.stop(leave_socket=leave_socket)
    gone = RegistrationState.FAILING if leave_socket else RegistrationState.WAITING
    await until(lambda: node.registrar.state(PRINTERS) is gone)
    scripted.lists.clear()
    await scripted.serve()
    await well_again(node, scripted)


async def test_a_socket_made_anew_with_the_same_inode_number_is_another_kubelet(
    node: Node, scripted: ScriptedKubelet
) -> None:
    """ext4 hands a freed inode out at once. The connections stay open here, so nothing but the change time tells."""
    await registered(node, scripted)
    before = scripted.socket.stat()
    os.rename(scripted.socket, node.directory / "k")
    os.rename(node.directory / "k", scripted.socket)
    assert scripted.socket.stat().st_ino == before.st_ino
    await scripted.until(lambda: len(scripted.registers) == 2)
    await well_again(node, scripted)


async def test_a_socket_that_is_no_socket(node: Node) -> None:
    node.registrar = await node.start_registrar()
    path = node.directory / "kubelet.sock"
    for make in (path.mkdir, path.touch, lambda: path.symlink_to("nowhere"), lambda: os.mkfifo(path)):
        make()
        offer(node)
        await until(lambda: node.registrar.state(PRINTERS) is RegistrationState.WAITING)
        await asyncio.sleep(2 * QUICK.look)
        assert node.sockets == []
        path.rmdir() if path.is_dir() else path.unlink()
    async with ScriptedKubelet(node.directory, good) as kubelet:
        await well_again(node, kubelet)


async def test_the_directory_itself_goes_and_comes(node: Node, scripted: ScriptedKubelet) -> None:
    await registered(node, scripted)
    moved = node.directory.with_name("away")
    await scripted.stop()
    node.directory.rename(moved)
    await until(lambda: node.registrar.state(PRINTERS) is RegistrationState.WAITING)
    node.directory.mkdir()
    scripted.lists.clear()
    await scripted.serve()
    await well_again(node, scripted)


async def test_sockets_wiped_while_allocate_runs(node: Node, scripted: ScriptedKubelet) -> None:
    """All of them, as a kubelet does when it starts: the one that asked is gone, so nothing is served to it any more, but the
    question of the old connection has its answer first."""
    await registered(node, scripted)
    channel = scripted.plugin()
    node.allocator.free.clear()
    asking = asyncio.create_task(fault.allocate(channel, ["printer-a"]))
    await until(lambda: node.allocator.waiting == 1)
    for path in node.directory.iterdir():
        path.unlink()
    await asyncio.sleep(3 * QUICK.look)
    node.allocator.free.set()
    answer = await asking
    assert len(answer.container_responses) == 1
    await scripted.stop()
    scripted.lists.clear()
    await scripted.serve()
    await well_again(node, scripted)


async def test_our_socket_wiped_while_allocate_runs_ends_in_an_answer_or_a_refusal(
    node: Node, scripted: ScriptedKubelet
) -> None:
    await registered(node, scripted)
    channel = scripted.plugin()
    node.allocator.free.clear()
    asking = asyncio.create_task(fault.allocate(channel, ["printer-a"]))
    await until(lambda: node.allocator.waiting == 1)
    (ours,) = node.sockets
    (node.directory / ours).unlink()
    await scripted.until(lambda: len(scripted.registers) == 2)
    assert await fault.refusal(asking), "the server had its grace of half a second"
    assert node.allocator.waiting == 0
    node.allocator.free.set()
    await well_again(node, scripted)
    await fault.allocate(scripted.plugin(), ["printer-a"])


async def test_two_plugins_race_for_one_name(node: Node) -> None:
    """A daemon and its successor for a moment: the kubelet disconnects whoever came second when the first stream ends."""
    node.kubelet = StandInKubelet(node.directory, node.pod_resources, stream_end_lag_s=0.1)
    kubelet = await node.start_kubelet()
    async with contextlib.AsyncExitStack() as old_life:
        old = Node.__new__(Node)
        old.__dict__.update(node.__dict__, stack=old_life)
        first = await old.start_registrar()
        first.set_resources({PRINTERS: resource(a=True)})
        await is_registered(first)
        node.registrar = await node.start_registrar()
        offer(node)
        await is_registered(node.registrar)
    # The first has ended; its end disconnects the second, which has to notice by itself.
    await until(lambda: node.registered_count() >= 3)
    await is_registered(node.registrar)
    await asyncio.sleep(0.15)  # the lag
    await kubelet.until(lambda: kubelet.allocatable(PRINTERS) == {"printer-a"})
    await kubelet.start(pod("alice"))


async def test_a_foreign_plugin_takes_our_name_and_leaves(node: Node) -> None:
    kubelet = await node.start_kubelet()
    node.registrar = await node.start_registrar()
    offer(node)
    await is_registered(node.registrar)
    async with FakePlugin(node.directory, PRINTERS, **{"printer-z": True}) as thief:
        await thief.register()
        await kubelet.until(lambda: kubelet.allocatable(PRINTERS) == {"printer-z"})
    await kubelet.until(lambda: not kubelet.endpoints[PRINTERS].connected)
    assert node.registrar.state(PRINTERS) is RegistrationState.REGISTERED, "our stream is open: nothing tells us"
    with pytest.raises(PodRejected):
        await kubelet.admit(pod("alice", static=True))


async def test_fifty_restarts_in_a_row_leak_nothing(node: Node, scripted: ScriptedKubelet) -> None:
    await registered(node, scripted)
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(50):
        await scripted.stop()
        await scripted.serve()
    scripted.lists.clear()
    await well_again(node, scripted)
    await until(lambda: len(os.listdir("/proc/self/fd")) <= before + 2)
