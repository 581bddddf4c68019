"""Which devices the stand-in kubelet hands out, remembers and reports: as Kubernetes 1.28 to 1.34 do."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from nodeagent.demo.admission import ResourceCount
from nodeagent.demo.checkpoint import FILE
from nodeagent.demo.endpoints import GRACE_S
from nodeagent.demo.kubelet import StandInKubelet
from nodeagent.demo.pods import ContainerNotStarted, ContainerSpec, PodRejected, PodSpec, RunOptions
from nodeagent.wire.pb.deviceplugin.v1beta1 import api_pb2 as pb
from tests.fakes.plugin import FakePlugin
from tests.fakes.pods import pod

R = "example.com/dev"
ONE = {R: 1}


class Bench:
    """A kubelet, the time it believes in, and what it started."""

    def __init__(self, root: Path, **how: object) -> None:
        self.root = root
        self.directory = root / "dp"
        self.directory.mkdir()
        self.now_s = 0.0
        self.started: list[tuple[str, str, RunOptions]] = []
        self.kubelet = StandInKubelet(
            self.directory,
            root / "pr" / "kubelet.sock",
            self._start,
            clock=lambda: self.now_s,
            **how,  # type: ignore[arg-type]
        )

    async def _start(self, pod: PodSpec, container: ContainerSpec, options: RunOptions) -> None:
        self.started.append((pod.name, container.name, options))

    @asynccontextmanager
    async def plugin(
        self, *, preferring: bool = False, endpoint: str = "fake.sock", **devices: bool
    ) -> AsyncIterator[FakePlugin]:
        """A plugin that is registered and whose list has arrived."""
        async with FakePlugin(self.directory, R, endpoint, **devices) as plugin:
            plugin.options.get_preferred_allocation_available = preferring
            await plugin.register()
            await self.told(devices)
            yield plugin

    async def told(self, devices: dict[str, bool]) -> None:
        await self.kubelet.until(lambda: self.kubelet.endpoints[R].devices == devices)

    def calls(self, since: int = 0) -> list[tuple[str, int]]:
        return [(c.method, len(c.ids)) for c in list(self.kubelet.calls)[since:]]


@pytest.fixture
async def bench(short_tmp: Path) -> AsyncIterator[Bench]:
    made = Bench(short_tmp)
    async with made.kubelet:
        yield made


async def test_a_hint_is_asked_for_before_each_allocate_and_taken_where_it_fits(bench: Bench) -> None:
    async with bench.plugin(preferring=True, a=True, b=True, c=True, d=False) as plugin:
        plugin.prefer = ["c"]
        first = pod("first", limits=ONE)
        await bench.kubelet.start(first)
        assert bench.kubelet.held(first, "desktop", R) == ("c",)
        assert bench.calls() == [("GetPreferredAllocation", 3), ("Allocate", 1), ("PreStartContainer", 1)]
        (asked,) = plugin.asked
        assert (sorted(asked.available_deviceIDs), list(asked.must_include_deviceIDs), asked.allocation_size) == (
            ["a", "b", "c"], [], 1,
        )  # fmt: skip
        plugin.prefer = ["c", "d", "nonsense", "b"]  # held, unhealthy, unknown, good
        second = pod("second", limits=ONE)
        await bench.kubelet.admit(second)
        assert bench.kubelet.held(second, "desktop", R) == ("b",)
        plugin.prefer = []
        await bench.kubelet.admit(pod("third", limits=ONE))
        assert sorted(plugin.asked[-1].available_deviceIDs) == ["a"], "asked also without a choice"


async def test_a_hint_that_fails_fails_the_pod(bench: Bench) -> None:
    async with bench.plugin(preferring=True, a=True) as plugin:
        plugin.prefer = None
        with pytest.raises(
            PodRejected,
            match="GetPreferredAllocation rpc failed with err: rpc error: code = Internal desc = cannot say",
        ):
            await bench.kubelet.admit(pod("alice", limits=ONE))
        plugin.prefer = ["a"]
        await bench.kubelet.admit(pod("bob", limits=ONE))


async def test_without_the_announcement_no_hint_is_asked_for(bench: Bench) -> None:
    async with bench.plugin(a=True, b=True) as plugin:
        await bench.kubelet.admit(pod("alice", limits=ONE))
        assert plugin.asked == []


async def test_an_app_container_must_include_what_its_init_container_had(bench: Bench) -> None:
    async with bench.plugin(preferring=True, a=True, b=True, c=True) as plugin:
        alice = pod("alice", limits={R: 2}, init=ONE)
        await bench.kubelet.admit(alice)
        (had,) = bench.kubelet.held(alice, "prepare", R)
        assert had in bench.kubelet.held(alice, "desktop", R)
        assert [list(a.must_include_deviceIDs) for a in plugin.asked] == [[], [had]]
        assert plugin.asked[-1].allocation_size == 2
        assert had in plugin.asked[-1].available_deviceIDs


async def test_a_sidecar_keeps_its_device_and_is_listed(bench: Bench) -> None:
    async with bench.plugin(a=True, b=True):
        containers = (
            ContainerSpec(name="sidecar", limits=ONE, init=True, restartable=True),
            ContainerSpec(name="desktop", limits=ONE),
        )
        alice = PodSpec(name="alice", uid="u", containers=containers)
        assert alice.request(R) == 2
        await bench.kubelet.start(alice)
        held = {bench.kubelet.held(alice, c.name, R) for c in containers}
        assert held == {("a",), ("b",)}
        assert [c.name for c in bench.kubelet._listed(alice).containers] == ["sidecar", "desktop"]


async def test_several_containers_of_one_pod_hold_devices_of_their_own(bench: Bench) -> None:
    async with bench.plugin(a=True, b=True, c=True):
        containers = tuple(ContainerSpec(name=n, limits=ONE) for n in ("one", "two", "three"))
        alice = PodSpec(name="alice", uid="u", containers=containers)
        await bench.kubelet.start(alice)
        assert {bench.kubelet.held(alice, c.name, R) for c in containers} == {("a",), ("b",), ("c",)}
        assert [m for m, _ in bench.calls()].count("PreStartContainer") == 3


async def test_unhealthy_devices_are_capacity_and_not_allocatable(bench: Bench) -> None:
    async with bench.plugin(a=True, b=False) as plugin:
        assert bench.kubelet.node_status() == {R: ResourceCount(capacity=2, allocatable=1)}
        plugin.devices(a=False, b=False)
        await bench.told({"a": False, "b": False})
        assert bench.kubelet.node_status() == {R: ResourceCount(2, 0)}
        with pytest.raises(PodRejected, match=f"no healthy devices present; cannot allocate unhealthy devices {R}"):
            await bench.kubelet.admit(pod("alice", limits=ONE, static=True))


async def test_a_resource_stays_for_five_minutes_after_its_plugin(bench: Bench) -> None:
    async with bench.plugin(a=True):
        alice = pod("alice", limits=ONE)
        await bench.kubelet.admit(alice)
    await bench.kubelet.until(lambda: not bench.kubelet.allocatable(R))
    assert bench.kubelet.node_status() == {R: ResourceCount(capacity=1, allocatable=0)}
    bench.now_s = GRACE_S
    assert R in bench.kubelet.node_status()
    bench.now_s = GRACE_S + 1
    assert bench.kubelet.node_status() == {}
    # Held still, so it is no resource that a container could go without.
    with pytest.raises(
        PodRejected, match=f"Allocate failed due to cannot allocate unregistered device {R}, which is unexp"
    ):
        await bench.kubelet.admit(pod("late", limits=ONE, static=True))
    with pytest.raises(ContainerNotStarted, match=f"endpoint not found in cache for a registered resource: {R}"):
        await bench.kubelet.start_container(alice, "desktop")
    async with bench.plugin(endpoint="again.sock", a=True):
        assert bench.kubelet.node_status() == {R: ResourceCount(1, 1)}
        await bench.kubelet.start_container(alice, "desktop")


async def test_a_plugin_that_returns_finds_its_devices_unhealthy_until_its_first_list(bench: Bench) -> None:
    async with bench.plugin(a=True, b=True):
        pass
    await bench.kubelet.until(lambda: not bench.kubelet.allocatable(R))
    table = bench.kubelet.endpoints[R].table
    assert (table.healthy, table.unhealthy) == (frozenset(), {"a", "b"})
    async with bench.plugin(endpoint="again.sock", b=True):
        assert bench.kubelet.endpoints[R].table is table
        assert (table.healthy, table.unhealthy) == ({"b"}, frozenset())


async def test_an_id_that_vanishes_says_nothing_to_the_status_of_its_pod(bench: Bench) -> None:
    async with bench.plugin(a=True) as plugin:
        alice = pod("alice", limits=ONE)
        await bench.kubelet.start(alice)
        plugin.devices(a=False)
        await bench.told({"a": False})
        assert bench.kubelet.resource_health[alice.uid] == {"a": False}
        plugin.devices()
        await bench.told({})
        assert bench.kubelet.resource_health[alice.uid] == {"a": False}, "no update"
        assert bench.kubelet.sync(alice) == {"a": True}, "and with the next one it counts as healthy"
        assert bench.kubelet.held(alice, "desktop", R) == ("a",)
        plugin.devices(a=False)
        await bench.told({"a": False})
        assert bench.kubelet.resource_health[alice.uid] == {"a": False}, "a new id tells its pod"


async def test_a_container_is_started_again_on_a_device_that_is_gone(bench: Bench) -> None:
    async with bench.plugin(a=True, b=True) as plugin:
        alice = pod("alice", limits=ONE)
        await bench.kubelet.start(alice)
        plugin.devices(c=True)
        await bench.told({"c": True})
        since = len(bench.kubelet.calls)
        await bench.kubelet.start_container(alice, "desktop")
        assert bench.calls(since) == [("PreStartContainer", 1)], "no second Allocate, no look at health"


async def test_allocations_and_answers_survive_in_the_file(bench: Bench) -> None:
    async with bench.plugin(a=True) as plugin:
        plugin.answer = pb.ContainerAllocateResponse(
            envs={"A": "1"}, cdi_devices=[pb.CDIDevice(name="example.com/dev=a")]
        )
        alice = pod("alice", limits=ONE)
        await bench.kubelet.start(alice)
    await bench.kubelet.restart()
    data = json.loads((bench.directory / FILE).read_text())["Data"]
    assert data["RegisteredDevices"].keys() == {R}
    (entry,) = data["PodDeviceEntries"]
    assert (entry["PodUID"], entry["ContainerName"], entry["ResourceName"], entry["DeviceIDs"]) == (
        "uid-alice", "desktop", R, {"-1": ["a"]},
    )  # fmt: skip
    assert bench.kubelet.held(alice, "desktop", R) == ("a",)
    options = bench.kubelet.run_options(alice, "desktop")
    assert (options.env, options.cdi) == ({"A": "1"}, ("example.com/dev=a",))
    assert bench.kubelet.node_status() == {R: ResourceCount(0, 0)}
    bench.now_s = GRACE_S + 1
    assert bench.kubelet.node_status() == {}, "the grace period began with the kubelet"


@pytest.mark.parametrize(
    "damage", [lambda c: c[: len(c) // 2], lambda c: c.replace(b"uid-alice", b"uid-mallo"), lambda c: b""]
)
async def test_a_damaged_file_is_no_file(bench: Bench, damage) -> None:  # type: ignore[no-untyped-def]
    async with bench.plugin(a=True):
        alice = pod("alice", limits=ONE)
        await bench.kubelet.admit(alice)
    await bench.kubelet.vanish()
    path = bench.directory / FILE
    path.write_bytes(damage(path.read_bytes()))
    await bench.kubelet.restart()
    assert bench.kubelet.held(alice, "desktop", R) == ()
    assert bench.kubelet.node_status() == {}


async def test_a_restart_leaves_running_containers_alone(bench: Bench) -> None:
    async with bench.plugin(a=True):
        alice = pod("alice", limits=ONE)
        await bench.kubelet.start(alice)
        since = len(bench.kubelet.calls)
        await bench.kubelet.restart()
        assert await bench.kubelet.readmit() == {}
        assert bench.calls(since) == []
        assert bench.kubelet.held(alice, "desktop", R) == ("a",)


async def test_after_a_restart_an_init_container_that_has_ended_fails_its_pod(bench: Bench) -> None:
    """k8s#138446: it does not run, so it is taken for one that starts, and no plugin has registered yet."""
    async with bench.plugin(a=True):
        alice = pod("alice", limits=ONE, init=ONE)
        await bench.kubelet.start(alice)
        await bench.kubelet.restart()
        rejected = await bench.kubelet.readmit()
        assert "no healthy devices present" in rejected[alice.uid].message
        assert bench.kubelet.pods == {}


async def test_after_a_reboot_with_the_plugin_first_containers_start_from_the_cached_answer(bench: Bench) -> None:
    async with bench.plugin(a=True, b=True) as plugin:
        alice = pod("alice", limits=ONE, init=ONE)
        await bench.kubelet.start(alice)
        (had,) = bench.kubelet.held(alice, "desktop", R)
        since = len(bench.kubelet.calls)

        async def register() -> None:
            await plugin.register()
            await bench.told({"a": True, "b": True})

        assert await bench.kubelet.reboot(register) == {}
        assert bench.calls(since) == [("PreStartContainer", 1), ("PreStartContainer", 1)]
        assert [(name, c) for name, c, _ in bench.started] == [("alice", "prepare"), ("alice", "desktop")] * 2
        assert bench.started[-1][2].env == {"FAKE": "1"}
        assert bench.kubelet.held(alice, "desktop", R) == (had,)


async def test_after_a_reboot_with_the_pods_first_they_are_rejected(bench: Bench) -> None:
    """k8s#125579."""
    async with bench.plugin(a=True):
        alice = pod("alice", limits=ONE)
        await bench.kubelet.start(alice)
        since = len(bench.kubelet.calls)
        failed = await bench.kubelet.reboot()
        assert str(failed[alice.uid]) == (
            "UnexpectedAdmissionError: Allocate failed due to no healthy devices present;"
            f" cannot allocate unhealthy devices {R}, which is unexpected"
        )
        assert bench.calls(since) == []


async def test_after_a_reboot_a_device_that_is_not_healthy_any_more_fails_its_pod(bench: Bench) -> None:
    async with bench.plugin(a=True) as plugin:
        alice = pod("alice", limits=ONE)
        await bench.kubelet.start(alice)

        async def register() -> None:
            plugin.devices(a=False, b=True)
            await plugin.register()
            await bench.told({"a": False, "b": True})

        failed = await bench.kubelet.reboot(register)
        assert "previously allocated devices are no longer healthy" in str(failed[alice.uid])


async def test_an_older_kubelet_starts_pods_after_a_reboot_without_asking_anybody(short_tmp: Path) -> None:
    bench = Bench(short_tmp, checks_health=False)
    async with bench.kubelet, bench.plugin(a=True):
        alice = pod("alice", limits=ONE)
        await bench.kubelet.start(alice)
        since = len(bench.kubelet.calls)
        assert await bench.kubelet.reboot() == {}
        assert bench.calls(since) == []
        assert bench.started[-1][2].env == {"FAKE": "1"}


async def test_a_static_pod_of_before_its_plugin_can_never_restart_its_container(bench: Bench) -> None:
    early = pod("early", limits=ONE, static=True)
    await bench.kubelet.start(early)
    assert bench.started[-1][2].env == {}
    async with bench.plugin(a=True) as plugin:
        with pytest.raises(ContainerNotStarted, match="no devices found allocated in local cache for pod uid-early"):
            await bench.kubelet.start_container(early, "desktop")
        plugin.options.pre_start_required = False
        await plugin.register()
        await bench.kubelet.start_container(early, "desktop")
        assert bench.started[-1][2].env == {"FAKE": "1"}, "without PreStartContainer it is given a device at last"


async def test_an_answer_for_no_container_fails_the_pod(bench: Bench) -> None:
    async with bench.plugin(a=True) as plugin:
        plugin.answer = None
        with pytest.raises(PodRejected, match="Allocate failed due to no containers return in allocation response"):
            await bench.kubelet.admit(pod("alice", limits=ONE))


@pytest.mark.parametrize("lag_s", [0.0, 0.05])
async def test_both_streams_of_a_plugin_that_registered_twice_are_read(short_tmp: Path, lag_s: float) -> None:
    """k8s#127803: an older kubelet takes the end of the first stream for the end of the second."""
    bench = Bench(short_tmp, stream_end_lag_s=lag_s)
    async with bench.kubelet, bench.plugin(a=True) as first, bench.plugin(endpoint="again.sock", b=True):
        first.devices(a=True, c=True)
        await bench.told({"a": True, "c": True})
        assert bench.kubelet.allocatable(R) == {"a", "c"}, "the last word counts, whoever says it"
        first.end_streams()
        if lag_s:
            await bench.kubelet.until(lambda: not bench.kubelet.allocatable(R))
            assert bench.kubelet.node_status() == {R: ResourceCount(2, 0)}
        else:
            await bench.kubelet.until(lambda: len(bench.kubelet._clients) == 1)
            await asyncio.sleep(0)
            assert bench.kubelet.allocatable(R) == {"a", "c"}


async def test_devices_of_ended_pods_are_kept_while_the_api_server_is_away(bench: Bench) -> None:
    async with bench.plugin(a=True) as plugin:
        await bench.kubelet.start(pod("alice", limits=ONE))
        await bench.kubelet.restart(api_away=True)
        bench.kubelet.pods.clear()  # it has not heard of them yet
        await plugin.register()
        await bench.told({"a": True})
        static = pod("static", limits=ONE, static=True)
        with pytest.raises(PodRejected, match=r"Requested: 1, Available: 0"):
            await bench.kubelet.admit(static)
        bench.kubelet.has_sources = True
        await bench.kubelet.admit(static)
