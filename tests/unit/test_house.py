"""The rules of the house. Every message says what is wrong where, and how to mend it."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

import nodeagent
from nodeagent.cli import VERBS
from nodeagent.config import Config
from nodeagent.errors import Reason
from nodeagent.metrics import Metrics

ROOT = Path(__file__).parents[2]
OURS = (ROOT / "nodeagent", ROOT / "device_plugins")
GENERATED = ROOT / "nodeagent" / "wire" / "pb"
MAX_LINES = 500

TOP = {
    ".ci": "what continuous integration runs, and the Debian packages it needs",
    ".gitignore": "",
    "CHANGELOG.md": "",
    "CONTRIBUTING.md": "",
    "Dockerfile": "the image of the DaemonSet",
    "LICENSE": "",
    "Makefile": "what a user may rely on: make help",
    "README.md": "",
    "bench": "side-by-side measurements",
    "charts": "the Helm chart",
    "device_plugins": "what a USB device is to us, one file per class",
    "docs": "for users, and decisions/ for whoever changes the house",
    "nodeagent": "the daemon and its command line; its __init__ is the map",
    "proto": "our own .proto files of the kubelet's and the runtime's wire",
    "pyproject.toml": "",
    "requirements-dev.lock": "",
    "requirements.lock": "",
    "seccomp": "profiles as data",
    "tests": "unit, daemon, host, vm",
}

# Higher numbers may import lower ones and their own; a room is a package or a module below nodeagent.
LAYERS = (
    {"model", "errors", "config", "usbguard", "documents", "marks", "device_plugins", "nodeagent"},
    {"wire", "host", "metrics", "rpc", "logs"},
    {"services", "transports", "sandboxes"},
    {"devices", "seats", "report", "web"},
    {"cli", "daemon", "offers", "reload", "view", "control", "demo", "__main__"},
)
LEVEL = {room: level for level, rooms in enumerate(LAYERS) for room in rooms}
NEVER = {
    "device_plugins": {r for r in LEVEL if r not in ("model", "errors", "device_plugins")},
    "model": {r for r in LEVEL if r not in ("model", "errors", "nodeagent")},
    "errors": {r for r in LEVEL if r not in ("errors", "nodeagent")},
    "services": {"seats", "devices"},
    "devices": {"watch"},
    "watch": {"devices"},
}
PURE = (
    "nodeagent/wire", "nodeagent/model.py", "nodeagent/usbguard.py", "nodeagent/devices/resources.py",
    "nodeagent/devices/matching.py", "nodeagent/devices/exclusive.py", "device_plugins",
)  # fmt: skip
OUTSIDE_WORLD = {"os", "socket", "asyncio", "time", "subprocess", "threading", "select", "pathlib", "shutil", "sqlite3"}
BAD_NAMES = re.compile(r"(manager|handler|helper|utils?|info)s?$", re.IGNORECASE)


def modules(*roots: Path) -> list[Path]:
    return sorted(p for root in roots for p in root.rglob("*.py") if GENERATED not in p.parents)


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), str(path))


def texts() -> Iterator[Path]:
    """Every text file that belongs to the project."""
    skip = {".git", ".venv", "__pycache__", "build", "dist", ".hypothesis"}
    for top in sorted(ROOT.iterdir()):
        for path in [top] if top.is_file() else sorted(top.rglob("*")):
            parts = path.relative_to(ROOT).parts
            if skip & set(parts) or any(p.endswith(("_cache", ".egg-info")) for p in parts) or not path.is_file():
                continue
            try:
                path.read_text()
            except UnicodeDecodeError:
                continue
            yield path


def verdict(problems: list[str], remedy: str) -> None:
    assert not problems, "\n".join(["", *problems, f"-> {remedy}"])


def test_modules_are_short() -> None:
    long = [
        f"{name(p)}: {n} lines"
        for p in modules(*OURS, ROOT / "tests", ROOT / "bench")
        if (n := len(p.read_text().splitlines())) > MAX_LINES
    ]
    verdict(long, f"split at a noun: a module has at most {MAX_LINES} lines and reads best below 250")


def room(module: str) -> str:
    """`nodeagent.devices.cri` -> `devices`; `device_plugins.printer` -> `device_plugins`."""
    first, _, rest = module.partition(".")
    return rest.partition(".")[0] or "nodeagent" if first == "nodeagent" else first


def imports(path: Path) -> Iterator[tuple[int, str]]:
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{name(path)}:{node.lineno}: relative import; write the whole name"
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                inside = ROOT / whole.replace(".", "/")
                yield (
                    node.lineno,
                    whole if inside.is_dir() or inside.with_suffix(".py").is_file() else node.module or "",
                )


def test_imports_point_downwards() -> None:
    problems = []
    for path in modules(*OURS):
        mine = room(".".join(path.relative_to(ROOT).with_suffix("").parts))
        if mine == "__init__":
            mine = "nodeagent"
        if mine not in LEVEL:
            problems.append(f"{name(path)}: the room {mine!r} is in no layer; add it to LAYERS here and to the map")
            continue
        for line, module in imports(path):
            theirs = room(module)
            if module.split(".")[0] not in ("nodeagent", "device_plugins") or theirs == mine:
                continue
            if theirs in NEVER.get(mine, ()) or LEVEL.get(theirs, 0) > LEVEL[mine]:
                problems.append(f"{name(path)}:{line}: {mine} imports {module}")
    verdict(problems, "pass the thing in from above (daemon.py joins), or move the shared noun down (model, wire)")


def test_pure_modules_touch_nothing() -> None:
    problems = [
        f"{name(path)}:{line}: imports {module}"
        for path in modules(*OURS)
        if name(path).startswith(PURE)
        for line, module in imports(path)
        if module.split(".")[0] in OUTSIDE_WORLD
    ]
    verdict(problems, "codecs, nouns and rules are pure: take bytes, values and the time as arguments")


def test_every_room_is_on_the_map() -> None:
    ignored = {".git", ".venv", "build", "dist", ".hypothesis"}
    found = {p.name for p in ROOT.iterdir() if not p.name.endswith(("_cache", ".egg-info")) and p.name not in ignored}
    verdict([f"{n}: not in TOP" for n in sorted(found - set(TOP))], "name it in TOP, or do not keep it here")
    inside = {p.stem for p in (ROOT / "nodeagent").iterdir() if p.is_dir() or p.suffix == ".py"}
    inside -= {"__init__", "__main__", "__pycache__"}
    words = set(re.findall(r"[a-z_]+", nodeagent.__doc__ or ""))
    verdict(
        [f"nodeagent/{n}: not on the map" for n in sorted(inside - words)],
        "add its line to the docstring of nodeagent/__init__.py",
    )
    listed = set(re.findall(r"^    ([a-z]+)/ ", nodeagent.__doc__ or "", re.MULTILINE)) - {"tests"}
    verdict([f"{n}/: on the map, not in the house" for n in sorted(listed - inside)], "strike it from the map")


def test_no_module_is_empty() -> None:
    problems = []
    for path in modules(*OURS, ROOT / "tests", ROOT / "bench"):
        code = [n for n in tree(path).body if not isinstance(n, ast.Expr | ast.ImportFrom | ast.Import)]
        namespace = path.name == "__init__.py" and any(p != path for p in path.parent.iterdir() if p.suffix == ".py")
        if not code and not namespace and path.name != "__init__.py":
            problems.append(f"{name(path)}: nothing in it")
        elif path.name == "__init__.py" and not namespace and OURS[0] in path.parents and not code:
            problems.append(f"{name(path)}: an empty room")
    verdict(problems, "a room is opened when its first real content moves in")


def test_names_say_what_a_thing_is() -> None:
    problems = []
    for path in modules(*OURS, ROOT / "tests", ROOT / "bench"):
        if BAD_NAMES.search(path.stem):
            problems.append(name(path))
        problems += [
            f"{name(path)}:{node.lineno}: class {node.name}"
            for node in ast.walk(tree(path))
            if isinstance(node, ast.ClassDef) and BAD_NAMES.search(node.name)
        ]
    verdict(
        problems, "name it by its noun (Lease, Slot, Roster ...) or its verb: no Manager, Handler, Helper, Utils, Info"
    )


def behaves(member: ast.stmt) -> bool:
    """A public method that is not a property, or a constructor."""
    return (
        isinstance(member, ast.FunctionDef | ast.AsyncFunctionDef)
        and (not member.name.startswith("_") or member.name == "__init__")
        and not any(isinstance(d, ast.Name) and d.id == "property" for d in member.decorator_list)
    )


def is_verb(path: Path, function: str) -> bool:
    """`arguments` and `run` of a verb are described once for all, in cli/__init__.py."""
    return path.parent.name == "cli" and function in ("arguments", "run")


def test_public_things_say_what_they_promise() -> None:
    """Modules, classes with behaviour, and functions that do more than a few lines. Records speak by their fields."""
    problems = []
    for path in modules(*OURS):
        module = tree(path)
        if module.body and not ast.get_docstring(module):
            problems.append(f"{name(path)}: module")
        for node in module.body:
            if not isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) or node.name.startswith("_"):
                continue
            if isinstance(node, ast.ClassDef):
                needed = any(behaves(member) for member in node.body)
            else:
                needed = (node.end_lineno or 0) - node.body[0].lineno > 6 and not is_verb(path, node.name)
            if needed and not ast.get_docstring(node):
                problems.append(f"{name(path)}:{node.lineno}: {node.name}")
    verdict(problems, "a docstring with the contract: shapes, units, errors raised, where a number comes from")


def test_generated_files_are_up_to_date(tmp_path: Path) -> None:
    ran = subprocess.run(
        [sys.executable, str(ROOT / "proto" / "generate.py"), str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    fresh = {p.relative_to(tmp_path): p.read_bytes() for p in tmp_path.rglob("*") if p.suffix in (".py", ".pyi")}
    kept = {p.relative_to(GENERATED): p.read_bytes() for p in GENERATED.rglob("*") if p.suffix in (".py", ".pyi")}
    problems = [f"nodeagent/wire/pb/{p}" for p in sorted({*fresh, *kept}) if fresh.get(p) != kept.get(p)]
    verdict(problems, "make proto")


def test_every_make_target_is_explained() -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = {t for line in re.findall(r"^\.PHONY:(.*)$", makefile, re.MULTILINE) for t in line.split()}
    explained = set(re.findall(r"^([a-z]+):.*  ## \S", makefile, re.MULTILINE))
    verdict(sorted(targets ^ explained), "each target is in .PHONY and has `## what it does` behind it")


def test_metrics_are_documented() -> None:
    described = {m.name for m in Metrics().registry.collect()}
    page = set(
        re.findall(r"^\| `(nodeagent_\w+?)(?:_total)?[`{]", (ROOT / "docs/metrics.md").read_text(), re.MULTILINE)
    )
    verdict(sorted(described ^ page), "docs/metrics.md and nodeagent/metrics.py list the same metrics")


def keys(kind: type, prefix: str = "") -> Iterator[str]:
    for field in msgspec.structs.fields(kind):
        where = f"{prefix}{field.encode_name}"
        inner = field.type
        arguments = getattr(inner, "__args__", ())
        repeated = next((a for a in arguments if isinstance(a, type) and issubclass(a, msgspec.Struct)), None)
        if isinstance(inner, type) and issubclass(inner, msgspec.Struct):
            yield from keys(inner, f"{where}.")
        elif repeated:
            yield from keys(repeated, f"{where}[].")
        else:
            yield where


def test_configuration_is_documented() -> None:
    wanted = set(keys(Config))
    page = set(re.findall(r"^\| `([a-z_.\[\]]+)` ", (ROOT / "docs/configuration.md").read_text(), re.MULTILINE))
    verdict(sorted(wanted ^ page), "docs/configuration.md has one row per key of nodeagent/config.py")


def test_verbs_and_reasons_are_documented() -> None:
    page = (ROOT / "docs/cli.md").read_text()
    verbs, _, reasons = page.partition("## Reasons")
    listed = {words.split()[0] for words in re.findall(r"^\| `([a-z -]+)` \|", verbs, re.MULTILINE)}
    verdict(sorted(listed ^ set(VERBS)), "docs/cli.md lists the verbs of nodeagent/cli")
    listed = set(re.findall(r"^\| `([a-z_]+)` \|", reasons, re.MULTILINE))
    verdict(sorted(listed ^ set(Reason)), "docs/cli.md lists the reasons of nodeagent/errors.py")


def test_nothing_is_left_for_later_or_names_a_machine() -> None:
    later = re.compile(r"\b(TO" + r"DO|FIX" + r"ME|XX" + r"X)\b")
    machine = re.compile(r"(?<![\w.])/(?:wo" + r"rk|fa" + r"rm)/|/tmp/br" + r"ief|/opt/py" + r"pi")
    index = re.compile(
        r"py" + r"pi\.org|pythonho" + r"sted|registry\.np" + r"mjs|deb\.debi" + r"an\.org|proxy\.gol" + r"ang"
    )
    problems = [
        f"{name(path)}:{number}: {line.strip()[:120]}"
        for path in texts()
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if later.search(line) or machine.search(line) or index.search(line)
    ]
    verdict(problems, "finish it or file it; name no path of one machine and no package index")


def test_links_in_documents_resolve() -> None:
    problems = []
    for path in texts():
        if path.suffix != ".md":
            continue
        for target in re.findall(r"\]\(([^)\s]+)\)", path.read_text()):
            if re.match(r"[a-z]+:", target) or target.startswith("#"):
                continue
            file, _, anchor = target.partition("#")
            there = path.parent / file
            if not there.exists():
                problems.append(f"{name(path)}: {target}")
            elif anchor and anchor not in anchors(there):
                problems.append(f"{name(path)}: {target} (no such heading)")
    verdict(problems, "mend the link")


def anchors(path: Path) -> set[str]:
    """The anchors of a page, as GitHub makes them from its headings."""
    heads = re.findall(r"^#+ (.+)$", path.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in heads}


def test_one_version_everywhere() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    chart = (ROOT / "charts/nodeagent/Chart.yaml").read_text()
    assert nodeagent.__version__ == version, "nodeagent/__init__.py and pyproject.toml differ"
    assert f'appVersion: "{version}"' in chart, "charts/nodeagent/Chart.yaml has another appVersion"
    assert f"## {version}" in (ROOT / "CHANGELOG.md").read_text(), "CHANGELOG.md does not know this version"


def test_every_dependency_has_its_reason() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *(d for extra in project["optional-dependencies"].values() for d in extra)]
    page = (ROOT / "docs/decisions/0002-dependencies.md").read_text().lower()
    names = {re.split(r"[<>=!~\[ ]", d)[0].lower() for d in wanted}
    verdict(
        sorted(n for n in names if f"`{n}`" not in page), "say in docs/decisions/0002-dependencies.md why it is here"
    )


def test_every_dependency_is_used() -> None:
    module = {"grpcio": "grpc", "protobuf": "google", "pyyaml": "yaml", "prometheus-client": "prometheus_client"}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = {re.split(r"[<>=!~\[ ]", d)[0].lower() for d in project["dependencies"]}
    used = {m.split(".")[0] for path in modules(*OURS) for _, m in imports(path)}
    verdict(sorted(d for d in wanted if module.get(d, d) not in used), "take it out of pyproject.toml, then make lock")


@pytest.mark.parametrize("lock", ["requirements.lock", "requirements-dev.lock"])
def test_lock_has_hashes_and_names_no_index(lock: str) -> None:
    lines = (ROOT / lock).read_text().splitlines()
    pinned = {line.split("==")[0] for line in lines if re.match(r"[a-z]", line)}
    bare = [
        line for line, below in zip(lines, [*lines[1:], ""], strict=True) if "==" in line and "--hash=" not in below
    ]
    foreign = [line for line in lines if "://" in line or line.startswith("-")]
    verdict(bare + foreign, "make lock")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = {re.split(r"[<>=!~\[ ]", d)[0].lower() for d in project["dependencies"]}
    verdict(sorted(wanted - pinned), "pyproject.toml has changed: make lock")
