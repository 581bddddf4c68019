"""A whole daemon and the API server: Events about refused pods, rules on service accounts, and life while it is away."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from nodeagent.demo.pods import ContainerNotStarted
from nodeagent.model import SeatState
from nodeagent.report.endpoint import Endpoint
from nodeagent.seats import refusals
from tests.daemon.house import PRINTER, House, eventually, pod
from tests.fakes.apiserver import ApiServer

pytestmark = pytest.mark.root


@pytest.fixture
async def api() -> AsyncIterator[ApiServer]:
    async with ApiServer() as server:
        yield server


@pytest.fixture
async def house(short_tmp: Path, api: ApiServer) -> AsyncIterator[House]:
    made = House(short_tmp)
    made.endpoint = Endpoint(server=api.url)
    async with made.kubelet, made.cri:
        yield made


def runs_as(api: ApiServer, name: str, account: str) -> None:
    api.pods["default", name] = {"metadata": {"uid": f"uid-{name}"}, "spec": {"serviceAccountName": account}}


async def test_a_refused_pod_gets_one_event_that_names_the_rule(house: House, api: ApiServer) -> None:
    house.save(rules=[{"name": "nurses", "match": {"class": "printer"}, "to": {"labels": {"role": "nurse"}}}])
    async with house.life():
        await house.kubelet.until(lambda: len(house.kubelet.allocatable(PRINTER)) == 1)
        desk = pod("desk")
        house.sandbox(desk)
        await house.kubelet.admit(desk)
        for _ in range(3):
            with pytest.raises(ContainerNotStarted):
                await house.kubelet.start_container(desk, "desktop")
        await api.until(events=1)
        await eventually(lambda: house.view.document("status").outbox.length == 0)
    (event,) = api.events.values()
    assert event["reason"] == "LabelsDoNotMatch" and event["type"] == "Warning"
    assert "'nurses'" in event["message"] and "role=nurse" in event["message"]
    assert event["involvedObject"]["name"] == "desk" and event["involvedObject"]["uid"] == "uid-desk"


async def test_service_accounts_decide_and_unknown_ones_are_refused(house: House, api: ApiServer) -> None:
    house.save(
        rules=[{"name": "alice", "match": {"class": "printer"}, "to": {"service_accounts": ["alice"]}}],
        simulated=[{"model": "printer", "serial": f"P{n}"} for n in range(3)],
    )
    runs_as(api, "hers", "alice")
    runs_as(api, "his", "bob")
    async with house.life() as active:
        await house.kubelet.until(lambda: len(house.kubelet.allocatable(PRINTER)) == 3)
        await house.run(pod("hers"))
        assert house.seat(active, pod("hers")).state is SeatState.LIVE
        with pytest.raises(ContainerNotStarted, match="service account bob"):
            await house.run(pod("his"))
        await api.stop()
        with pytest.raises(ContainerNotStarted, match="cannot be looked up"):
            await house.run(pod("late"))
        assert house.value("denied_total", reason="identity_unavailable") == 1
        await house.kubelet.start_container(pod("hers"), "desktop")  # known already
        assert house.value("apiserver_connected") == 0


async def test_a_bad_reload_is_an_event_of_the_node(house: House, api: ApiServer) -> None:
    async with house.life():
        house.config_path.write_text("nonsense: 1")
        house.source.ask()
        await api.until(events=1)
    (event,) = api.events.values()
    assert event["involvedObject"]["kind"] == "Node" and "nonsense: unknown key" in event["message"]


async def test_a_pod_that_keeps_what_it_is_refused_is_evicted_where_the_file_says_so(
    house: House, api: ApiServer
) -> None:
    to = {"labels": {"role": "nurse"}}
    house.save(rules=[{"name": "nurses", "match": {"class": "printer"}, "to": to}])
    runs_as(api, "desk", "default")
    desk = pod("desk")
    async with house.life() as active:
        await house.kubelet.until(lambda: len(house.kubelet.allocatable(PRINTER)) == 1)
        house.sandbox(desk)
        await house.kubelet.admit(desk)
        for _ in range(3):
            assert house.value("refused_holding_seconds", resource=PRINTER) == 0
            with pytest.raises(ContainerNotStarted):
                await house.kubelet.start_container(desk, "desktop")
        assert house.value("refused_holding_seconds", resource=PRINTER) > 0
        await active.binding.refusals.step()
        assert not api.evicted, "it is reported, no more"
        house.save(on_refusal="evict")
        await house.source.reload()
        await eventually(lambda: api.evicted)
        assert api.evicted == [("default", "desk", "uid-desk")]
        await api.until(events=2)
        house.end(desk)
        await eventually(lambda: not active.binding.refusals.rows)
        assert house.value("refused_holding_seconds", resource=PRINTER) == 0
    assert [e["reason"] for e in api.events.values()] == ["LabelsDoNotMatch", "EvictingRefusedPod"]


async def test_a_container_that_runs_without_its_device_is_refused_again_and_again(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(refusals, "SEEN_AGAIN_S", 0.0)
    house.save(rules=[{"name": "nurses", "match": {"class": "printer"}, "to": {"labels": {"role": "nurse"}}}])
    desk = pod("desk")
    async with house.life() as active:
        await house.kubelet.until(lambda: len(house.kubelet.allocatable(PRINTER)) == 1)
        house.sandbox(desk)
        await house.kubelet.admit(desk)
        house.kubelet.endpoints[PRINTER].options = None  # a kubelet that was restarted starts containers without asking
        await house.kubelet.start_container(desk, "desktop")
        for _ in range(3):
            await active.comparison.compare()
        assert active.binding.refusals.rows[0].count >= 3
        assert house.value("denied_total", reason="labels_do_not_match") == 1
        assert not active.roster.seats


async def test_a_pod_that_is_let_in_is_no_longer_refused(house: House, api: ApiServer) -> None:
    house.save(
        on_refusal="evict",
        rules=[{"name": "p", "match": {"class": "printer"}, "to": {"namespaces": ["elsewhere"]}}],
    )
    runs_as(api, "desk", "default")
    desk = pod("desk")
    async with house.life() as active:
        await house.kubelet.until(lambda: len(house.kubelet.allocatable(PRINTER)) == 1)
        house.sandbox(desk)
        await house.kubelet.admit(desk)
        for _ in range(2):
            with pytest.raises(ContainerNotStarted):
                await house.kubelet.start_container(desk, "desktop")
        house.save(rules=[{"name": "p", "match": {"class": "printer"}}])
        await house.source.reload()
        await house.kubelet.start_container(desk, "desktop")
        assert not active.binding.refusals.rows
        assert house.seat(active, desk).state is SeatState.LIVE
        await active.binding.refusals.step()
    assert not api.evicted


async def test_the_node_says_that_its_devices_are_offered_over_a_hand_over_too(house: House, api: ApiServer) -> None:
    node = api.add_node("node-1")
    node["spec"]["taints"] = [{"key": "opencdi.io/not-ready", "effect": "NoSchedule"}]
    house.raw["kubernetes"] |= {
        "startup_taint": "opencdi.io/not-ready:NoSchedule",
        "ready_label": "opencdi.io/devices=ready",
    }
    house.save()
    async with house.life():
        await eventually(lambda: node["metadata"]["labels"].get("opencdi.io/devices") == "ready")
        assert node["spec"]["taints"] == []
    version = node["metadata"]["resourceVersion"]
    async with house.life():
        await house.kubelet.until(lambda: len(house.kubelet.allocatable(PRINTER)) == 1)
        await eventually(lambda: api.calls.count(("GET", "/api/v1/nodes/node-1")) == 2)
    assert node["metadata"]["resourceVersion"] == version, "nothing was written"
