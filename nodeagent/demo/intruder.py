"""What a tenant can do inside a desktop with its own hands: plain IPP, no CUPS client that would check anything first.

Run inside a desktop by `python3 -c`, so it needs nothing but the standard library:

    intruder attack '{"own": "mine", "other": "theirs", "job": 7, "paths": ["/a.sock"], "search": ["/run"]}'
    intruder open   '{"own": "mine"}'                creates a job and sends no document; prints its id
    intruder state  '{"own": "mine", "job": 7}'      prints its job-state

The printer's socket is the one that CUPS_SERVER names. `attack` prints an array of `{"attempt", "refused", "ipp", "answer"}`;
`ipp` tells that it was an operation the seat's filter has to refuse (and count), not a path that is not there.
"""

from __future__ import annotations

import json
import os
import socket
import struct
import sys
from collections.abc import Iterator
from typing import Any

PRINT_JOB, CREATE_JOB, SEND_DOCUMENT, CANCEL_JOB, GET_JOB, GET_JOBS, GET_PRINTER = 2, 5, 6, 8, 9, 10, 11
PAUSE_PRINTER, PURGE_JOBS = 0x10, 0x12
CUPS_GET_PRINTERS, CUPS_ADD_PRINTER, CUPS_DELETE_PRINTER, CUPS_SET_DEFAULT = 0x4002, 0x4003, 0x4004, 0x400A
CUPS_GET_DEVICES, CUPS_GET_DOCUMENT = 0x400B, 0x4027
OPERATION_GROUP, PRINTER_GROUP, END = 1, 4, 3
INTEGER, BOOLEAN, NAME, KEYWORD, URI, CHARSET, LANGUAGE = 0x21, 0x22, 0x42, 0x44, 0x45, 0x47, 0x48
FIRST_ERROR = 0x0400  # RFC 8011 appendix B: below are the successes
MAX_ANSWER = 1 << 20
MAX_SOCKETS = 64
PAGE = b"%!PS-Adobe-3.0\n%%Pages: 1\nshowpage\n%%EOF\n"


def attribute(tag: int, name: str, value: str | int | bool) -> bytes:
    """One attribute with one value (RFC 8010 section 3.1)."""
    if isinstance(value, bool):
        data = struct.pack(">?", value)
    else:
        data = struct.pack(">i", value) if isinstance(value, int) else value.encode()
    return struct.pack(">BH", tag, len(name)) + name.encode() + struct.pack(">H", len(data)) + data


def printer(name: str) -> bytes:
    return attribute(URI, "printer-uri", f"ipp://localhost/printers/{name}")


def job(number: int) -> bytes:
    return attribute(URI, "job-uri", f"ipp://localhost/jobs/{number}")


def http(method: str, path: str, body: bytes = b"", extra: str = "") -> tuple[int, bytes]:
    """One HTTP exchange with the printer's socket: status and body."""
    with socket.socket(socket.AF_UNIX) as link:
        link.settimeout(10)
        link.connect(os.environ["CUPS_SERVER"])
        head = f"{method} {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n{extra}Content-Length: {len(body)}\r\n"
        if method == "POST":
            head += "Content-Type: application/ipp\r\n"
        link.sendall(head.encode() + b"\r\n" + body)
        answer = b""
        while len(answer) < MAX_ANSWER and (data := link.recv(65536)):
            answer += data
    head_bytes, _, rest = answer.partition(b"\r\n\r\n")
    return int(head_bytes.split()[1]), rest


def ipp(
    operation: int, attributes: bytes, *, more: bytes = b"", document: bytes = b"", root: bool = False
) -> tuple[int, bytes]:
    """One IPP operation: its status (0x0400 and up: refused) and the answer. `root` claims to be root, as cupsd would believe."""
    start = attribute(CHARSET, "attributes-charset", "utf-8") + attribute(LANGUAGE, "attributes-natural-language", "en")
    body = (
        struct.pack(">BBHI", 2, 0, operation, 1) + bytes([OPERATION_GROUP]) + start + attributes + more + bytes([END])
    )
    status, answer = http("POST", "/", body + document, "Authorization: PeerCred root\r\n" if root else "")
    at = answer.find(b"\x02\x00")  # the body may be chunked: the version opens the IPP answer
    if status != 200 or at < 0:
        return max(status, FIRST_ERROR), answer
    return int(struct.unpack(">H", answer[at + 2 : at + 4])[0]), answer


def operations(own: str, other: str, number: int) -> Iterator[tuple[str, int, bytes, dict[str, Any]]]:
    """What is tried against the other printer, its job, and the queues themselves."""
    user = attribute(NAME, "requesting-user-name", "root")
    device = bytes([PRINTER_GROUP]) + attribute(URI, "device-uri", "file:/dev/null")
    last = attribute(BOOLEAN, "last-document", True)
    yield "look at the printer", GET_PRINTER, printer(other) + user, {}
    yield "print on it", PRINT_JOB, printer(other) + user, {"document": PAGE}
    yield "create a job on it", CREATE_JOB, printer(other) + user, {}
    yield "list its jobs", GET_JOBS, printer(other) + user + attribute(KEYWORD, "which-jobs", "all"), {}
    yield "read its job", GET_JOB, job(number) + user, {}
    yield "fetch the document of its job", CUPS_GET_DOCUMENT, job(number) + user, {}
    yield "add a page to its job", SEND_DOCUMENT, job(number) + user + last, {"document": PAGE}
    yield "cancel its job", CANCEL_JOB, job(number) + user, {}
    by_own = printer(own) + attribute(INTEGER, "job-id", number) + user
    yield "cancel its job by way of the own printer", CANCEL_JOB, by_own, {}
    yield "purge its jobs", PURGE_JOBS, printer(other) + user, {}
    yield "pause it", PAUSE_PRINTER, printer(other) + user, {}
    yield "make a queue for it", CUPS_ADD_PRINTER, printer(other) + user, {"more": device}
    yield "make a queue for it as root", CUPS_ADD_PRINTER, printer(other) + user, {"more": device, "root": True}
    yield "change the own queue as root", CUPS_ADD_PRINTER, printer(own) + user, {"more": device, "root": True}
    yield "delete it", CUPS_DELETE_PRINTER, printer(other) + user, {"root": True}
    yield "make it the default", CUPS_SET_DEFAULT, printer(other) + user, {}
    yield "list the devices of the node", CUPS_GET_DEVICES, user, {}


def sockets(given: list[str], search: list[str]) -> list[str]:
    """Paths to try: those given, and every socket that can be found below the directories of `search`, but not the own one."""
    found = list(given)
    for top in search:
        for directory, _, names in os.walk(top):
            for name in names:
                path = os.path.join(directory, name)  # noqa: PTH118
                try:
                    if os.stat(path).st_mode & 0o170000 == 0o140000:  # noqa: PTH116
                        found.append(path)
                except OSError:
                    continue
    own = os.environ["CUPS_SERVER"]
    return [path for path in dict.fromkeys(found) if path != own][:MAX_SOCKETS]


def attack(own: str, other: str, number: int, paths: list[str], search: list[str]) -> list[dict[str, Any]]:
    """Everything, one after the other; an attempt that fails to get an answer counts as refused."""
    done = []

    def note(attempt: str, refused: bool, is_ipp: bool, answer: str) -> None:
        done.append({"attempt": attempt, "refused": refused, "ipp": is_ipp, "answer": answer})

    for name, operation, attributes, how in operations(own, other, number):
        status, _ = ipp(operation, attributes, **how)
        note(name, status >= FIRST_ERROR, True, f"0x{status:04x}")
    _, answer = ipp(CUPS_GET_PRINTERS, b"")
    found = other.encode() in answer
    note("find it in the list of printers", not found, False, "it is there" if found else "it is not there")
    everything = printer(own) + attribute(KEYWORD, "which-jobs", "all")
    _, answer = ipp(GET_JOBS, everything)
    found = f"/jobs/{number}".encode() in answer
    note("find its job in the list of jobs", not found, False, "it is there" if found else "it is not there")
    for method, path in (("GET", "/admin/log/error_log"), ("PUT", "/admin/conf/cupsd.conf")):
        status, _ = http(method, path, extra="Authorization: PeerCred root\r\n")
        note(f"{method} {path}", status >= 400, False, f"HTTP {status}")
    for path in sockets(paths, search):
        with socket.socket(socket.AF_UNIX) as link:
            link.settimeout(5)
            try:
                link.connect(path)
                note(f"connect to {path}", False, False, "connected")
            except (OSError, ValueError) as error:
                note(f"connect to {path}", True, False, str(error))
    return done


def job_number(answer: bytes) -> int:
    """job-id in an answer, 0 where there is none."""
    at = answer.find(b"\x00\x06job-id\x00\x04")
    return int(struct.unpack(">i", answer[at + 10 : at + 14])[0]) if at >= 0 else 0


def job_state(answer: bytes) -> int:
    at = answer.find(b"\x00\x09job-state\x00\x04")
    return int(struct.unpack(">i", answer[at + 13 : at + 17])[0]) if at >= 0 else 0


def main(verb: str, text: str) -> None:
    """One verb of the docstring; its result is printed as JSON."""
    given = json.loads(text)
    result: Any
    if verb == "attack":
        result = attack(given["own"], given["other"], given["job"], given["paths"], given["search"])
    elif verb == "open":
        title = attribute(NAME, "job-name", "kept open")
        result = job_number(ipp(CREATE_JOB, printer(given["own"]) + title)[1])
    else:
        result = job_state(ipp(GET_JOB, job(given["job"]))[1])
    print(json.dumps(result))


if __name__ == "__main__":
    main(*sys.argv[1:3])
