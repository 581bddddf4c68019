"""Registration with a kubelet that restarts, vanishes, hangs or talks nonsense, and with a directory that is wiped."""

from __future__ import annotations

import asyncio
import contextlib
import re
import socket
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from nodeagent.demo.kubelet import StandInKubelet
from nodeagent.demo.pods import PodPending, PodRejected
from nodeagent.devices import kubelet as registration
from nodeagent.devices.kubelet import Pace, Registrar, RegistrationState
from nodeagent.devices.podresources import PodResources
from nodeagent.metrics import Metrics
from tests.fakes.allocator import resource
from tests.fakes.node import KEYS, PRINTERS, QUICK, Node, is_registered, running, until
from tests.fakes.pods import pod


@pytest.fixture
async def node(short_tmp: Path, metrics: Metrics) -> AsyncIterator[Node]:
    node = Node(short_tmp, metrics)
    async with node.stack:
        yield node


async def test_every_resource_gets_a_server_and_is_registered(node: Node) -> None:
    kubelet = await node.start_kubelet()
    registrar = await node.start_registrar()
    assert not registrar.registered.is_set(), "nobody has said yet what is offered"
    registrar.set_resources({PRINTERS: resource(a=True, b=False), KEYS: resource(KEYS, k=True)})
    await is_registered(registrar)
    assert kubelet.allocatable(PRINTERS) == {"printer-a"}
    assert kubelet.endpoints[PRINTERS].devices == {"printer-a": True, "printer-b": False}
    assert kubelet.allocatable(KEYS) == {"printer-k"}
    assert [bool(re.fullmatch(r"nodeagent-(printer|ukey)-[0-9a-f]{8}\.sock", s)) for s in node.sockets] == [True, True]
    assert registrar.state(PRINTERS) is RegistrationState.REGISTERED
    assert [(r.resource, r.state, r.detail) for r in registrar.registrations] == [
        (PRINTERS, RegistrationState.REGISTERED, ""),
        (KEYS, RegistrationState.REGISTERED, ""),
    ]
    assert node.registered_count() == 1


async def test_without_any_device_the_node_is_ready(node: Node) -> None:
    registrar = await node.start_registrar()
    registrar.set_resources({})
    await is_registered(registrar)


async def test_resources_come_change_and_go(node: Node) -> None:
    kubelet = await node.start_kubelet()
    registrar = await node.start_registrar()
    registrar.set_resources({PRINTERS: resource(a=True)})
    await is_registered(registrar)
    registrar.set_resources({PRINTERS: resource(a=False, b=True), KEYS: resource(KEYS, k=True)})
    assert not registrar.registered.is_set()
    await is_registered(registrar)
    await kubelet.until(lambda: kubelet.allocatable(PRINTERS) == {"printer-b"})
    assert node.registered_count() == 1, "a new list needs no new registration"
    registrar.set_resources({KEYS: resource(KEYS, k=True)})
    await kubelet.until(lambda: kubelet.allocatable(PRINTERS) == frozenset())
    await until(lambda: len(node.sockets) == 1)
    assert registrar.registered.is_set()
    registrar.set_resources({PRINTERS: resource(a=True), KEYS: resource(KEYS, k=True)})
    await kubelet.until(lambda: kubelet.allocatable(PRINTERS) == {"printer-a"})


async def test_a_resource_that_returns_at_once_waits_for_its_old_server(node: Node) -> None:
    node.kubelet = StandInKubelet(node.directory, node.pod_resources, stream_end_lag_s=0.3)
    kubelet = await node.start_kubelet()
    registrar = await node.start_registrar()
    for _ in range(2):
        registrar.set_resources({PRINTERS: resource(a=True)})
        await is_registered(registrar)
        registrar.set_resources({})
        await until(lambda: registrar.registrations == ())
    registrar.set_resources({PRINTERS: resource(a=True)})
    await is_registered(registrar)
    await asyncio.sleep(0.35)  # as long as the old kubelet takes to see the end of the old stream
    assert kubelet.allocatable(PRINTERS) == {"printer-a"}
    assert node.registered_count() == 3, "none was lost to k8s#127803"


async def test_a_restarted_kubelet_is_noticed_within_a_second(node: Node) -> None:
    """With the pace of the product."""
    kubelet = await node.start_kubelet()
    registrar = await node.start_registrar(Pace())
    registrar.set_resources({PRINTERS: resource(a=True)})
    await is_registered(registrar)
    before = node.sockets
    for n in range(2):
        await kubelet.restart()
        assert kubelet.allocatable(PRINTERS) == frozenset()
        clock = asyncio.get_running_loop().time
        restarted_s = clock()
        await kubelet.until(lambda: kubelet.allocatable(PRINTERS) == {"printer-a"})
        assert clock() - restarted_s < 1.5
        await until(lambda n=n: node.registered_count() == n + 2)  # type: ignore[misc]
    await is_registered(registrar)
    assert len(node.sockets) == 1
    assert node.sockets != before


async def test_a_kubelet_that_restarts_during_a_registration(node: Node) -> None:
    kubelet = await node.start_kubelet()
    registrar = await node.start_registrar(Pace())
    registrar.set_resources({PRINTERS: resource(a=True)})
    for n in range(3):
        await kubelet.until(lambda n=n: kubelet.registrations > n)  # type: ignore[misc]
        await kubelet.restart()
    assert await until(registrar.registered.is_set) < 2
    await kubelet.until(lambda: kubelet.allocatable(PRINTERS) == {"printer-a"})


async def test_a_pod_lives_through_a_restart_of_the_kubelet(node: Node) -> None:
    kubelet = await node.start_kubelet()
    registrar = await node.start_registrar()
    registrar.set_resources({PRINTERS: resource(a=True)})
    await is_registered(registrar)
    alice = pod("alice")
    await kubelet.start(alice)
    answer = kubelet.run_options(alice, "desktop")
    await kubelet.restart()
    await is_registered(registrar)
    await kubelet.until(lambda: bool(kubelet.allocatable(PRINTERS)))
    await kubelet.start_container(alice, "desktop")
    assert kubelet.run_options(alice, "desktop") == answer
    assert [c.method for c in kubelet.calls] == [
        "GetPreferredAllocation",
        "Allocate",
        "PreStartContainer",
        "PreStartContainer",
    ]
    with pytest.raises(PodPending, match=r"Insufficient opencdi.io/printer"):
        await kubelet.admit(pod("bob"))


async def test_a_vanished_kubelet_is_waited_for(node: Node) -> None:
    kubelet = await node.start_kubelet()
    registrar = await node.start_registrar()
    registrar.set_resources({PRINTERS: resource(a=True)})
    await is_registered(registrar)
    await kubelet.vanish()
    await until(lambda: registrar.state(PRINTERS) is RegistrationState.WAITING)
    assert not registrar.registered.is_set()
    (waiting,) = registrar.registrations
    assert "there is no kubelet" in waiting.detail
    assert node.sockets == []
    await kubelet.restart()
    await is_registered(registrar)


async def test_the_registrar_may_come_first(node: Node) -> None:
    registrar = await node.start_registrar()
    registrar.set_resources({PRINTERS: resource(a=True)})
    await until(lambda: bool(registrar.registrations and registrar.registrations[0].detail))
    kubelet = await node.start_kubelet()
    await kubelet.until(lambda: kubelet.allocatable(PRINTERS) == {"printer-a"})
    await is_registered(registrar)


async def test_a_kubelet_killed_with_its_socket_left_behind(node: Node) -> None:
    """kill -9 leaves kubelet.sock; only the stream's end and a refused connection tell."""
    kubelet = await node.start_kubelet()
    registrar = await node.start_registrar()
    registrar.set_resources({PRINTERS: resource(a=True)})
    await is_registered(registrar)
    await kubelet.vanish()
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(kubelet.socket))
    await until(lambda: registrar.state(PRINTERS) is RegistrationState.FAILING)
    assert "the kubelet did not register opencdi.io/printer: unavailable" in registrar.registrations[0].detail
    await kubelet.restart()
    await is_registered(registrar)


async def test_a_hanging_kubelet_is_tried_again(node: Node) -> None:
    kubelet = await node.start_kubelet()
    kubelet.hang()
    registrar = await node.start_registrar()
    registrar.set_resources({PRINTERS: resource(a=True)})
    await until(lambda: registrar.state(PRINTERS) is RegistrationState.FAILING)
    assert "deadline_exceeded" in registrar.registrations[0].detail
    kubelet.unhang()
    await is_registered(registrar)
    await kubelet.until(lambda: kubelet.allocatable(PRINTERS) == {"printer-a"})


@pytest.mark.parametrize("answer", [b"", b"HTTP/1.1 400 Bad Request\r\n\r\n", b"\x00" * 4096, b"\xff" * 100_000])
async def test_garbage_from_the_kubelets_socket_breaks_nothing(node: Node, answer: bytes) -> None:
    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            writer.write(answer)
            await writer.drain()
            await asyncio.sleep(0.05)
        writer.close()

    registrar = await node.start_registrar()
    async with await asyncio.start_unix_server(talk, node.directory / "kubelet.sock"):
        registrar.set_resources({PRINTERS: resource(a=True)})
        await until(lambda: registrar.state(PRINTERS) is RegistrationState.FAILING)
        await until(lambda: registrar.state(PRINTERS) is RegistrationState.REGISTERING)
    kubelet = await node.start_kubelet()
    await kubelet.until(lambda: kubelet.allocatable(PRINTERS) == {"printer-a"})


async def test_a_refusal_of_the_kubelet_is_shown(node: Node) -> None:
    await node.start_kubelet()
    registrar = await node.start_registrar()
    registrar.set_resources({"nodomain": resource("nodomain", a=True), PRINTERS: resource(a=True)})
    await until(lambda: registrar.state("nodomain") is RegistrationState.FAILING)
    await until(lambda: registrar.state(PRINTERS) is RegistrationState.REGISTERED)
    assert not registrar.registered.is_set()
    assert "the ResourceName 'nodomain' is invalid" in registrar.registrations[0].detail


async def test_our_socket_is_removed(node: Node) -> None:
    kubelet = await node.start_kubelet()
    registrar = await node.start_registrar()
    registrar.set_resources({PRINTERS: resource(a=True)})
    await is_registered(registrar)
    (old,) = node.sockets
    (node.directory / old).unlink()
    await until(lambda: node.registered_count() == 2)
    await is_registered(registrar)
    await kubelet.until(lambda: kubelet.allocatable(PRINTERS) == {"printer-a"})
    assert node.sockets != [old]


async def test_the_directory_is_wiped(node: Node) -> None:
    """Without kubelet.sock there is nobody to register with, and the stream still works: it is kept until a kubelet comes."""
    kubelet = await node.start_kubelet()
    registrar = await node.start_registrar()
    registrar.set_resources({PRINTERS: resource(a=True)})
    await is_registered(registrar)
    for path in node.directory.iterdir():
        path.unlink()
    await asyncio.sleep(3 * QUICK.look)
    registrar.set_resources({PRINTERS: resource(a=False, b=True)})
    await kubelet.until(lambda: kubelet.allocatable(PRINTERS) == {"printer-b"})
    await kubelet.start(pod("alice"))
    await kubelet.restart()
    await kubelet.until(lambda: kubelet.allocatable(PRINTERS) == {"printer-b"})
    await is_registered(registrar)
    assert node.registered_count() == 2


async def test_a_stream_the_kubelet_dropped_is_noticed(node: Node) -> None:
    kubelet = await node.start_kubelet()
    registrar = await node.start_registrar()
    registrar.set_resources({PRINTERS: resource(a=True)})
    await is_registered(registrar)
    await kubelet.endpoints[PRINTERS].close()
    await until(lambda: node.registered_count() == 2)
    await kubelet.until(lambda: kubelet.allocatable(PRINTERS) == {"printer-a"})


async def test_devices_that_never_become_allocatable_are_registered_again(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    kubelet = await node.start_kubelet()
    monkeypatch.setattr(registration, "VERIFY_PAUSES_S", (0.0, 0.05))
    monkeypatch.setattr(kubelet, "_on_stream_end", lambda endpoint: None)
    real, shown = PodResources.allocatable, 0

    async def blind_at_first(self: PodResources) -> dict[str, frozenset[str]]:
        nonlocal shown
        shown += 1
        return {} if shown <= 2 else await real(self)

    monkeypatch.setattr(PodResources, "allocatable", blind_at_first)
    registrar = await node.start_registrar()
    registrar.set_resources({PRINTERS: resource(a=True)})
    await until(lambda: registrar.state(PRINTERS) is RegistrationState.FAILING)
    assert "does not show 1 of its devices as allocatable" in registrar.registrations[0].detail
    await is_registered(registrar)
    assert node.registered_count() == 2


async def test_a_kubelet_without_podresources_is_good_enough(node: Node) -> None:
    await node.start_kubelet()
    node.pod_resources = node.pod_resources.with_name("elsewhere")
    registrar = await node.start_registrar()
    registrar.set_resources({PRINTERS: resource(a=True)})
    await is_registered(registrar)


async def test_registering_again_with_the_same_kubelet_waits_out_its_race(node: Node) -> None:
    """A kubelet before #135437 disconnects the new registration when it sees the old stream end."""
    node.kubelet = StandInKubelet(node.directory, node.pod_resources, stream_end_lag_s=0.3)
    kubelet = await node.start_kubelet()
    registrar = await node.start_registrar()
    registrar.set_resources({PRINTERS: resource(a=True)})
    await is_registered(registrar)
    (old,) = node.sockets
    (node.directory / old).unlink()
    await until(lambda: node.registered_count() == 2)
    await is_registered(registrar)
    await asyncio.sleep(0.35)  # the old kubelet's lag
    assert kubelet.allocatable(PRINTERS) == {"printer-a"}
    assert node.registered_count() == 2


async def test_sockets_of_a_killed_predecessor_are_removed_and_living_ones_are_not(node: Node) -> None:
    await node.start_kubelet()
    with socket.socket(socket.AF_UNIX) as dead, socket.socket(socket.AF_UNIX) as alive:
        dead.bind(str(node.directory / "nodeagent-printer-00000000.sock"))
        alive.bind(str(node.directory / "nodeagent-printer-11111111.sock"))
        alive.listen()
        dead.close()
        (node.directory / "nodeagent-notes.txt").write_text("")
        started_s = asyncio.get_running_loop().time()
        registrar = await node.start_registrar()
        registrar.set_resources({PRINTERS: resource(a=True)})
        await is_registered(registrar)
        assert asyncio.get_running_loop().time() - started_s >= QUICK.race
        assert {"nodeagent-notes.txt", "nodeagent-printer-11111111.sock"} < set(node.sockets)
        assert "nodeagent-printer-00000000.sock" not in node.sockets


async def test_ending_closes_every_server_within_a_second(node: Node) -> None:
    kubelet = await node.start_kubelet()
    clock = asyncio.get_running_loop().time
    registrar = Registrar(node.directory, node.allocator, None, node.metrics, pace=QUICK)
    async with running(registrar):
        registrar.set_resources({f"opencdi.io/r{n}": resource(f"opencdi.io/r{n}", a=True) for n in range(12)})
        await kubelet.until(lambda: kubelet.allocatable("opencdi.io/r3") == {"printer-a"})
        await is_registered(registrar)
        node.allocator.free.clear()
        hanging = asyncio.create_task(kubelet.admit(pod("alice", limits={"opencdi.io/r3": 1})))
        await until(lambda: node.allocator.waiting == 1)
        ending_s = clock()
    assert clock() - ending_s < 1
    assert node.sockets == []
    assert not registrar.registered.is_set()
    with pytest.raises(PodRejected, match="UnexpectedAdmissionError"):
        await hanging
