"""`nodeagent config show | check | schema | policy | reload`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from nodeagent import cli
from nodeagent.cli import _client, _options
from nodeagent.cli._output import Colour, Paint, add_output, emit, visible
from nodeagent.config import DEFAULT_PATH, MAX_CONFIG_BYTES, Config, parse
from nodeagent.documents import ConfigCheckDocument, ConfigDocument, DeviceExplanation, Problem, ReloadDocument
from nodeagent.errors import ConfigError

NAME = "config"
HELP = "show, check or reload the configuration, or print its JSON schema or its admission policy"


def arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    show = actions.add_parser("show", help="the effective configuration: the file with every default filled in")
    show.add_argument(
        "--running", action="store_true", help="what the daemon uses now, which a bad file does not change"
    )
    add_output(show)
    check = actions.add_parser("check", help="check a file, and say for each device which rule takes it; exit 0 or 2")
    check.add_argument("file", nargs="?", type=Path, metavar="FILE", help="default: the file of --config")
    _options.add_root(check)
    add_output(check)
    schema = actions.add_parser("schema", help="the JSON schema of the file")
    schema.add_argument("-o", "--output", choices=("json", "yaml"), default="json", help="how to print (default json)")
    policy = actions.add_parser(
        "policy",
        help="the rules' `to:` as a ValidatingAdmissionPolicy for the cluster; with --check, exit 3 if FILE differs",
    )
    policy.add_argument(
        "--values", type=Path, metavar="FILE", help="take `config` of these Helm values instead of --config"
    )
    policy.add_argument("--name", default="nodeagent", help="of the policy and its binding (default nodeagent)")
    policy.add_argument(
        "--failure-policy",
        choices=("Ignore", "Fail"),
        default="Ignore",
        help="what becomes of a pod when the policy cannot be evaluated (default Ignore: the daemon refuses it anyway)",
    )
    policy.add_argument(
        "--action",
        dest="verdict",
        choices=("Deny", "Warn", "Audit"),
        default="Deny",
        help="what happens to a pod that the rules do not let have its device (default Deny)",
    )
    policy.add_argument("--check", type=Path, metavar="FILE", help="print nothing; is this what would be printed?")
    policy.add_argument("-o", "--output", choices=("yaml", "json"), default="yaml", help="how to print (default yaml)")
    add_output(actions.add_parser("reload", help="have the daemon read its file again; exit 2 when it is refused"))
    for action in actions.choices.values():
        cli.common(action)


def run(args: argparse.Namespace) -> int:
    actions = {"show": _show, "check": _check, "schema": _schema, "policy": _policy, "reload": _reload}
    return actions[args.action](args)


def _show(args: argparse.Namespace) -> int:
    if args.running:
        raw = _client.ask(_options.run_dir(args), NAME)
        asked = _client.decode(raw, ConfigDocument)
        emit(raw, args.output, lambda paint: _shown(asked, paint))
        return cli.FINE
    loaded = _options.configuration(args)
    document = ConfigDocument(source="file" if loaded.path else "defaults", path=loaded.path, config=loaded.config)
    emit(document, args.output, lambda paint: _shown(document, paint))
    return cli.FINE


def _shown(document: ConfigDocument, paint: Paint) -> str:
    """The configuration as the file that would say the same."""
    import yaml

    where = {"file": document.path, "defaults": "no file, the defaults", "daemon": f"the daemon, from {document.path}"}
    head = f"# {where[document.source]}"
    body = yaml.safe_dump(msgspec.to_builtins(document.config), sort_keys=False, allow_unicode=True)
    return f"{paint(visible(head), 'dim')}\n{body.rstrip()}"


def _check(args: argparse.Namespace) -> int:
    path: Path | None = args.file or args.config
    try:
        loaded = _options.Loaded(_options.load_named(path), str(path)) if path else _options.configuration(args)
    except ConfigError as error:
        if args.output == "table":
            raise
        refused = ConfigCheckDocument(path=str(path or DEFAULT_PATH), ok=False, error=Problem.of(error))
        emit(refused, args.output, lambda paint: "")
        return cli.CONFIG
    from nodeagent.cli import _direct

    with _options.root(args) as root:
        found = _direct.look(loaded.config, root)
    document = ConfigCheckDocument(path=loaded.path, ok=True, devices=_direct.explanations(found, loaded.config))
    emit(document, args.output, lambda paint: _checked(document, paint))
    return cli.FINE


def _checked(document: ConfigCheckDocument, paint: Paint) -> str:
    lines = []
    for explained in document.devices:
        lines += [*_explained(explained, paint), ""]
    if not document.devices:
        lines += ["no devices to try the rules on", ""]
    verdict = f"{document.path} is fine" if document.path else "there is no file; the defaults are fine"
    return "\n".join([*lines, paint(visible(verdict), "green")])


def _explained(explained: DeviceExplanation, paint: Paint) -> list[str]:
    device = explained.device
    simulated = " (simulated)" if device.simulated else ""
    lines = [f"{visible(device.id or device.class_)} {visible(device.name)} at port {visible(device.port)}{simulated}"]
    for rule in explained.rules:
        verdict = f"takes it: {device.resource or device.unoffered}" if rule.taken else rule.why
        colour: Colour | None = None if not rule.taken else "green" if device.resource else "yellow"
        lines.append(f"  {visible(rule.rule)}: {paint(visible(verdict), colour)}")
    if not any(rule.taken for rule in explained.rules):
        lines.append(paint("  no rule takes it: it is not offered", "yellow"))
    return lines


def _schema(args: argparse.Namespace) -> int:
    schema = msgspec.json.schema(Config)
    emit(msgspec.json.encode({"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}), args.output, str)
    return cli.FINE


def _policy(args: argparse.Namespace) -> int:
    import yaml

    from nodeagent.seats.policy import policy

    config = _values(args.values) if args.values else _options.configuration(args).config
    objects = policy(config.devices, name=args.name, failure_policy=args.failure_policy, action=args.verdict)
    if args.check:
        try:
            found = list(yaml.safe_load_all(_read(args.check)))
        except yaml.YAMLError as error:
            raise ConfigError(f"{args.check}: not valid YAML: {' '.join(str(error).split())}") from error
        if _plain(found) == list(objects):
            return cli.FINE
        print(f"{args.check} is not what the rules say now", file=sys.stderr)
        print("hint: make it anew with `nodeagent config policy`", file=sys.stderr)
        return cli.CHECK_FAILED
    if args.output == "json":
        whole = {"apiVersion": "v1", "kind": "List", "items": objects}
        text = msgspec.json.format(msgspec.json.encode(whole), indent=2).decode()
    else:
        # Round trip: no YAML aliases for what the two objects share.
        text = yaml.safe_dump_all(msgspec.json.decode(msgspec.json.encode(objects)), sort_keys=False, width=110)
        text = text.rstrip() or "# The rules let everybody in: there is nothing to refuse."
    sys.stdout.write(text + "\n")
    sys.stdout.flush()
    return cli.FINE


def _plain(found: list[Any]) -> list[Any]:
    """The objects of a YAML stream, or of the List that -o json prints."""
    objects = [o for o in found if o is not None]
    if len(objects) == 1 and isinstance(objects[0], Mapping) and objects[0].get("kind") == "List":
        return list(objects[0].get("items") or [])
    return objects


def _values(path: Path) -> Config:
    """The configuration in the values of our chart. Raises ConfigError."""
    import yaml

    try:
        values = yaml.safe_load(_read(path))
    except (yaml.YAMLError, RecursionError) as error:
        raise ConfigError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from error
    config = values.get("config") if isinstance(values, Mapping) else None
    if not isinstance(config, Mapping):
        raise ConfigError(
            f"{path}: there is no `config` in these values", hint="--config FILE takes the configuration itself"
        )
    try:
        return parse(yaml.safe_dump(config))
    except ConfigError as error:
        raise ConfigError(f"{path}: config.{error.message}", hint=error.hint) from error


def _read(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return file.read(MAX_CONFIG_BYTES).decode()
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 text (byte {error.start})") from error


def _reload(args: argparse.Namespace) -> int:
    raw = _client.reload(_options.run_dir(args))
    document = _client.decode(raw, ReloadDocument)
    said = "read again and in use" if document.changed else "read again; it says what was already in use"
    emit(raw, args.output, lambda paint: f"{visible(document.path)}: {said}")
    return cli.FINE
