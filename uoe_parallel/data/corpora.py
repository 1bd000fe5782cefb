"""The data of a run: what it trains on and what it is evaluated on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from uoe_parallel.config.schema import Corpora, RunConfig
from uoe_parallel.data.batches import Examples
from uoe_parallel.data.examples import open_examples
from uoe_parallel.data.summary import check_made_with
from uoe_parallel.data.tokenizer import Tokenizer

EvaluationSplit = Literal["validation", "test"]
Split = Literal["train"] | EvaluationSplit


@dataclass(frozen=True)
class RunData:
    """The examples of a run. Each rank opens and reads them by itself."""

    train: Examples
    evaluation: dict[EvaluationSplit, Examples]
    """Of each split that the config has data for."""
    sources: dict[Split, str]
    """Where each of them is, in words for messages."""


def open_run_data(config: RunConfig, tokenizer: Tokenizer) -> RunData:
    """All that `config.data` names. Raises UserError as `open_examples` does."""
    data = config.data
    corpora: dict[EvaluationSplit, Corpora | None] = {
        "validation": data.validation,
        "test": data.test,
    }
    evaluation: dict[EvaluationSplit, Examples] = {}
    sources: dict[Split, str] = {"train": _in_words(data.train)}
    for split, named in corpora.items():
        if named is not None:
            evaluation[split] = _open(named, config, tokenizer)
            sources[split] = _in_words(named)
    return RunData(_open(data.train, config, tokenizer), evaluation, sources)


def _open(corpora: Corpora, config: RunConfig, tokenizer: Tokenizer) -> Examples:
    assert isinstance(corpora, str), "blends are not opened yet"
    check_made_with(corpora, config.data.tokenizer, tokenizer)
    return open_examples(corpora, config, tokenizer)


def _in_words(corpora: Corpora) -> str:
    if isinstance(corpora, str):
        return corpora
    return " or ".join(part.prefix for part in corpora)
