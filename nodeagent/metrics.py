"""Every metric of the daemon, in one table. Names and labels are public (docs/metrics.md).

Labels are enumerable words: never serials, paths or text from outside.
"""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

FAST = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0)


class Metrics:
    """One instance per daemon; tests make their own."""

    def __init__(self) -> None:
        r = self.registry = CollectorRegistry()
        self.on_scrape: list[Callable[[], None]] = []
        """Called before each exposition: gauges that follow from what is there are set then."""
        self.build_info = Gauge("nodeagent_build_info", "Always 1.", ["version"], registry=r)
        self.devices = Gauge(
            "nodeagent_devices", "Devices of this node.", ["class", "health", "state", "simulated"], registry=r
        )
        self.allocations = Counter("nodeagent_allocations", "Allocate calls.", ["resource", "result"], registry=r)
        self.allocate_duration = Histogram(
            "nodeagent_allocate_duration_seconds", "Time inside Allocate.", buckets=FAST, registry=r
        )
        self.hotplug_to_kubelet = Histogram(
            "nodeagent_hotplug_to_kubelet_seconds", "Kernel event to ListAndWatch message.", buckets=FAST, registry=r
        )
        self.registrations = Counter(
            "nodeagent_registrations", "Register calls the kubelet answered.", ["resource"], registry=r
        )
        self.seats = Gauge("nodeagent_seats", "Seats by state.", ["state"], registry=r)
        self.seat_bytes = Counter(
            "nodeagent_seat_bytes", "Bytes between desktops and their seats.", ["service", "direction"], registry=r
        )
        self.seat_worker_restarts = Counter(
            "nodeagent_seat_worker_restarts", "Seat workers that died and were made anew.", ["reason"], registry=r
        )
        self.denied = Counter("nodeagent_denied", "Refused attempts.", ["reason"], registry=r)
        self.refused_holding = Gauge(
            "nodeagent_refused_holding_seconds",
            "Longest time a pod that was refused three times has held a device.",
            ["resource"],
            registry=r,
        )
        self.clean_ups = Counter(
            "nodeagent_clean_ups", "Devices cleaned up between two holders.", ["result"], registry=r
        )
        self.node_changes = Counter(
            "nodeagent_node_changes",
            "Device nodes changed in running containers after a replug.",
            ["result"],
            registry=r,
        )
        self.evictions = Counter("nodeagent_evictions", "Evictions of refused pods.", ["result"], registry=r)
        self.print_jobs = Counter("nodeagent_print_jobs", "Print jobs that ended.", ["result"], registry=r)
        self.config_reloads = Counter(
            "nodeagent_config_reloads", "Reloads of the configuration.", ["result"], registry=r
        )
        self.upstream_restarts = Counter(
            "nodeagent_upstream_restarts",
            "Servers run by the agent that died and were started anew.",
            ["server"],
            registry=r,
        )
        self.outbox_length = Gauge("nodeagent_outbox_length", "Reports waiting for the API server.", registry=r)
        self.outbox_oldest = Gauge("nodeagent_outbox_oldest_seconds", "Age of the oldest waiting report.", registry=r)
        self.apiserver_connected = Gauge("nodeagent_apiserver_connected", "1 after the last call worked.", registry=r)
        self.self_rss = Gauge("nodeagent_self_rss_bytes", "Resident memory of the daemon.", registry=r)
        self.self_open_fds = Gauge("nodeagent_self_open_fds", "Open descriptors of the daemon.", registry=r)
        self.dropped = Counter("nodeagent_dropped", "Items a full queue dropped.", ["queue"], registry=r)
