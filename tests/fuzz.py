"""Mutated input for every decoder of bytes from outside (make fuzz MINUTES=n). Totals accumulate in bench/long.json.

A decoder may answer, or raise the error it promises; anything else, and an answer that takes longer than `SLOW_S`, is a
find: the input is kept in bench/finds/ and the exit code is 1. A find becomes a unit test and then a mended decoder.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from device_plugins import printer
from nodeagent import config
from nodeagent.devices import sysfs
from nodeagent.errors import ConfigError
from nodeagent.services.ipp import formats
from nodeagent.wire import descriptors, hid, ipp, seat

ROOT = Path(__file__).parents[1]
TOTALS = ROOT / "bench" / "long.json"
FINDS = ROOT / "bench" / "finds"
SLOW_S = 1.0
MAX_BYTES = 64 * 1024

# Get-Printer-Attributes as in RFC 8010 appendix A.8 (shortened), and a Print-Job with a collection.
IPP_SEEDS = (
    bytes.fromhex(
        "0101000b00000001"
        "01" + "470012617474726962757465732d63686172736574" + "00057574662d38"
        "48001b617474726962757465732d6e61747572616c2d6c616e6775616765" + "0005656e2d7573"
        "45000b7072696e7465722d757269" + "00156970703a2f2f686f73742f7072696e746572732f61"
        "440014726571756573746564" + "2d61747472696275746573" + "0003616c6c" + "03"
    ),
    bytes.fromhex(
        "02000002000000020147001261747472696275746573" + "2d63686172736574" + "00057574662d38"
        "0234" + "00096d656469612d636f6c0000"
        "4a000000" + "0a6d656469612d73697a65"
        "34000000004a000000" + "0b782d64696d656e73696f6e" + "2100000004000052" + "08"
        "370000000037000000" + "0003"
    )
    + b"%PDF-1.7",
)
CONFIG_SEED = b"""
devices:
  rules:
    - name: a
      match: {class: printer, serial: "A*"}
      to: {namespaces: ["x-*"], labels: {a: b}}
  simulated: [{model: printer, serial: P1, formats: [application/pdf]}]
seats: {memory_limit_mib: 64, cpu_limit: 0.5}
http: {listen: "[::]:9410", tls: {cert: /a, key: /b}}
"""
WORDS = (
    b"\0",
    b"\xff" * 4,
    b"\x7f\xff",
    b"\x80\0\0\0",
    b"&a *a",
    b"!!python/x",
    b"[" * 64,
    b"\n  ",
    b"%PDF-",
    b"@PJL ",
)


class Target(NamedTuple):
    decode: Callable[[bytes], Any]
    promised: tuple[type[Exception], ...]
    seeds: tuple[bytes, ...]


def _ipp_request(data: bytes) -> None:
    """What was taken can be put, and is taken as the same again."""
    if (taken := ipp.take_request(data)) is not None:
        again = ipp.take_request(ipp.put_request(taken[0]))
        assert again is not None and again[0] == taken[0], "taken, put and taken again is something else"


def _ipp_by_bytes(data: bytes) -> None:
    """A reader of single bytes sees the end exactly where one of the whole does."""
    whole = ipp.Extent().reach(data)
    extent, found = ipp.Extent(), None
    for size in range(len(data[:400]) + 1):
        if (found := extent.reach(data[:size])) is not None:
            break
    assert found == (whole if whole is not None and whole <= 400 else None), (found, whole)


TARGETS = {
    "ipp_request": Target(_ipp_request, (ipp.IppError,), IPP_SEEDS),
    "ipp_in_pieces": Target(_ipp_by_bytes, (ipp.IppError,), IPP_SEEDS),
    "ipp_response": Target(ipp.take_response, (ipp.IppError,), IPP_SEEDS),
    "from_worker": Target(
        seat.take_from_worker,
        (msgspec.DecodeError,),
        (
            seat.put_message(seat.CreateJob(request=1, printer="p", title="t")),
            seat.put_message(seat.CloseDocument(request=2, job=1, format="application/pdf", size=9, last=True)),
            seat.put_message(seat.Counters(service="ipp", bytes_in=1)),
        ),
    ),
    "configuration": Target(lambda d: config.parse(d.decode(errors="replace")), (ConfigError,), (CONFIG_SEED,)),
    "hid_descriptor": Target(hid.usages, (ValueError,), (bytes.fromhex("06d0f10901a1010920150026ff00750895408102c0"),)),
    "usb_descriptors": Target(
        descriptors.take_descriptors,
        (ValueError,),
        # A security key, and a network adapter with two configurations.
        (
            bytes.fromhex(
                "12010002000000405010200112050102000109022900010100800f"
                "0904000002030000000921100100012222000705040340000207058403400002"
            ),
            bytes.fromhex(
                "1201000300000009da0b5381003001020602" + "09021200010100a024" + "0904000000ffff0000"
                "09022400020200a024" + "090400000002060000" + "09040100000a000000" + "09040101000a000000"
            ),
        ),
    ),
    "printer_id": Target(
        lambda d: printer.formats(d.decode(errors="replace")),
        (),
        (b"MFG:HP;CMD:PJL,PCLXL,POSTSCRIPT,PDF;MDL:x;CLS:PRINTER;",),
    ),
    "device_text": Target(lambda d: sysfs.clean(d.decode(errors="replace")), (), (b"\x1b[31mLaserJet\n",)),
    "document_type": Target(
        formats.sniff, (), (b"\x1b%-12345X@PJL ENTER LANGUAGE = PDF\n%PDF-1.4", b"RaS2PwgRaster\0")
    ),
}


def mutate(rng: random.Random, corpus: list[bytes]) -> bytes:
    """One to eight small changes to a member of the corpus."""
    data = bytearray(rng.choice(corpus))
    for _ in range(rng.randint(1, 8)):
        at = rng.randint(0, len(data))
        change = rng.randrange(6)
        if change == 0 and data:
            data[at % len(data)] ^= 1 << rng.randrange(8)
        elif change == 1 and data:
            data[at % len(data)] = rng.randrange(256)
        elif change == 2:
            data[at:at] = rng.choice(WORDS)
        elif change == 3:
            del data[at : at + rng.randint(1, 16)]
        elif change == 4:
            data[at:at] = data[at : at + rng.randint(1, 64)] * rng.randint(1, 4)
        else:
            data[at:] = rng.choice(corpus)[-rng.randint(0, 64) :]
    return bytes(data[:MAX_BYTES])


def attempt(target: Target, data: bytes) -> str:
    """The traceback or complaint of a find; empty when the decoder behaved."""
    begun = time.perf_counter()
    try:
        target.decode(data)
    except target.promised:
        pass
    except Exception:
        return traceback.format_exc()
    took = time.perf_counter() - begun
    return f"took {took:.1f} s for {len(data)} bytes" if took > SLOW_S else ""


def fuzz(name: str, seconds: float, rng: random.Random) -> tuple[int, int]:
    """Cases tried and finds made in so many seconds. The corpus grows with inputs that got further (a new outcome)."""
    target, corpus, outcomes = TARGETS[name], list(TARGETS[name].seeds), set[str]()
    cases = finds = 0
    end = time.monotonic() + seconds
    while time.monotonic() < end and finds < 5:
        data = mutate(rng, corpus)
        cases += 1
        try:
            outcome = type(target.decode(data)).__name__
        except target.promised as error:
            outcome = "".join(c for c in str(error)[:60] if not c.isdigit())
        except Exception:
            outcome = "find"
        if outcome not in outcomes and len(corpus) < 500:
            outcomes.add(outcome)
            corpus.append(data)
        if (outcome == "find" or not cases % 64) and (complaint := attempt(target, data)):
            finds += 1
            FINDS.mkdir(exist_ok=True)
            file = FINDS / f"{name}-{hashlib.sha256(data).hexdigest()[:12]}"
            file.write_bytes(data)
            print(f"find: {file.relative_to(ROOT)}\n{complaint}", file=sys.stderr)
    return cases, finds


def add_totals(path: Path, unit: str, more: dict[str, float], note: str) -> dict[str, float]:
    """Add to the rows of bench/long.json and return the new totals."""
    rows = {row["name"]: row for row in (json.loads(path.read_text()) if path.exists() else [])}
    for name, count in more.items():
        row = rows.setdefault(
            name,
            {"name": name, "unit": unit, "ours": 0, "peer": None, "peer_name": None, "ratio": None}
            | {
                "better": "lower" if name.endswith(("finds", "failures")) else "higher",
                "n": 0,
                "ci95": None,
                "note": note,
            },
        )
        row["ours"] += count
        row["n"] += 1
    path.write_text(json.dumps([rows[name] for name in sorted(rows)], indent=1) + "\n")
    return {name: rows[name]["ours"] for name in more}


def main() -> int:
    parser = argparse.ArgumentParser(description="mutated input for every decoder")
    parser.add_argument("--minutes", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=time.time_ns())
    parser.add_argument("--totals", type=Path, default=TOTALS)
    parser.add_argument("targets", nargs="*", default=sorted(TARGETS), metavar="target")
    args = parser.parse_args()
    rng = random.Random(args.seed)
    print(f"seed {args.seed}", flush=True)
    found = 0
    for name in args.targets:
        cases, finds = fuzz(name, args.minutes * 60 / len(args.targets), rng)
        found += finds
        total = add_totals(
            args.totals, "inputs", {f"fuzz_{name}": cases, f"fuzz_{name}_finds": finds}, "mutated inputs decoded"
        )
        print(f"{name:<16} {cases:>9} inputs, {finds} finds; in all {total[f'fuzz_{name}']}", flush=True)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
