"""Rules about the data that a run reads."""

from __future__ import annotations

from collections.abc import Iterator

from uoe_parallel.config.faults import Fault
from uoe_parallel.config.schema import RunConfig

_SPLITS = ("train", "validation", "test")


def blends_have_corpora(config: RunConfig) -> Iterator[Fault]:
    for split in _SPLITS:
        if getattr(config.data, split) == []:
            mend = "give at least one {prefix, weight}"
            if split != "train":
                mend += ", or leave it out"
            yield Fault((f"data.{split}",), [], "names no corpus", mend)


def splits_are_of_training_data(config: RunConfig) -> Iterator[Fault]:
    split = config.data.split
    if split is None:
        return
    if split[0] == 0:
        problem = "leaves nothing to train on"
        yield Fault(("data.split",), list(split), problem, "give the first part a size above 0")
    for other in _SPLITS[1:]:
        if getattr(config.data, other) is not None:
            yield Fault(
                ("data.split", f"data.{other}"),
                list(split),
                f"cuts data.train, and data.{other} names other corpora",
                "keep one of them",
            )


def validation_has_data(config: RunConfig) -> Iterator[Fault]:
    every, split = config.training.validate_every, config.data.split
    if not every:
        return
    fields = ("training.validate_every", "data.validation", "data.split")
    if split is not None and split[1] == 0:
        problem = "asks for validation passes, and data.split has no part for them"
        yield Fault(fields, every, problem, "give its second part a size above 0, or use 0")
    elif split is None and config.data.validation is None:
        problem = "asks for validation passes, and data.validation is not given"
        yield Fault(fields, every, problem, "give data.validation or data.split, or use 0")
