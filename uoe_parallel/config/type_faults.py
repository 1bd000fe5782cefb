"""What pydantic finds wrong with single fields, in the words of this project."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import suppress
from difflib import get_close_matches
from typing import Any, Literal, get_args, get_origin

from pydantic import TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

from uoe_parallel.config import yaml_text
from uoe_parallel.config.faults import ABSENT, Fault, show
from uoe_parallel.config.schema import RunConfig, Section

FieldPath = tuple[str, ...]

_NOUNS = {
    "integer": "an integer",
    "number": "a finite number",
    "string": "text",
    "boolean": "true or false",
    "null": "null",
    "object": "a mapping",
}
_RANGES = {
    "exclusiveMinimum": "above",
    "minimum": "of at least",
    "exclusiveMaximum": "below",
    "maximum": "of at most",
}
_TRUTH_WORDS = {"yes": True, "on": True, "1": True, "no": False, "off": False, "0": False}


def section_type(field: FieldInfo) -> type[Section] | None:
    """The model of a field that is a section, None for a leaf."""
    kind = field.annotation
    return kind if isinstance(kind, type) and issubclass(kind, Section) else None


def type_faults(error: ValidationError, tree: dict[str, Any]) -> dict[FieldPath, Fault]:
    """One fault for each field of `tree` that `error` complains about, however many times.

    A path that leads to no field of the schema is an unknown key.
    """
    faults: dict[FieldPath, Fault] = {}
    for detail in error.errors(include_url=False, include_context=False):
        path, owner, field = _locate(detail["loc"])
        faults[path] = _fault(path, owner, field, _lookup(tree, path))
    return faults


def _locate(location: tuple[int | str, ...]) -> tuple[FieldPath, type[Section], FieldInfo | None]:
    """Cuts off what pydantic says about the inside of a leaf: the field's path, section, info."""
    owner: type[Section] = RunConfig
    path: FieldPath = ()
    field = None
    for part in location:
        path = (*path, str(part))
        field = owner.model_fields.get(str(part))
        section = None if field is None else section_type(field)
        if section is None or len(path) == len(location):
            break
        owner = section
    assert path, "an error that belongs to no field"
    return path, owner, field


def _lookup(tree: dict[str, Any], path: FieldPath) -> object:
    value: Any = tree
    for part in path:
        if part not in value:
            return ABSENT
        value = value[part]
    return value


def _fault(path: FieldPath, owner: type[Section], field: FieldInfo | None, value: object) -> Fault:
    name = (".".join(path),)
    if field is None:
        return Fault(name, value, "is not a known field", _known_names(path, owner))
    section = section_type(field)
    if section is not None:
        names = [key for key, info in section.model_fields.items() if info.is_required()]
        mend = f"give it the fields {', '.join(names or section.model_fields)}"
        if value is ABSENT:
            return Fault(name, value, "is required", mend)
        return Fault(name, value, "is not a section", mend if names else f"{mend}, or remove it")
    expected = _expected(_adapter(field).json_schema())
    if value is ABSENT:
        return Fault(name, value, "is required", f"give {expected}")
    meant = next(_meant(value, field), ABSENT)
    mend = f"give {expected}" if meant is ABSENT else f"write {show(meant)}"
    return Fault(name, value, f"is not {expected}", mend)


def _adapter(field: FieldInfo) -> TypeAdapter[Any]:
    return TypeAdapter(field.rebuild_annotation(), config=Section.model_config)


def _expected(schema: dict[str, Any]) -> str:
    """A JSON schema of a leaf in words."""
    return _in_words(schema, schema.get("$defs", {}))


def _in_words(schema: dict[str, Any], definitions: dict[str, Any]) -> str:
    if "$ref" in schema:
        return _in_words(definitions[schema["$ref"].rpartition("/")[2]], definitions)
    if "anyOf" in schema:
        return " or ".join(_in_words(choice, definitions) for choice in schema["anyOf"])
    if choices := schema.get("enum", [schema["const"]] if "const" in schema else []):
        return " or ".join(show(choice) for choice in choices)
    if schema["type"] == "array" and "prefixItems" in schema:
        items = schema["prefixItems"]
        return f"a list of {len(items)}, each {_in_words(items[0], definitions)}"
    if schema["type"] == "array":
        return f"a list, each {_in_words(schema['items'], definitions)}"
    if schema["type"] == "object" and "properties" in schema:
        inner = schema["properties"].items()
        named = (f"{name} ({_in_words(field, definitions)})" for name, field in inner)
        return f"a mapping of {' and '.join(named)}"
    limits = [f" {words} {schema[key]:g}" for key, words in _RANGES.items() if key in schema]
    return _NOUNS[schema["type"]] + " and".join(limits)


def _meant(value: object, field: FieldInfo) -> Iterator[object]:
    """Values that fit the field and that `value` was probably meant to be."""
    adapter = _adapter(field)
    for guess in _guesses(value, field):
        try:
            adapter.validate_json(json.dumps(guess))
        except ValidationError:
            continue
        yield guess


def _guesses(value: object, field: FieldInfo) -> Iterator[object]:
    if isinstance(value, str):
        with suppress(yaml_text.YamlError):
            yield yaml_text.parse(value)
        if value.lower() in _TRUTH_WORDS:
            yield _TRUTH_WORDS[value.lower()]
        yield from get_close_matches(value, _choices(field.annotation), n=1)
    elif isinstance(value, float) and value.is_integer():
        yield int(value)
    elif isinstance(value, int) and value in (0, 1):
        yield bool(value)
    if isinstance(value, bool | int | float):
        yield [value]
        yield show(value)


def _choices(annotation: Any) -> list[str]:
    """The words that a Literal, or a union with one, allows."""
    if get_origin(annotation) is Literal:
        return [choice for choice in get_args(annotation) if isinstance(choice, str)]
    return [word for part in get_args(annotation) for word in _choices(part)]


def _known_names(path: FieldPath, owner: type[Section]) -> str:
    """Points from an unknown key to the field it was meant to be, or to those there are."""
    *parents, name = path
    if near := get_close_matches(name, owner.model_fields, n=1):
        return f"did you mean {'.'.join([*parents, *near])}?"
    elsewhere = dict(_leaves(RunConfig))
    if same := get_close_matches(name, set(elsewhere.values()), n=1, cutoff=0.85):
        places = [field for field, leaf in elsewhere.items() if leaf == same[0]]
        return f"did you mean {' or '.join(places)}?"
    return f"use one of {', '.join(owner.model_fields)}"


def _leaves(section: type[Section], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Dotted and plain name of every leaf below `section`."""
    for name, field in section.model_fields.items():
        inner = section_type(field)
        if inner is None:
            yield prefix + name, name
        else:
            yield from _leaves(inner, f"{prefix}{name}.")
