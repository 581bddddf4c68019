"""nodeagent: the devices of a node in the hands of the right desktop. This page is the map of the house.

A desktop (a pod) asks Kubernetes for `opencdi.io/printer`. What it receives is not the device but a *slot* of its
*seat*: a small directory of Unix sockets, mounted at `/run/opencdi/printer/`, that works in every sandbox.

    device appears -> Inventory -> Resource advertised -> Lease + Slot -> Seat bound -> Attachment live -> desktop

Start with `model.py` (the nouns) and `errors.py` (why things are refused), then follow the flow above through
`devices/` and `seats/`; `daemon.py` is the parts list that joins them.

    model errors config      the nouns, the reasons, the file; documents: the public JSON of every verb
    usbguard                 the language in which rules name interfaces and ids
    marks                    how the taint and the label are spelled that tell the scheduler about a node
    host metrics rpc logs    the node's root and commands, every metric, gRPC over Unix sockets, log lines
    wire/                    codecs without I/O: IPP, what daemon and worker say to each other, USB HID; pb/ is generated
    services/                what a seat can offer: printing (IPP for the seat, spool and cupsd for the daemon)
    transports/              how a seat is reached: Unix sockets and the descriptors that travel over them
    sandboxes/               runc, gVisor: where a desktop's end of the mount lives and what it accepts
    devices/                 udev -> devices -> resources -> kubelet -> leases -> slots, one file a step
    seats/                   who holds a slot, the zygote, one unprivileged worker process per seat, its cgroup
    report/                  the API server: Events, kept in an outbox while it is away, and whether this node is ready
    web/                     /metrics, /healthz, /readyz and /api/v1 over HTTP
    daemon                   the composition root: builds every part, owns the one TaskGroup, decides nothing
    offers reload            when devices, rules or the file change: who is told what, in which order
    view control             what the daemon tells about itself; the gRPC socket on which the command line asks
    demo/                    `make run`: a stand-in kubelet and a stand-in runtime over the real runc and runsc
    cli/                     one file per verb

Below stands what is used by everything above it; imports point downwards only (tests/unit/test_house.py):

    cli daemon demo offers reload view control -> devices seats report web -> services transports sandboxes
        -> wire host metrics rpc logs -> model errors config documents usbguard marks

Two processes parse nothing a desktop sent: the daemon (root) and the zygote. A worker parses it all and may do nothing.
"""

__version__ = "0.1.0"
