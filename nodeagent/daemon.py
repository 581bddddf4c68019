"""The composition root: builds every part, joins them, owns the one TaskGroup, and decides nothing.

    standby: configuration, zygote, inventory, web       -> waits for the state lock, and is ready
    active:  leases, slots, cgroups, spool and cupsd, seats rebound, control socket, comparison, kubelet

Two daemons may overlap on a node (an upgrade, a restart): the second is a standby until the first lets go of the lock.
"""

from __future__ import annotations

import asyncio
import fcntl
import logging
import os
import signal
import sys
from collections.abc import Callable
from contextlib import AsyncExitStack
from pathlib import Path

import nodeagent
from nodeagent import logs
from nodeagent.config import Config, load, node_name
from nodeagent.control import Control
from nodeagent.devices.cdi import CdiFiles
from nodeagent.devices.claims import Claims, owner
from nodeagent.devices.cri import Cri
from nodeagent.devices.identity import TwinMemory, node_key
from nodeagent.devices.inventory import Inventory
from nodeagent.devices.kubelet import Registrar
from nodeagent.devices.leases import Leases
from nodeagent.devices.podresources import PodResources
from nodeagent.devices.slots import Slots
from nodeagent.devices.slow_calls import SlowCalls
from nodeagent.devices.uids import check_uid_range, take_subuid
from nodeagent.errors import AgentError, ConfigError, Reason
from nodeagent.host import HostRoot
from nodeagent.marks import take_label, take_taint
from nodeagent.metrics import Metrics
from nodeagent.model import PodRef
from nodeagent.offers import Offers
from nodeagent.reload import Reload
from nodeagent.report.endpoint import Endpoint, discover
from nodeagent.report.events import Events
from nodeagent.report.kube import KubeClient
from nodeagent.report.outbox import Outbox
from nodeagent.report.readiness import Readiness
from nodeagent.seats.binding import AccountLookup, Binding
from nodeagent.seats.cgroups import SeatCgroups
from nodeagent.seats.clean_ups import CleanUps, device_hook
from nodeagent.seats.comparison import Comparison
from nodeagent.seats.node_carriage import NodeCarriage, carry
from nodeagent.seats.refusals import Refusals
from nodeagent.seats.roster import Roster
from nodeagent.seats.seat import Surroundings
from nodeagent.seats.strays import Strays
from nodeagent.seats.zygote import Zygote
from nodeagent.services.printing.cups import Cups
from nodeagent.services.printing.filters import Filters
from nodeagent.services.printing.spool import Spool
from nodeagent.transports.labels import Labels
from nodeagent.view import Active, View
from nodeagent.web.app import Web

log = logging.getLogger(__name__)

LOCK_POLL_S = 0.05
REAP_S = 2.0


class Stopped(Exception):
    """Ends a TaskGroup when the daemon was asked to stop."""


async def serve(
    source: Reload,
    host: HostRoot,
    metrics: Metrics,
    stop: asyncio.Event,
    endpoint: Endpoint | None = None,
    on_view: Callable[[View], None] = lambda _: None,
) -> None:
    """Run the daemon until `stop` is set. Raises an ExceptionGroup of what made it fail.

    `endpoint` is the API server, None without one; `on_view` hears of the daemon's view of itself as soon as there is one.
    """
    config = source.config
    state_dir, run_dir = Path(config.state_dir), Path(config.run_dir)
    for directory in (state_dir, run_dir):
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
    metrics.build_info.labels(nodeagent.__version__).set(1)
    key = await asyncio.to_thread(node_key, state_dir)
    view = View(source)
    on_view(view)
    try:
        async with AsyncExitStack() as stack, asyncio.TaskGroup() as tasks:
            zygote = await stack.enter_async_context(Zygote())
            inventory = await stack.enter_async_context(Inventory(host, config.devices, key, TwinMemory(state_dir)))
            view.inventory = inventory
            source.on_config.append(lambda new: inventory.reconfigure(new.devices))
            source.on_config.append(lambda new: logs.configure(new.log))
            tasks.create_task(zygote.run(), name="zygote")
            if os.getpid() == 1:
                tasks.create_task(_reap(Strays()), name="strays")
            tasks.create_task(inventory.run(), name="inventory")
            tasks.create_task(source.run(), name="configuration")
            tasks.create_task(Web(config.http, metrics, view).run(), name="web")
            control = Control(run_dir, view)
            tasks.create_task(control.run(), name="control")
            await _until_own_or(stop, state_dir / "lock", stack)
            control.claim()
            await _be_active(source, host, metrics, stop, endpoint, zygote, inventory, view)
            raise Stopped
    except* Stopped:
        log.info("stopped")


async def _be_active(
    source: Reload,
    host: HostRoot,
    metrics: Metrics,
    stop: asyncio.Event,
    endpoint: Endpoint | None,
    zygote: Zygote,
    inventory: Inventory,
    view: View,
) -> None:
    """Everything that needs the state lock, until `stop` is set."""
    config = source.config
    state_dir, run_dir = Path(config.state_dir), Path(config.run_dir)
    async with AsyncExitStack() as parts:
        leases = await parts.enter_async_context(Leases(state_dir / "state.db", config.seats))
        outbox = await parts.enter_async_context(Outbox(state_dir / "outbox.db", metrics))
        api = await parts.enter_async_context(KubeClient(endpoint, metrics)) if endpoint else None
        events = Events(outbox, node_name(config), metrics, api)
        cri = await parts.enter_async_context(Cri(host, config.cri.socket))
        pod_resources = await parts.enter_async_context(PodResources(config.pod_resources_socket))
        slots = Slots(run_dir, Labels(host))
        slots.prepare()
        # Two daemons in one cgroup (two state directories on one node) must not sweep each other's seats.
        cgroups = SeatCgroups(name=f"nodeagent-seats-{owner(config.state_dir)}")
        await cgroups.prepare()
        parts.push_async_callback(cgroups.remove)
        slow = SlowCalls()
        claims = Claims(host, owner(config.state_dir), slow)
        try:
            async with asyncio.TaskGroup() as tasks:
                cups = Cups(config.printing, state_dir, run_dir, zygote.spawn_program, metrics)
                # The lambdas are for parts that are made below: spool, roster and offers know each other.
                hidden = (config.state_dir, config.run_dir, config.kubelet.root_dir, *_host_root(config))
                filters = Filters(config.printing, zygote.spawn_program, lambda seat: roster.context(seat), hidden)
                spool = Spool(
                    state_dir / "spool", config.printing, cups, metrics,
                    convert=filters, on_change=lambda seat: roster.jobs_changed(seat),
                )  # fmt: skip
                around = Surroundings(
                    zygote=zygote, spool=spool, metrics=metrics, config=config, printing=lambda seat: offers.printing(seat)
                )  # fmt: skip
                roster = Roster(
                    config=config, leases=leases, slots=slots, cgroups=cgroups, spool=spool, around=around,
                    metrics=metrics, tasks=tasks,
                )  # fmt: skip
                hook = device_hook(host, slow, lambda due: offers.to_clean(due))
                clean_ups = CleanUps(leases=leases, roster=roster, hook=hook, metrics=metrics, tasks=tasks)
                refusals = Refusals(
                    report=events, metrics=metrics, evict=api.evict if api else None,
                    evicting=lambda: source.config.devices.on_refusal == "evict", admitted=roster.seated,
                )  # fmt: skip
                binding = Binding(
                    config=config, leases=leases, slots=slots, roster=roster, cri=cri, pod_resources=pod_resources,
                    clean_ups=clean_ups, account=_accounts(api), refusals=refusals,
                )  # fmt: skip
                carriage = NodeCarriage(
                    roster=roster, slots=slots, offers=binding.offers, carry=lambda *change: carry(host, *change),
                    report=events, metrics=metrics,
                )  # fmt: skip
                comparison = Comparison(
                    binding=binding, host=host, leases=leases, slots=slots, roster=roster, cri=cri,
                    pod_resources=pod_resources, clean_ups=clean_ups, carriage=carriage, report=events, metrics=metrics,
                    on_release=inventory.settle,
                )  # fmt: skip
                registrar = Registrar(Path(config.kubelet.device_plugin_dir), binding, pod_resources, metrics)
                offers = Offers(
                    config=config, inventory=inventory, binding=binding, registrar=registrar, roster=roster, cups=cups,
                    cdi=CdiFiles(Path(config.devices.cdi_dir)), claims=claims, metrics=metrics, wake=comparison.wake,
                )  # fmt: skip
                binding.on_leases, binding.tell_leases = offers.on_leases, offers.tell_leases
                active = Active(
                    leases=leases, outbox=outbox, api=api, cri=cri, cups=cups, spool=spool, roster=roster,
                    binding=binding, comparison=comparison, registrar=registrar, offers=offers, claims=claims,
                    slots=slots,
                )  # fmt: skip
                tasks.create_task(events.run(), name="events")
                tasks.create_task(cups.run(), name="cupsd")
                parts.callback(roster.close)
                metrics.on_scrape += [offers.measure, roster.measure, binding.measure]
                await inventory.own(binding.held)
                offers.apply()
                inventory.subscribe(offers.on_change)
                source.on_config.append(offers.on_config)
                source.on_rejected = lambda message: events.node_event(Reason.CONFIG_INVALID, message)
                await binding.rebuild()
                await binding.rebind()  # seats serve from here on, so what they need follows at once
                tasks.create_task(spool.run(), name="spool")
                tasks.create_task(offers.run(), name="offers")
                view.active = active
                tasks.create_task(comparison.run(), name="comparison")
                tasks.create_task(refusals.run(), name="refusals")
                if api is not None:
                    tasks.create_task(_readiness(api, config, registrar).run(), name="readiness")
                claiming = tasks.create_task(claims.run(), name="claims")
                kubelet = tasks.create_task(registrar.run(), name="kubelet")
                log.info("active")
                await stop.wait()
                kubelet.cancel()  # first, so that the kubelet asks nothing of a daemon that is leaving
                claiming.cancel()
                await asyncio.wait({kubelet, claiming})
                await claims.close(x.device_id for x in leases.leases)
                raise Stopped
        except* Stopped:
            view.active = None


async def _until_own_or(stop: asyncio.Event, path: Path, stack: AsyncExitStack) -> None:
    """Hold the state lock of this node; the kernel takes it from a holder that dies. Raises Stopped when told to stop."""
    lock = stack.enter_context(path.open("ab"))
    waited = False
    while not stop.is_set():
        try:
            fcntl.flock(lock.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if not waited:
                log.info("another daemon of this node is active; this one is its standby")
            waited = True
            await asyncio.sleep(LOCK_POLL_S)
        else:
            return
    raise Stopped


def _readiness(api: KubeClient, config: Config, registrar: Registrar) -> Readiness:
    kubernetes = config.kubernetes
    return Readiness(
        api, node_name(config), registrar.registered,
        taint=take_taint(kubernetes.startup_taint, "kubernetes.startup_taint"),
        label=take_label(kubernetes.ready_label, "kubernetes.ready_label"),
    )  # fmt: skip


def _accounts(api: KubeClient | None) -> AccountLookup:
    async def lookup(pod: PodRef) -> str | None:
        try:
            return await api.service_account(pod) if api else None
        except AgentError as error:
            log.warning("the service account of pod %s is not known: %s", pod, error)
            return None

    return lookup


def main(path: Path, *, explicit: bool) -> int:
    """Run the daemon in the foreground. Returns an exit code of the command line; says why on standard error."""
    try:
        config = load(path) if explicit or path.exists() else Config()
        logs.configure(config.log)
        check_uid_range(config.seats, take_subuid(_subuid(HostRoot(config.host_root))))
        if os.geteuid() != 0:
            raise AgentError(Reason.NOT_SUPPORTED, "the daemon needs root", hint="sudo nodeagent run")
        asyncio.run(_run(path, config, discover(config.kubernetes)))
    except ConfigError as error:
        print(f"nodeagent: {error}", file=sys.stderr)
        return 2
    except AgentError as error:
        print(f"nodeagent: {error}", file=sys.stderr)
        return 1
    except BaseExceptionGroup as group:
        for leaf in _leaves(group):
            log.error("the daemon failed: %s: %s", type(leaf).__name__, leaf, exc_info=leaf)
        return 1
    return 0


async def _run(path: Path, config: Config, endpoint: Endpoint | None) -> None:
    metrics = Metrics()
    source = Reload(path, config, metrics)
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    loop.add_signal_handler(signal.SIGHUP, source.ask)
    await serve(source, HostRoot(config.host_root), metrics, stop, endpoint)


def _host_root(config: Config) -> tuple[str, ...]:
    """The host's files as the daemon's pod has them; nothing where the daemon runs on the host itself."""
    return () if config.host_root == "/" else (config.host_root,)


def _subuid(host: HostRoot) -> str:
    try:
        return host.path("/etc/subuid").read_text(errors="replace")
    except FileNotFoundError:
        return ""


async def _reap(strays: Strays) -> None:
    """As process 1 of a container: bury what outlived its parents."""
    while True:
        strays.sweep()
        await asyncio.sleep(REAP_S)


def _leaves(group: BaseExceptionGroup[BaseException]) -> list[BaseException]:
    return [x for e in group.exceptions for x in (_leaves(e) if isinstance(e, BaseExceptionGroup) else [e])]
