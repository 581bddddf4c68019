"""What the daemon tells about itself: the documents of `status`, `devices`, `seats`, `config` and `version`, from its parts.

Reads, never changes. A standby has no active parts yet; its documents say so.
"""

from __future__ import annotations

import os
import time
from typing import Literal

import msgspec

import nodeagent
from nodeagent import documents as doc
from nodeagent.config import node_name
from nodeagent.devices.claims import Claims
from nodeagent.devices.cri import Cri
from nodeagent.devices.inventory import Inventory
from nodeagent.devices.kubelet import Registrar, RegistrationState
from nodeagent.devices.leases import Leases
from nodeagent.devices.resources import by_device
from nodeagent.devices.slots import Slots
from nodeagent.model import Lease, SeatState
from nodeagent.offers import Offers
from nodeagent.reload import Reload
from nodeagent.report.kube import KubeClient
from nodeagent.report.outbox import Outbox
from nodeagent.seats.binding import Binding
from nodeagent.seats.comparison import Comparison
from nodeagent.seats.roster import Roster
from nodeagent.seats.seat import Seat
from nodeagent.services.printing.cups import Cups
from nodeagent.services.printing.spool import Spool

VERBS = ("status", "devices", "seats", "config", "version")
OPEN_STATES = (3, 4, 5)
CANCELLED, ABORTED, COMPLETED = 7, 8, 9


class Active(msgspec.Struct, kw_only=True):
    """The parts that only the holder of the state lock has: what an active daemon has and a standby has not."""

    leases: Leases
    outbox: Outbox
    api: KubeClient | None
    cri: Cri
    cups: Cups
    spool: Spool
    roster: Roster
    binding: Binding
    comparison: Comparison
    claims: Claims
    slots: Slots
    registrar: Registrar
    offers: Offers


class View:
    """Answers for the control socket and for HTTP (documents.Documents)."""

    def __init__(self, source: Reload) -> None:
        self.active: Active | None = None
        self.inventory: Inventory | None = None
        self._source = source
        self._started_s = time.time()

    def document(self, verb: str) -> doc.Document:
        """The document of a verb; KeyError for one that has none."""
        if verb not in VERBS:
            raise KeyError(verb)
        made: doc.Document = getattr(self, f"_{verb}")()
        return made

    async def reload(self) -> doc.ReloadDocument:
        changed = await self._source.reload()
        return doc.ReloadDocument(path=str(self._source.path), changed=changed)

    def not_ready(self) -> tuple[str, ...]:
        """What /readyz waits for. A warmed-up standby is ready: the upgrade that started it waits for that."""
        if self.inventory is None:
            return ("the devices have not been looked at yet",)
        if self.active is None or self.active.registrar.registered.is_set():
            return ()
        return tuple(
            f"{r.resource} is not registered with the kubelet: {r.detail or r.state.value}"
            for r in self.active.registrar.registrations
            if r.state is not RegistrationState.REGISTERED
        )

    # ---- one per verb

    def _status(self) -> doc.StatusDocument:
        active, config = self.active, self._source.config
        not_ready = self.not_ready()
        return doc.StatusDocument(
            node=node_name(config),
            version=nodeagent.__version__,
            pid=os.getpid(),
            uptime_s=time.time() - self._started_s,
            role="active" if active else "standby",
            ready=not not_ready,
            not_ready=not_ready,
            kubelet=self._registrations(),
            devices=self._counts(),
            seats={s: sum(x.state is s for x in active.roster.seats.values()) for s in SeatState} if active else {},
            leases=len(active.leases.leases) if active else 0,
            cri=self._cri(),
            api=active.api.peer if active and active.api else doc.Peer(name="API server", state="off"),
            upstreams=(active.cups.peer,) if active else (),
            outbox=active.outbox.state if active else doc.OutboxState(),
            config=doc.ConfigState(
                path=str(self._source.path) if self._source.from_file else "",
                loaded_s=self._source.loaded_s,
                last_error=self._source.last_error,
            ),
            problems=tuple(self._problems()),
        )

    def _devices(self) -> doc.DevicesDocument:
        devices = self.inventory.devices if self.inventory else {}
        active = self.active
        offers = by_device(active.binding.resources.values() if active else ())
        unoffered = {u.device_id: u.message for u in (active.offers.resources.unoffered if active else ())}
        leases = {x.device_id: x for x in (active.leases.leases if active else ())}
        rows = []
        for device_id, device in devices.items():
            names, found = offers.get(device_id, ((), None))
            rows.append(
                doc.device_row(
                    device,
                    resource=",".join(names),
                    rule=found.rule if found else "",
                    services=found.grant.services if found and found.give == "service" else (),
                    unoffered=unoffered.get(device_id, "" if active else "this daemon is a standby"),
                    ailment=found.ailment if found else "",
                    held_by=_holder(leases.get(device_id)),
                )
            )
        twins = self.inventory.twins if self.inventory else ()
        return doc.DevicesDocument(
            node=node_name(self._source.config),
            devices=tuple(rows),
            problems=tuple(
                doc.Problem(
                    message=f"the devices at ports {', '.join(ports)} have one serial number and are known by their ports",
                    hint="one that is moved to another port is another device then",
                )
                for ports in sorted(twins)
            ),
        )

    def _seats(self) -> doc.SeatsDocument:
        active = self.active
        rows = [self._seat(seat, active) for seat in active.roster.seats.values()] if active else []
        if active:
            rows += [
                doc.SeatRow(
                    pod=r.pod,
                    state=SeatState.REQUESTED,
                    since_s=r.since_s,
                    message=r.message,
                    hint="the rule's `to:` decides who may hold it",
                    resources=(r.resource,),
                    denied={r.reason: r.count},
                )
                for r in active.binding.refusals.rows
            ]
        return doc.SeatsDocument(node=node_name(self._source.config), seats=tuple(rows))

    def _config(self) -> doc.ConfigDocument:
        return doc.ConfigDocument(source="daemon", path=str(self._source.path), config=self._source.config)

    def _version(self) -> doc.VersionDocument:
        return doc.VersionDocument.here()

    # ---- their parts

    def _seat(self, seat: Seat, active: Active) -> doc.SeatRow:
        devices = self.inventory.devices if self.inventory else {}
        jobs = active.spool.jobs(seat.name)
        bytes_in, bytes_out = seat.moved_bytes
        return doc.SeatRow(
            pod=seat.pod,
            state=seat.state,
            since_s=seat.since_s,
            sandbox=seat.kind,
            containers=tuple(sorted({b.container for b in seat.slots.values()})),
            resources=tuple(sorted({b.resource for b in seat.slots.values()})),
            devices=tuple(
                doc.SeatDevice(
                    id=i,
                    resource=b.resource,
                    present=i in devices and devices[i].present,
                    simulated=i in devices and devices[i].usb.simulated,
                )
                for b in seat.slots.values()
                for i in b.ids
            ),
            services=seat.services,
            worker=doc.WorkerState(pid=seat.worker_pid, uid=seat.uid, restarts=seat.restarts),
            jobs=doc.JobCounts(
                open=sum(j.state in OPEN_STATES for j in jobs),
                done=sum(j.state == COMPLETED for j in jobs),
                cancelled=sum(j.state == CANCELLED for j in jobs),
                failed=sum(j.state == ABORTED for j in jobs),
            ),
            bytes_in=bytes_in,
            bytes_out=bytes_out,
            denied=dict(seat.denied),
        )

    def _registrations(self) -> tuple[doc.Registration, ...]:
        if self.active is None:
            return ()
        resources = self.active.binding.resources
        rows = []
        for registration in self.active.registrar.registrations:
            offers = resources[registration.resource].offers if registration.resource in resources else {}
            rows.append(
                doc.Registration(
                    resource=registration.resource,
                    registered=registration.state is RegistrationState.REGISTERED,
                    devices=len(offers),
                    healthy=sum(o.device.present for o in offers.values()),
                    since_s=registration.since_s if registration.state is RegistrationState.REGISTERED else 0,
                    message=registration.detail,
                )
            )
        return tuple(rows)

    def _counts(self) -> doc.DeviceCounts:
        devices = self.inventory.devices.values() if self.inventory else ()
        active = self.active
        return doc.DeviceCounts(
            known=len(devices),
            present=sum(d.present for d in devices),
            offered=sum(len(r.offers) for r in active.offers.resources.resources.values()) if active else 0,
            leased=len(active.leases.leases) if active else 0,
            simulated=sum(d.usb.simulated for d in devices),
        )

    def _cri(self) -> doc.Peer:
        if self.active is None:
            return doc.Peer(name="container runtime", state="starting")
        error = self.active.comparison.cri_error
        state: Literal["unreachable", "connected"] = "unreachable" if error else "connected"
        return doc.Peer(
            name="container runtime", state=state, since_s=self.active.comparison.cri_since_s, message=error
        )

    def _problems(self) -> list[doc.Problem]:
        source, active = self._source, self.active
        problems = []
        if source.last_error:
            problems.append(
                doc.Problem(
                    message=f"the configuration file was not taken: {source.last_error}", hint="mend it and save it"
                )
            )
        if source.needs_restart:
            problems.append(
                doc.Problem(message=f"{', '.join(source.needs_restart)} of the file waits", hint="restart the daemon")
            )
        if active is None:
            return problems
        if active.comparison.cri_error:
            problems.append(
                doc.Problem(message=active.comparison.cri_error, hint="pods cannot be identified meanwhile")
            )
        if active.leases.recovered:
            problems.append(
                doc.Problem(
                    message=f"state.db was damaged and is kept at {active.leases.aside}",
                    hint="leases were learned anew",
                )
            )
        problems += active.claims.problems
        problems += active.slots.problems
        problems += [doc.Problem(message=r.message, reason=r.reason) for r in active.binding.refusals.rows]
        return problems


def _holder(lease: Lease | None) -> doc.Holder | None:
    if lease is None:
        return None
    return doc.Holder(pod=lease.pod, container=lease.container, slot=lease.slot, since_s=lease.created_s)
