"""The config of a comparable run is the given one but for what would disturb."""

from __future__ import annotations

from typing import Any

import pytest

from tests.tiny import tiny_config
from uoe_parallel.config.checks import RULES
from uoe_parallel.config.schema import Precision
from uoe_parallel.errors import UserError
from uoe_parallel.verification.settings import (
    changes,
    comparable,
    largest_divisor,
    shrunken,
    with_fields,
)


def test_a_comparable_run_keeps_every_step_and_nothing_else() -> None:
    given = tiny_config(
        model={"dropout": 0.1, "attention_dropout": 0.2},
        data={"train": "text", "validation": "text", "test": "text"},
        training={"warmup_steps": 4, "validate_every": 2, "learning_rate": 0.5},
        parallel={"tensor": 2, "pipeline": 2, "zero_stage": 1},
        routes={"replay": "somewhere"},
    )
    derived = comparable(given, steps=3, precision="fp64")
    assert [rule for rule in RULES if list(rule(derived))] == []
    assert changes(given, derived) == [
        "model.dropout 0.1 -> 0.0",
        "model.attention_dropout 0.2 -> 0.0",
        "parallel.tensor 2 -> 1",
        "parallel.pipeline 2 -> 1",
        "parallel.zero_stage 1 -> 0",
        'data.validation "text" -> null',
        'data.test "text" -> null',
        "training.steps 4 -> 3",
        'training.precision "fp32" -> "fp64"',
        "training.warmup_steps 4 -> 3",
        "training.validate_every 2 -> 0",
        "checkpoint.every 0 -> 1",
        "checkpoint.keep 2 -> 3",
        "logging.every 10 -> 1",
        "logging.tensorboard true -> false",
        'routes.replay "somewhere" -> null',
    ]


@pytest.mark.parametrize(
    ("given", "precision", "kept"),
    [("auto", "fp32", "loop"), ("grouped", "fp32", "grouped"), ("grouped", "fp64", "loop")],
)
def test_layouts_multiply_alike(given: str, precision: Precision, kept: str) -> None:
    config = tiny_config(training={"expert_products": given})
    derived = comparable(config, steps=1, precision=precision)
    assert derived.training.expert_products == kept


def test_a_config_that_can_not_run_so_is_refused() -> None:
    given = tiny_config(deepspeed={"bf16": {"enabled": True}}, training={"precision": "bf16"})
    with pytest.raises(UserError, match=r"deepspeed.bf16.enabled = true contradicts false"):
        comparable(given, steps=3, precision="fp32")


LARGE: dict[str, Any] = {
    "model": {"num_layers": 32, "sequence_length": 4096},
    "training": {"global_batch_size": 1536, "micro_batch_size": 12},
    "feed_forward": {"routed_layers": "all"},
    "attention": {"routed_layers": list(range(1, 20, 2))},
}


def test_shrinking_keeps_widths_and_divisors() -> None:
    given = tiny_config(**LARGE)
    small = shrunken(given, ranks=8, stages=4)
    assert changes(given, small) == [
        "model.num_layers 32 -> 4",
        "model.sequence_length 4096 -> 32",
        f"attention.routed_layers {LARGE['attention']['routed_layers']} -> [1, 3]",
        "training.global_batch_size 1536 -> 24",
        "training.micro_batch_size 12 -> 2",
    ]
    # 1536 = 3 x 512: six data ranks could share it, and still can.
    for ranks in range(1, 9):
        assert (1536 % ranks == 0) == (small.training.global_batch_size % ranks == 0)


@pytest.mark.parametrize(
    ("attention", "feed_forward", "stages", "expected"),
    [
        ("all", "none", 1, ("all", "none", 2)),
        ("all", "all", 5, ("all", "all", 5)),
        ([20, 21], "all", 2, ([1], "all", 2)),
        ([20, 21], "all", 3, ([2], "all", 3)),
        ([0, 1, 2], [2, 3], 2, ([0, 1], [1, 2], 4)),
        ([], [31], 1, ([], [1], 2)),
    ],
)
def test_shrinking_keeps_every_kind_of_layer(
    attention: Any, feed_forward: Any, stages: int, expected: tuple[Any, Any, int]
) -> None:
    given = tiny_config(
        model={"num_layers": 32},
        attention={"routed_layers": attention},
        feed_forward={"routed_layers": feed_forward},
    )
    small = shrunken(given, ranks=4, stages=stages)
    found = small.attention.routed_layers, small.feed_forward.routed_layers, small.model.num_layers
    assert found == expected
    assert [rule for rule in RULES if list(rule(small))] == []


@pytest.mark.parametrize(
    ("length", "batch", "ranks", "expected"),
    [
        (16, 4, 8, (16, 4, 2)),  # small already
        (1000, 12, 8, (40, 12, 2)),  # 5 divides the one, 6 the other
        (127, 7, 4, (32, 7, 1)),  # nothing divides
        (4096, 9, 2, (32, 8, 2)),
    ],
)
def test_shrinking_awkward_sizes(
    length: int, batch: int, ranks: int, expected: tuple[int, int, int]
) -> None:
    given = tiny_config(
        model={"sequence_length": length},
        training={"global_batch_size": batch, "micro_batch_size": batch},
    )
    small = shrunken(given, ranks=ranks, stages=1)
    training = small.training
    assert training.global_batch_size % training.micro_batch_size == 0
    found = small.model.sequence_length, training.global_batch_size, training.micro_batch_size
    assert found == expected


def test_small_helpers() -> None:
    assert [largest_divisor(12, at_most=n) for n in (1, 5, 7, 12, 99)] == [1, 4, 6, 12, 12]
    config = tiny_config()
    assert changes(config, with_fields(config, model={"bias": False})) == [
        "model.bias true -> false"
    ]
