"""ListOps as labelled corpora: distinct expressions, spread at random over the splits."""

from __future__ import annotations

import tempfile
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from uoe_parallel.config.json_text import write_json
from uoe_parallel.data.draws import random_stream
from uoe_parallel.data.labelled import LabelledWriter
from uoe_parallel.errors import UserError
from uoe_parallel.preprocessing.listops import (
    END,
    NUM_CLASSES,
    OPERATORS,
    Expression,
    Recipe,
    draw_expressions,
)

SUMMARY = "summary.json"
_PATIENCE = 2**20
"""Trees in a row without a new expression that fits, after which there are taken to be none."""
_SPLIT_ORDER = 1
"""Place of the random stream that says which split an expression goes to."""


@dataclass
class Statistics:
    """How many expressions of a split have each class, depth and length."""

    classes: Counter[int] = field(default_factory=Counter)
    depths: Counter[int] = field(default_factory=Counter)
    lengths: Counter[int] = field(default_factory=Counter)
    _classes_of: defaultdict[int, Counter[int]] = field(
        default_factory=lambda: defaultdict(Counter)
    )
    """Those of the expressions with the same first token, the outermost operator."""

    def note(self, expression: Expression) -> None:
        self.classes[expression.value] += 1
        self.depths[expression.depth] += 1
        self.lengths[len(expression.text)] += 1
        self._classes_of[expression.text[0]][expression.value] += 1

    @property
    def examples(self) -> int:
        return self.classes.total()

    @property
    def tokens(self) -> int:
        return sum(length * count for length, count in self.lengths.items())

    @property
    def most_frequent(self) -> tuple[int, float]:
        """The class that whoever knows nothing should guess, and how often that is right."""
        [(value, count)] = self.classes.most_common(1)
        return value, count / self.examples

    @property
    def first_token_share(self) -> float:
        """How often that guess is right which is best for an expression's first token."""
        return sum(max(found.values()) for found in self._classes_of.values()) / self.examples

    def length_at(self, share: float) -> int:
        """The length that this share of the expressions does not exceed; that of the shortest one
        for 0."""
        lengths, counts = zip(*sorted(self.lengths.items()), strict=True)
        return lengths[int(np.searchsorted(np.cumsum(counts), share * self.examples))]

    def as_json(self) -> dict[str, Any]:
        most_frequent, share = self.most_frequent
        return {
            "examples": self.examples,
            "tokens": self.tokens,
            "classes": [self.classes[value] for value in range(NUM_CLASSES)],
            "most_frequent_class": most_frequent,
            "most_frequent_share": share,
            "first_token_share": self.first_token_share,
            "depths": {str(depth): self.depths[depth] for depth in sorted(self.depths)},
            "length_deciles": [self.length_at(tenth / 10) for tenth in range(11)],
            "mean_length": self.tokens / self.examples,
        }


@dataclass
class Drawn:
    """What it took to find the expressions."""

    trees: int = 0
    repeated: int = 0
    """Trees that would have fitted, had they not been drawn before."""
    _known: set[bytes] = field(default_factory=set, repr=False)
    """Digests, of which two are alike by chance once in 10^28 pairs."""

    def distinct(self, recipe: Recipe, seed: int, count: int) -> Iterator[Expression]:
        """`count` expressions, each another; raises UserError if there are not that many."""
        found, found_at = 0, 0
        for expressions in draw_expressions(recipe, seed):
            self.trees += recipe.trees_at_once
            for expression in expressions:
                digest = blake2b(expression.text, digest_size=12).digest()
                if digest in self._known:
                    self.repeated += 1
                    continue
                self._known.add(digest)
                yield expression
                found, found_at = found + 1, self.trees
                if found == count:
                    return
            if self.trees - found_at > _PATIENCE:
                raise UserError(
                    f"only {found:,} of {count:,} expressions with {recipe.min_length} < length < "
                    f"{recipe.max_length} were found, and none that is new among the last "
                    f"{_PATIENCE:,} drawn; ask for fewer (--train, --validation, --test), let "
                    "lengths differ more (--min-length, --max-length) or allow larger trees "
                    f"(--max-depth {recipe.max_depth}, --max-args {recipe.max_args})"
                )


def make_corpora(
    folder: Path,
    recipe: Recipe,
    examples: Mapping[str, int],
    seed: int,
    advance: Callable[[], None] = lambda: None,
) -> tuple[dict[str, Statistics], Drawn]:
    """Write a labelled pair folder/SPLIT for each split, of `examples`[split] expressions, and
    SUMMARY. No expression is in two splits, or twice in one.

    advance: called for each expression. Memory grows by about 100 bytes for each. Raises UserError
    if the folder has some of these files already, can't be written, or there are too few
    expressions; then no file is left.
    """
    _refuse_existing(folder, examples)
    order = _split_order(list(examples.values()), seed)
    statistics, drawn = [Statistics() for _ in examples], Drawn()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".listops.", dir=folder) as partial:
            writers = [LabelledWriter(Path(partial, split)) for split in examples]
            expressions = drawn.distinct(recipe, seed, len(order))
            for expression, split in zip(expressions, order, strict=True):
                ids = np.frombuffer(expression.text, dtype=np.uint8).astype(np.int32)
                writers[split].add(ids, expression.value)
                statistics[split].note(expression)
                advance()
            for writer in writers:
                writer.finish()
            for path in Path(partial).iterdir():
                path.rename(folder / path.name)
    except OSError as error:
        raise UserError(f"--output {folder}: cannot be written: {error.strerror}") from error
    by_split = dict(zip(examples, statistics, strict=True))
    write_json(folder / SUMMARY, _summary(recipe, seed, by_split, drawn), option="--output")
    return by_split, drawn


def _refuse_existing(folder: Path, splits: Mapping[str, int]) -> None:
    """Raises UserError if there is a file in `folder` that would be replaced."""
    names = [f"{split}{end}" for split in splits for end in (".bin", ".idx", ".labels.npy")]
    for name in (SUMMARY, *names):
        if (folder / name).exists():
            raise UserError(
                f"--output {folder}: {name} is there already, and runs may be using it; name "
                "another folder or remove it"
            )


def _split_order(examples: list[int], seed: int) -> NDArray[np.int8]:
    """The split of each expression in the order in which they are found.

    At random: where there are few expressions, the frequent ones are found first.
    """
    splits = np.repeat(np.arange(len(examples), dtype=np.int8), examples)
    words = random_stream(seed, _SPLIT_ORDER).random_raw(len(splits))
    return splits[np.argsort(words, kind="stable")]


def _summary(
    recipe: Recipe, seed: int, statistics: Mapping[str, Statistics], drawn: Drawn
) -> dict[str, Any]:
    return {
        "task": "ListOps",
        "recipe": asdict(recipe),
        "seed": seed,
        "num_classes": NUM_CLASSES,
        "tokens": {"operators": OPERATORS, "end": END, "digits": "0123456789"},
        "trees_drawn": drawn.trees,
        "repeated": drawn.repeated,
        "splits": {split: found.as_json() for split, found in statistics.items()},
    }
