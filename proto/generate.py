"""Regenerate nodeagent/wire/pb from proto/ (make proto). A test fails when what is committed differs."""

from __future__ import annotations

import sys
from pathlib import Path

from grpc_tools import protoc

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "nodeagent.wire.pb"


def generate(out: Path) -> None:
    """Write one package per .proto below `out`; imports are absolute under nodeagent.wire.pb."""
    protos = sorted((ROOT / "proto").rglob("*.proto"))
    staging = [str(p.relative_to(ROOT / "proto")) for p in protos]
    args = ["protoc", f"-I{ROOT / 'proto'}", f"--python_out={out}", f"--pyi_out={out}", *staging]
    if protoc.main(args):
        raise SystemExit(1)
    for directory in {out, *(d for p in staging for d in (out / p).parents if out in d.parents)}:
        (directory / "__init__.py").write_text("")


if __name__ == "__main__":
    generate(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "nodeagent" / "wire" / "pb")
