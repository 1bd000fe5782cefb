"""Expressions of ListOps, with their values: a task in which a class is found by parsing.

ListOps is of Nangia and Bowman, arXiv 1804.06028; the long variant, whose sizes are the defaults
here, of the Long Range Arena (Tay et al., arXiv 2011.04006). An expression is a digit, or one of
four operators with arguments that are expressions, as [MAX 2 9 [MIN 4 7 ] 0 ]. The task is to give
its value, one of ten classes.

Many trees are drawn at once, a level at a time, and whole levels are evaluated and laid out with
numpy: a tree of thousands of nodes costs too much one node at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.random import BitGenerator
from numpy.typing import NDArray

from uoe_parallel.data.draws import random_stream

OPERATORS = {"MIN": "<", "MAX": ">", "MED": "~", "SM": "+"}
"""Each operator's name and the character that stands for it where its bracket opens. The median of
an even number of values is the mean of the middle two, rounded down; SM is the sum modulo 10."""
END = "]"
NUM_CLASSES = 10

_OPERATOR_SYMBOLS = np.frombuffer("".join(OPERATORS.values()).encode(), dtype=np.uint8)
_DRAWN_AT_ONCE = 2**19
"""Nodes of a batch of trees that are to be expected: tens of megabytes."""

Integers = NDArray[np.int64]


@dataclass(frozen=True)
class Recipe:
    """Which expressions there are; the defaults are the Long Range Arena's."""

    min_length: int = 500
    max_length: int = 2000
    """Lengths lie strictly between the two. They count digits, operators and closing brackets."""
    max_depth: int = 10
    """Levels of a tree. The root is at the first, and nodes at the last are digits."""
    max_args: int = 10
    """An operator has two to so many arguments, each number equally often."""

    @property
    def trees_at_once(self) -> int:
        """How many trees are drawn together, so that memory is bounded: of a branching process
        where a node has an operator's arguments once in four times."""
        children = (2 + self.max_args) / 2 / 4
        nodes, width = 1.0, 1.0
        for _ in range(1, self.max_depth):
            width *= children
            nodes += width
            if width < 1e-3 or nodes > _DRAWN_AT_ONCE:
                break
        return max(1, int(_DRAWN_AT_ONCE / min(nodes, self.max_length)))


class Expression(NamedTuple):
    """One example."""

    text: bytes
    """A character for each token: digits, the operators' of OPERATORS, and END."""
    value: int
    """In [0, NUM_CLASSES)."""
    depth: int
    """Levels of its tree: 1 for a lone digit."""


class _Level(NamedTuple):
    """The nodes of one depth of many trees: tree by tree, with brothers side by side in the order
    of their parents."""

    trees: Integers
    """The tree of each node, [nodes]."""
    words: NDArray[np.uint64]
    """A random word for each node, [nodes], of which all but its number of arguments is read."""
    num_args: Integers
    """0 for digits, [nodes]."""

    def of(self, kept: NDArray[np.bool_]) -> _Level:
        """Its nodes of the trees that are `kept`, [trees]."""
        here = kept[self.trees]
        return _Level(self.trees[here], self.words[here], self.num_args[here])


def draw_expressions(recipe: Recipe, seed: int) -> Iterator[list[Expression]]:
    """Endless batches of expressions by `recipe`, of which some are empty and some expressions are
    drawn more than once: what fits among the next `recipe.trees_at_once` trees.

    A node is an operator with probability 1/4, if it isn't at the last level, and any of the
    operators or digits equally often. Trees that are too short or too long are left out. The
    result depends on the arguments alone, not on numpy's version.
    """
    stream = random_stream(seed)
    while True:
        levels, lengths = _draw_trees(stream, recipe)
        fit = (lengths > recipe.min_length) & (lengths < recipe.max_length)
        yield _expressions([level.of(fit) for level in levels])


def apply_operators(operators: Integers, values: Integers, counts: Integers) -> Integers:
    """What operators make of their arguments: [operators].

    operators: numbers in the order of OPERATORS. values: all arguments, [sum of counts], those of
    each operator together. counts: of each operator's arguments, at least one.
    """
    firsts = np.cumsum(counts) - counts
    owners = np.repeat(np.arange(len(counts)), counts)
    ordered = np.sort(owners * NUM_CLASSES + values) % NUM_CLASSES
    middle = ordered[firsts + (counts - 1) // 2] + ordered[firsts + counts // 2]
    sums = np.add.reduceat(values, firsts)
    results = (ordered[firsts], ordered[firsts + counts - 1], middle // 2, sums % NUM_CLASSES)
    return np.choose(operators, results)


def _draw_trees(stream: BitGenerator, recipe: Recipe) -> tuple[list[_Level], Integers]:
    """Trees by level, and their lengths, [trees]. A tree stops growing where it is too long."""
    lengths = np.ones(recipe.trees_at_once, dtype=np.int64)
    trees = np.arange(recipe.trees_at_once)
    levels: list[_Level] = []
    for depth in range(1, recipe.max_depth + 1):
        words = stream.random_raw(len(trees))
        num_args = _numbers_of_arguments(words, recipe.max_args)
        if depth == recipe.max_depth:
            num_args[:] = 0
        # An operator itself is counted already; its arguments and its end are not.
        growth = np.where(num_args > 0, num_args + 1, 0)
        lengths += np.bincount(trees, growth, minlength=len(lengths)).astype(np.int64)
        num_args[lengths[trees] >= recipe.max_length] = 0
        levels.append(_Level(trees, words, num_args))
        trees = np.repeat(trees, num_args)
        if len(trees) == 0:
            break
    return levels, lengths


# A node's random word: its two highest bits say whether it is an operator, the next thirty of how
# many arguments, and the lower half which operator or digit it is. By remainders, which are uneven
# by less than one in ten million.


def _numbers_of_arguments(words: NDArray[np.uint64], max_args: int) -> Integers:
    numbers = (words >> 32) % 2**30 % (max_args - 1) + 2
    return np.where(words >> 62 == 0, numbers, 0).astype(np.int64)


def _operators(words: NDArray[np.uint64]) -> Integers:
    return (words % len(OPERATORS)).astype(np.int64)


def _digits(words: NDArray[np.uint64]) -> Integers:
    return (words % 2**32 % NUM_CLASSES).astype(np.int64)


def _expressions(levels: list[_Level]) -> list[Expression]:
    """The expressions of whole trees, given by level from the roots on."""
    levels = [level for level in levels if len(level.trees) > 0]
    if not levels:
        return []
    values, sizes = _evaluate(levels)
    text = _lay_out(levels, sizes).tobytes()
    roots = levels[0].trees
    depths = np.zeros(roots[-1] + 1, dtype=np.int64)
    for depth, level in enumerate(levels, start=1):
        depths[level.trees] = depth
    ends = np.cumsum(sizes[0])
    bounds = zip((ends - sizes[0]).tolist(), ends.tolist(), strict=True)
    rest = zip(values.tolist(), depths[roots].tolist(), strict=True)
    return [
        Expression(text[start:end], value, depth)
        for (start, end), (value, depth) in zip(bounds, rest, strict=True)
    ]


def _evaluate(levels: list[_Level]) -> tuple[Integers, list[Integers]]:
    """The values of the roots, [trees], and by level the tokens of the tree under each node."""
    values = sizes = np.zeros(0, dtype=np.int64)
    all_sizes: list[Integers] = []
    for level in reversed(levels):
        inner, counts = np.flatnonzero(level.num_args), level.num_args[level.num_args > 0]
        own_values, own_sizes = _digits(level.words), np.ones_like(level.num_args)
        if len(inner) > 0:
            operators = _operators(level.words[inner])
            own_values[inner] = apply_operators(operators, values, counts)
            own_sizes[inner] = 2 + np.add.reduceat(sizes, np.cumsum(counts) - counts)
        values, sizes = own_values, own_sizes
        all_sizes.append(sizes)
    return values, all_sizes[::-1]


def _lay_out(levels: list[_Level], sizes: list[Integers]) -> NDArray[np.uint8]:
    """The characters of all trees, one tree after the other."""
    text = np.empty(sizes[0].sum(), dtype=np.uint8)
    starts = np.cumsum(sizes[0]) - sizes[0]
    for number, level in enumerate(levels):
        inner, counts = np.flatnonzero(level.num_args), level.num_args[level.num_args > 0]
        text[starts] = ord("0") + _digits(level.words)
        text[starts[inner]] = _OPERATOR_SYMBOLS[_operators(level.words[inner])]
        text[starts[inner] + sizes[number][inner] - 1] = ord(END)
        if len(inner) == 0:
            break
        below = np.cumsum(sizes[number + 1]) - sizes[number + 1]
        first_below = below[np.cumsum(counts) - counts]
        starts = np.repeat(starts[inner] + 1 - first_below, counts) + below
    return text
