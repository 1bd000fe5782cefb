"""The YAML that configs are written in: YAML 1.2's scalars, plain values, no key twice.

PyYAML follows YAML 1.1, where 3e-3 is text, 010 is eight, `no` is false and 2024-01-01 is a date.
"""

from __future__ import annotations

import json
import re
from typing import Any

import yaml

_SCALARS = (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?(0|[1-9][0-9_]*)", list("-+0123456789")),
    (
        "float",
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        list("-+0123456789."),
    ),
)
"""Name of the tag, what the scalar looks like, what it can start with; the first match counts."""


class YamlError(Exception):
    """Text that is not YAML of plain values; `line` counts from 1, None where unknown."""

    def __init__(self, problem: str, line: int | None = None) -> None:
        super().__init__(problem)
        self.problem = problem
        self.line = line


class _Loader(yaml.SafeLoader):
    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if key.tag != "tag:yaml.org,2002:str":
                raise _located("a key is not text; put it in quotes", key)
            if key.value in seen:
                raise _located(f"{key.value!r} is given twice in the same section", key)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:
        return True


# The dumper needs the loader's resolvers: they decide which text needs quotes.
for _class in (_Loader, _Dumper):
    _class.yaml_implicit_resolvers = {}
    for _tag, _pattern, _first in _SCALARS:
        _class.add_implicit_resolver(
            f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), _first
        )


def _located(problem: str, node: yaml.Node) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark)


def parse(text: str | bytes) -> Any:
    """The value of one YAML document: dicts with text keys, lists, text, numbers, bools, None.

    Bytes are UTF-8 (or UTF-16 with its mark). Raises YamlError.
    """
    try:
        # No tag of _Loader builds anything but plain data.
        value = yaml.load(text, _Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        problem = ", ".join(part for part in (error.context, error.problem) if part)
        raise YamlError(problem, mark.line + 1 if mark else None) from None
    except (yaml.YAMLError, ValueError) as error:
        raise YamlError(" ".join(str(error).split())) from None
    try:
        # A round trip through JSON refuses what a config cannot hold (dates, sets, loops, half
        # characters) and gives aliases of one anchor separate values.
        plain = json.dumps(value, ensure_ascii=False)
        plain.encode()
        return json.loads(plain)
    except (TypeError, ValueError) as error:
        raise YamlError(f"holds more than plain values ({error})") from None


def dump(value: Any) -> str:
    """YAML text that `parse` reads back to an equal value (tuples come back as lists)."""
    # ASCII with escapes, as PyYAML writes U+0085 as it is and reads it back as a line's end.
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=False)
