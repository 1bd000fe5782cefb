"""From a YAML file and overrides to a checked config, or to one message with every fault."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from uoe_parallel.config import yaml_text
from uoe_parallel.config.checks import RULES
from uoe_parallel.config.faults import ABSENT, Fault, report
from uoe_parallel.config.schema import Corpora, RunConfig, Section
from uoe_parallel.config.type_faults import FieldPath, section_type, type_faults
from uoe_parallel.errors import UserError

_STAND_INS: dict[Any, object] = {int: 1, float: 1.0, str: "", Corpora: ""}
"""Valid values for required fields, by type."""


def load_config(
    path: str | Path,
    overrides: Sequence[str] = (),
    checks: Sequence[Callable[[RunConfig], Iterable[Fault]]] = (),
) -> RunConfig:
    """The config in the YAML file `path`, with `section.field=value` overrides put on top.

    Values of overrides are YAML and replace what the file has there; of two for the same field
    the later one counts. `checks` are rules to run beside those of `checks.py`.

    Raises UserError with every fault there is: overrides that cannot be read, unknown fields,
    values of the wrong type or range, and broken rules between fields that are valid by
    themselves. A file that cannot be read is reported alone.
    """
    return resolve_config(
        read_tree(Path(path), _required()), overrides, checks, source=f"the config {path}"
    )


def resolve_config(
    tree: dict[str, Any],
    overrides: Sequence[str] = (),
    checks: Sequence[Callable[[RunConfig], Iterable[Fault]]] = (),
    *,
    source: str,
) -> RunConfig:
    """As `load_config`, of what a file holds, which `source` names. Puts the overrides into it."""
    faults = list(put_overrides(tree, overrides))
    config, wrong = _validate(tree)
    faults += wrong.values()
    faulty = {".".join(field) for field in wrong}
    for rule in (*RULES, *checks):
        faults += [fault for fault in rule(config) if not _rests_on(fault, faulty)]
    if faults:
        raise UserError(report(f"{source} with its overrides" if overrides else source, faults))
    return config


def format_config(config: RunConfig) -> str:
    """Every field of `config` as YAML, defaults too."""
    return yaml_text.dump(config.model_dump())


def save_config(config: RunConfig, path: str | Path) -> None:
    """Writes `format_config` to `path`; `load_config` reads back an equal config."""
    Path(path).write_text(format_config(config), encoding="utf-8")


def read_tree(path: Path, required: str) -> dict[str, Any]:
    """The mapping in a YAML file of a config. Raises UserError, which names what is `required`, if
    there is none."""
    try:
        content = path.read_bytes()
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise UserError(f"cannot read the config {path}: {reason}; check the path") from None
    try:
        tree = yaml_text.parse(content)
    except yaml_text.YamlError as error:
        line = "" if error.line is None else f", line {error.line}"
        raise UserError(
            f"the config {path}{line}: {error.problem}; correct the YAML there"
        ) from None
    if tree is None:
        raise UserError(f"the config {path} is empty; it needs at least {required}")
    if not isinstance(tree, dict):
        raise UserError(
            f"the config {path} is not a mapping; write fields as `name: value`, at least "
            f"{required}"
        )
    return tree


def _required() -> str:
    return ", ".join(name for name, field in RunConfig.model_fields.items() if field.is_required())


def put_overrides(tree: dict[str, Any], overrides: Sequence[str]) -> Iterator[Fault]:
    """Puts `section.field=value` into `tree`; what cannot be put there is yielded as a fault."""
    for text in overrides:
        name = (f"override {text!r}",)
        key, equals, written = text.partition("=")
        path = key.strip().split(".")
        if not equals:
            yield Fault(name, ABSENT, 'has no "="', "write it as section.field=value")
            continue
        if not all(path):
            yield Fault(name, ABSENT, "names no field", "write it as section.field=value")
            continue
        try:
            value = yaml_text.parse(written)
        except yaml_text.YamlError as error:
            mend = "write the value as in YAML, quoted for the shell"
            yield Fault(name, ABSENT, f"has a value that is not YAML: {error.problem}", mend)
            continue
        *parents, leaf = path
        section = _enter(tree, parents)
        if section is None:
            mend = f"give the whole value of {'.'.join(parents)}"
            yield Fault(name, ABSENT, "reaches into what is not a section", mend)
        else:
            section[leaf] = value


def _enter(tree: dict[str, Any], path: Sequence[str]) -> dict[str, Any] | None:
    """The mapping at `path`, made where nothing is; None where something else is."""
    for part in path:
        if tree.get(part) is None:
            tree[part] = {}
        tree = tree[part]
        if not isinstance(tree, dict):
            return None
    return tree


def _parse(tree: dict[str, Any]) -> RunConfig:
    # As JSON, because pydantic's strict mode takes a list for a tuple there and only there.
    return RunConfig.model_validate_json(json.dumps(tree))


def _validate(tree: dict[str, Any]) -> tuple[RunConfig, dict[FieldPath, Fault]]:
    """The config, and the faults of single fields; faulty fields have stand-ins in the config."""
    try:
        return _parse(tree), {}
    except ValidationError as error:
        faults = type_faults(error, tree)
    return _parse(_mended(RunConfig, tree, faults.keys())), faults


def _mended(
    section: type[Section], tree: object, faulty: Collection[FieldPath], prefix: FieldPath = ()
) -> dict[str, Any]:
    """`tree` without faulty fields (so that their defaults hold) and with no required one missing.

    Rules can then run on a whole config, whatever is wrong with parts of it; `_rests_on` sorts
    out the verdicts that mean something.
    """
    given = tree if isinstance(tree, dict) else {}
    mended: dict[str, Any] = {}
    for name, field in section.model_fields.items():
        path = (*prefix, name)
        inner = section_type(field)
        if inner is not None:
            if name in given or field.is_required():
                mended[name] = _mended(inner, given.get(name), faulty, path)
        elif name in given and path not in faulty:
            mended[name] = given[name]
        elif field.is_required():
            mended[name] = _STAND_INS[field.annotation]
    return mended


def _rests_on(fault: Fault, faulty: Collection[str]) -> bool:
    """Whether a rule's verdict used a field that is faulty by itself or in a faulty section."""
    return any(
        field == name or field.startswith(f"{name}.") for field in fault.fields for name in faulty
    )
