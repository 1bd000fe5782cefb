"""One thing that is wrong with a config, and how all of them are told together."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

ABSENT: Final = object()
"""Stands for the value of a field that was not given."""

_LONGEST_VALUE = 60


@dataclass(frozen=True)
class Fault:
    """A mistake in a config.

    `fields` are the dotted names of every field the judgement rests on, the one to mend first.
    The message reads "FIELD = VALUE PROBLEM; MEND", so `problem` starts with a verb and `mend`
    tells what to do.
    """

    fields: tuple[str, ...]
    value: object
    problem: str
    mend: str

    def __str__(self) -> str:
        shown = "" if self.value is ABSENT else f" = {show(self.value)}"
        return f"{self.fields[0]}{shown} {self.problem}; {self.mend}"


def show(value: object) -> str:
    """`value` as it could stand in YAML on one line, shortened; text is always quoted."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= _LONGEST_VALUE else f"{text[: _LONGEST_VALUE - 3]}..."


def report(source: str, faults: Sequence[Fault]) -> str:
    """The one message for all `faults` of the config that came from `source`."""
    count = "1 fault" if len(faults) == 1 else f"{len(faults)} faults"
    return "\n".join([f"{source} has {count}:", *(f"  - {fault}" for fault in faults)])
