"""Sizes and ranks of a layout, and what keeps a config from running on a number of ranks."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from uoe_parallel.config.schema import ParallelConfig, RunConfig
from uoe_parallel.parallel.layout import ParallelLayout, layout_faults

sizes = st.integers(1, 12)


def _layout(world_size: int, tensor: int, *, sequence_parallel: bool = True) -> ParallelLayout:
    config = ParallelConfig(tensor=tensor, sequence_parallel=sequence_parallel, zero_stage=2)
    return ParallelLayout.from_config(config, world_size)


def _config(**changes: object) -> RunConfig:
    """A config of 2 tensor ranks and batches of 3 x 4 sequences with `section__field` changed."""
    tree: dict[str, dict[str, Any]] = {
        "model": dict.fromkeys(
            ("num_layers", "hidden_size", "ffn_size", "num_heads", "sequence_length"), 8
        ),
        "data": {"train": "train"},
        "training": {
            "steps": 1,
            "global_batch_size": 12,
            "micro_batch_size": 3,
            "learning_rate": 0.01,
        },
        "parallel": {"tensor": 2},
    }
    for name, value in changes.items():
        section, field = name.split("__")
        tree[section][field] = value
    return RunConfig.model_validate({"run_dir": "runs", **tree})


@given(sizes, sizes)
def test_every_rank_has_one_place(tensor: int, data: int) -> None:
    layout = _layout(tensor * data, tensor)
    assert (layout.tensor, layout.data, layout.zero_stage) == (tensor, data, 2)
    places = [(c.data, c.tensor) for c in map(layout.coordinates, range(tensor * data))]
    # Tensor ranks are neighbours: rank = data rank x tensor + tensor rank.
    assert places == [(d, t) for d in range(data) for t in range(tensor)]


@pytest.mark.parametrize(
    ("tensor", "asked", "got"), [(1, True, False), (2, True, True), (2, False, False)]
)
def test_sequence_parallelism_needs_a_tensor_group(tensor: int, asked: bool, got: bool) -> None:
    assert _layout(4, tensor, sequence_parallel=asked).sequence_parallel is got


@pytest.mark.parametrize("world_size", [2, 4, 8])
def test_no_fault_where_everything_divides(world_size: int) -> None:
    assert list(layout_faults(_config(), world_size)) == []


@pytest.mark.parametrize("world_size", [1, 3, 5])
def test_world_size_that_tensor_does_not_divide(world_size: int) -> None:
    [fault] = layout_faults(_config(), world_size)
    assert str(fault) == (
        f"parallel.tensor = 2 does not divide the world size of {world_size} ranks; "
        f"start a multiple of 2 ranks or set parallel.tensor to a divisor of {world_size}"
    )


def test_batch_that_data_ranks_do_not_divide() -> None:
    [fault] = layout_faults(_config(), 6)
    assert str(fault) == (
        "training.global_batch_size = 12 is not a multiple of "
        "micro_batch_size x data-parallel size = 3 x 3; use a multiple of 9"
    )
    assert set(fault.fields) == {
        "training.global_batch_size",
        "training.micro_batch_size",
        "parallel.tensor",
    }
    mended = _config(training__global_batch_size=18)
    assert list(layout_faults(mended, 6)) == []


def test_a_fault_of_the_batch_alone_is_not_told_twice() -> None:
    """The config's own checks say that 3 does not divide 13, whatever the ranks."""
    assert list(layout_faults(_config(training__global_batch_size=13), 2)) == []
