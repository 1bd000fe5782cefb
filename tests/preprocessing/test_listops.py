"""ListOps: expressions are worth what their labels say, and are drawn as the recipe has it."""

from __future__ import annotations

import itertools
import json
import random
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from statistics import median

import numpy as np
import pytest

from uoe_parallel.data.labelled import LabelledDocuments
from uoe_parallel.preprocessing.listops import (
    OPERATORS,
    Expression,
    Recipe,
    apply_operators,
    draw_expressions,
)
from uoe_parallel.preprocessing.listops_program import main

SMALL = Recipe(min_length=8, max_length=100, max_depth=6, max_args=5)
SIZES = {"train": 3000, "validation": 200, "test": 100}
SMALL_OPTIONS = [
    *("--min-length", "8", "--max-length", "100", "--max-depth", "6", "--max-args", "5"),
    *("--train", "3000", "--validation", "200", "--test", "100", "--seed", "3"),
]
NAMES = {symbol: name for name, symbol in OPERATORS.items()}


def parse(text: str) -> tuple[int, int]:
    """The value of an expression and its depth, by recursive descent."""
    characters = iter(text)
    result = _parse(next(characters), characters)
    assert next(characters, None) is None
    return result


def _parse(first: str, rest: Iterator[str]) -> tuple[int, int]:
    if first not in NAMES:
        return int(first), 1
    inner = [_parse(character, rest) for character in itertools.takewhile("]".__ne__, rest)]
    assert len(inner) > 1
    return compute(NAMES[first], [value for value, _ in inner]), 1 + max(d for _, d in inner)


def compute(operator: str, values: list[int]) -> int:
    match operator:
        case "MIN":
            return min(values)
        case "MAX":
            return max(values)
        case "MED":
            return int(median(values))
        case _:
            return sum(values) % 10


def draw(recipe: Recipe, seed: int, count: int) -> list[Expression]:
    everything = itertools.chain.from_iterable(draw_expressions(recipe, seed))
    return list(itertools.islice(everything, count))


def simulate(recipe: Recipe, rng: random.Random) -> tuple[int, int, int]:
    """Value, length and depth of the next tree that fits, one node at a time."""

    def tree(depth: int) -> tuple[int, int, int]:
        if depth == recipe.max_depth or rng.random() > 0.25:
            return rng.randrange(10), 1, depth
        inner = [tree(depth + 1) for _ in range(rng.randint(2, recipe.max_args))]
        values, lengths, depths = zip(*inner, strict=True)
        value = compute(rng.choice(list(OPERATORS)), list(values))
        return value, 2 + sum(lengths), max(depths)

    while True:
        found = tree(1)
        if recipe.min_length < found[1] < recipe.max_length:
            return found


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("7", 7),
        ("<4729]", 2),
        (">4729]", 9),
        ("~471]", 4),
        ("~4719]", 5),  # the mean of 4 and 7, rounded down
        ("~90]", 4),
        ("+999]", 7),
        (">29<47]0]", 9),
        ("+29<47]0]", 5),
        ("~+55]<9~38]>12]]8]", 2),
    ],
)
def test_the_tests_own_parser(text: str, value: int) -> None:
    assert parse(text)[0] == value


def test_operators_are_applied_to_lists_side_by_side() -> None:
    lists = [[4, 7, 2, 9], [4, 7, 2, 9], [4, 7, 1], [4, 7, 1, 9], [9, 0], [9, 9, 9], [8], [0, 0]]
    operators = np.array([0, 1, 2, 2, 2, 3, 2, 1])
    counts = np.array([len(values) for values in lists])
    found = apply_operators(operators, np.concatenate(lists), counts)
    assert found.tolist() == [2, 9, 4, 5, 4, 7, 8, 0]


@pytest.mark.parametrize(("recipe", "count"), [(SMALL, 3000), (Recipe(), 200)])
def test_expressions_parse_to_their_values_and_keep_the_bounds(recipe: Recipe, count: int) -> None:
    expressions = draw(recipe, 5, count)
    for text, value, depth in expressions:
        assert parse(text.decode()) == (value, depth)
        assert recipe.min_length < len(text) < recipe.max_length
    assert max(expression.depth for expression in expressions) == recipe.max_depth
    digits = b"".join(expression.text for expression in expressions).translate(None, b"<>~+]")
    assert set(digits) == set(b"0123456789")


def test_both_bounds_of_lengths_are_reached() -> None:
    lengths = {len(text) for text, *_ in draw(Recipe(3, 12, 4, 10), 1, 4000)}
    assert lengths == set(range(4, 12))


def test_they_are_distributed_as_in_trees_drawn_node_by_node() -> None:
    count = 10000
    rng = random.Random(7)
    ours = np.array([(v, len(text), d) for text, v, d in draw(SMALL, 11, count)])
    theirs = np.array([simulate(SMALL, rng) for _ in range(count)])
    for column, width in enumerate((1, 10, 1)):  # values, lengths in tens, depths
        shares = [np.bincount(each[:, column] // width, minlength=11) for each in (ours, theirs)]
        deviations = (shares[0] - shares[1]) / np.sqrt(np.maximum(shares[0] + shares[1], 1))
        assert np.abs(deviations).max() < 4.5


def test_operators_and_digits_are_equally_frequent() -> None:
    # Unbiased only where trees of all lengths are taken.
    expressions = draw(Recipe(0, 10**4, 4, 6), 2, 8000)
    counts = np.bincount(
        np.frombuffer(b"".join(expression.text for expression in expressions), dtype=np.uint8)
    )
    for symbols in ("<>~+", "0123456789"):
        of_these = counts[[ord(symbol) for symbol in symbols]]
        assert np.abs(of_these - of_these.mean()).max() < 4.5 * np.sqrt(of_these.mean())
    lone = sum(expression.depth == 1 for expression in expressions)
    assert abs(lone / len(expressions) - 0.75) < 0.025


def test_corpora_of_distinct_expressions(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--output", str(tmp_path / "a"), *SMALL_OPTIONS]) == 0
    told = capsys.readouterr().out
    texts: list[str] = []
    summary = json.loads((tmp_path / "a" / "summary.json").read_text())
    for split, size in SIZES.items():
        documents = LabelledDocuments(tmp_path / "a" / split, 99, 10)
        batch = documents.micro_batch(range(size), [], size)
        of_split = [bytes(row[row > 0].tolist()).decode() for row in batch.tokens]
        assert len(documents) == size
        assert [parse(text)[0] for text in of_split] == batch.labels.flatten().tolist()
        found = summary["splits"][split]
        assert sum(found["classes"]) == sum(found["depths"].values()) == found["examples"] == size
        lengths = sorted(map(len, of_split))
        assert (found["length_deciles"][0], found["length_deciles"][-1]) == (
            lengths[0],
            lengths[-1],
        )
        assert found["tokens"] == sum(lengths)
        assert found["classes"] == np.bincount(batch.labels.flatten(), minlength=10).tolist()
        assert f"{found['most_frequent_class']}: {found['most_frequent_share']:.2%}" in told
        guesses = Counter((text[0], parse(text)[0]) for text in of_split)
        best = {first: max(guesses[first, value] for value in range(10)) for first in NAMES}
        assert found["first_token_share"] == sum(best.values()) / size
        texts += of_split
    assert len(set(texts)) == len(texts) == 3300
    assert summary["recipe"]["max_length"] == 100 and summary["seed"] == 3
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == sorted(
        ["summary.json", *(f"{s}{e}" for s in SIZES for e in (".bin", ".idx", ".labels.npy"))]
    )


def test_a_seed_gives_the_same_bytes_and_another_one_others(tmp_path: Path) -> None:
    for name, seed in (("a", "3"), ("b", "3"), ("c", "4")):
        options = [*SMALL_OPTIONS, "--train", "500", "--seed", seed]
        assert main(["--output", str(tmp_path / name), *options]) == 0
    files = {path.name: path.read_bytes() for path in (tmp_path / "a").iterdir()}
    for path in (tmp_path / "b").iterdir():
        assert path.read_bytes() == files[path.name]
    assert (tmp_path / "c" / "train.bin").read_bytes() != files["train.bin"]


def test_where_expressions_are_few_splits_are_alike(tmp_path: Path) -> None:
    options = "--min-length 3 --max-length 6 --train 2000 --validation 1000 --test 600"
    assert main(["--output", str(tmp_path), *options.split()]) == 0
    splits = json.loads((tmp_path / "summary.json").read_text())["splits"]
    # Of the 400 expressions of four tokens most are found among the first 2000 of all.
    means = [found["mean_length"] for found in splits.values()]
    assert max(means) - min(means) < 0.05


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ("--max-args 1", "--max-args 1 is below 2; use 2 or more"),
        ("--max-depth 0", "--max-depth 0 is below 1"),
        ("--test 0", "--test 0 is below 1"),
        ("--seed -1", "--seed -1 is below 0"),
        ("--max-args 9999999999", "--max-args 9999999999 is above"),
        ("--min-length 50 --max-length 51", "use --max-length 52 or more"),
        ("--max-depth 2", "only 0 of 100,000 expressions with 500 < length < 2000"),
        ("--min-length 3 --max-length 5", "only 400 of 100,000 expressions with 3 < length < 5"),
    ],
)
def test_mistakes_are_told_and_leave_nothing(
    options: str, says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--output", str(tmp_path / "a"), *options.split()]) == 2
    assert says in capsys.readouterr().err
    assert not (tmp_path / "a").exists() or not list((tmp_path / "a").iterdir())


def test_bounds_may_be_out_of_reach() -> None:
    expressions = draw(Recipe(1, 2**30, 2**30, 4), 1, 300)
    assert max(expression.depth for expression in expressions) > 4
    for text, value, depth in expressions:
        assert parse(text.decode()) == (value, depth)


def test_nothing_is_replaced(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "test.labels.npy").touch()
    assert main(["--output", str(tmp_path), *SMALL_OPTIONS]) == 2
    assert "test.labels.npy is there already" in capsys.readouterr().err
    assert len(list(tmp_path.iterdir())) == 1
    blocked = tmp_path / "test.labels.npy" / "inside"
    assert main(["--output", str(blocked), *SMALL_OPTIONS]) == 2
    assert "cannot be written" in capsys.readouterr().err
