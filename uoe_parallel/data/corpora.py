"""The data of a run: what it trains on and what it is evaluated on."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Literal, get_args

from uoe_parallel.config.schema import BlendPart, Corpora, RunConfig
from uoe_parallel.data.batches import Examples
from uoe_parallel.data.blend import Blend
from uoe_parallel.data.draws import PATTERN
from uoe_parallel.data.examples import open_examples
from uoe_parallel.data.summary import check_made_with
from uoe_parallel.data.token_pair import WHOLE, Share
from uoe_parallel.data.tokenizer import Tokenizer
from uoe_parallel.errors import UserError

Split = Literal["train", "validation", "test"]
EvaluationSplit = Literal["validation", "test"]
_SPLITS: tuple[Split, ...] = get_args(Split)
_EVALUATION_SPLITS: tuple[EvaluationSplit, ...] = get_args(EvaluationSplit)


@dataclass(frozen=True)
class RunData:
    """The examples of a run. Each rank opens and reads them by itself."""

    train: Examples
    evaluation: dict[EvaluationSplit, Examples]
    """Of each split that the config has data for."""
    sources: dict[Split, str]
    """Where each of them is, in words for messages."""


def open_run_data(config: RunConfig, tokenizer: Tokenizer) -> RunData:
    """All that `config.data` names.

    Raises UserError as `open_examples` does, for a corpus that was made with another tokenizer,
    and for one of a weight that is too small.
    """
    opened: dict[Split, Examples] = {}
    sources: dict[Split, str] = {}
    for split, (field, corpora, share) in _given(config).items():
        opened[split] = _open(field, corpora, share, config, tokenizer)
        sources[split] = " or ".join(part.prefix for part in _parts(corpora))
    evaluation: dict[EvaluationSplit, Examples] = {
        split: opened[split] for split in _EVALUATION_SPLITS if split in opened
    }
    return RunData(opened["train"], evaluation, sources)


def _given(config: RunConfig) -> dict[Split, tuple[str, Corpora, Share]]:
    """Of each split that there is data for: the field that names it, the corpora and how much of
    each."""
    data = config.data
    if data.split is not None:
        ends = list(accumulate(data.split))
        edges = [0.0, *(end / ends[-1] for end in ends)]
        shares = zip(_SPLITS, data.split, pairwise(edges), strict=True)
        return {
            split: ("data.train", data.train, Share(*share))
            for split, size, share in shares
            if size
        }
    named = {"train": data.train, "validation": data.validation, "test": data.test}
    return {
        split: (f"data.{split}", corpora, WHOLE)
        for split in _SPLITS
        if (corpora := named[split]) is not None
    }


def _open(
    field: str, corpora: Corpora, share: Share, config: RunConfig, tokenizer: Tokenizer
) -> Examples:
    parts = _parts(corpora)
    for part in parts:
        check_made_with(part.prefix, config.data.tokenizer, tokenizer)
    opened = [open_examples(part.prefix, config, tokenizer, share) for part in parts]
    if isinstance(corpora, str):
        return opened[0]
    blend = Blend(opened, [part.weight for part in parts])
    for number in blend.draws.too_rare:
        part = parts[number]
        raise UserError(
            f"{field}: {part.prefix} has weight {part.weight:g} of {sum(p.weight for p in parts):g}"
            f", and a corpus is drawn from only if that is at least one in {PATTERN}; raise it, or "
            "leave the corpus out"
        )
    return blend


def _parts(corpora: Corpora) -> list[BlendPart]:
    return [BlendPart(prefix=corpora, weight=1.0)] if isinstance(corpora, str) else corpora
