"""Sizes and ranks of a layout, and what keeps a config from running on a number of ranks."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from uoe_parallel.config.schema import ParallelConfig, RunConfig
from uoe_parallel.parallel.layout import (
    ParallelLayout,
    candidate_layouts,
    layout_faults,
    nearest_layout,
)

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


def test_world_size_that_tensor_does_not_divide() -> None:
    fault, nearest = layout_faults(_config(), 1)
    assert str(fault) == (
        "parallel.tensor = 2 does not divide the world size of 1 ranks; "
        "start a multiple of 2 ranks or set parallel.tensor to a divisor of 1"
    )
    assert str(nearest) == (
        "parallel is not a layout that 1 ranks can run; the nearest that is: parallel.tensor=1"
    )


def test_batch_that_data_ranks_do_not_divide() -> None:
    fault, _ = layout_faults(_config(), 16)
    assert str(fault) == (
        "training.global_batch_size = 12 is not a multiple of "
        "micro_batch_size x data-parallel size = 3 x 8; use a multiple of 24"
    )
    mended = _config(training__global_batch_size=24)
    assert list(layout_faults(mended, 16)) == []


@pytest.mark.parametrize(
    ("parallel", "world_size", "problem", "nearest"),
    [
        ({"pipeline": 3}, 4, "parallel.pipeline = 3 times parallel.tensor = 2", "pipeline=2"),
        ({"expert": 4}, 2, "parallel.expert = 4 does not divide the 2 ranks", "expert=null"),
        ({"pipeline": 2, "zero_stage": 3}, 4, None, "zero_stage=1"),
        ({"pipeline": 2, "zero_stage": 2, "expert": 4}, 8, None, "zero_stage=1"),
        ({"expert": 4, "zero_stage": 3}, 4, None, "zero_stage=2"),
        ({"expert": 4, "sequence_parallel": False}, 4, None, "sequence_parallel=true"),
    ],
)
def test_the_nearest_layout_that_works_is_named(
    parallel: dict[str, Any], world_size: int, problem: str | None, nearest: str
) -> None:
    config = _config(**{f"parallel__{name}": value for name, value in parallel.items()})
    faults = [str(fault) for fault in layout_faults(config, world_size)]
    assert faults[-1] == (
        f"parallel is not a layout that {world_size} ranks can run; "
        f"the nearest that is: parallel.{nearest}"
    )
    # Where the config alone is at fault, its own rules tell the reason.
    assert [fault.startswith(problem or "") for fault in faults[:-1]] == [True] * bool(problem)


def test_no_layout_is_named_where_there_is_none() -> None:
    config = _config(training__global_batch_size=7, training__micro_batch_size=7)
    config = config.model_copy(update={"model": config.model.model_copy(update={"num_heads": 1})})
    assert nearest_layout(config, 64) is None


@given(st.sampled_from([1, 2, 4, 6, 8, 12]))
def test_candidates_are_all_different_and_fill_the_world(world_size: int) -> None:
    layouts = [ParallelLayout.from_config(p, world_size) for p in candidate_layouts(world_size)]
    names = [str(layout) for layout in layouts]
    assert len(set(names)) == len(names)
    for layout in layouts:
        assert layout.tensor * layout.data * layout.pipeline == world_size
        assert layout.expert * layout.expert_data * layout.pipeline == world_size


def test_names_tell_every_axis() -> None:
    layout = ParallelLayout(16, 2, 2, 4, sequence_parallel=True, zero_stage=1)
    assert str(layout) == "tp2-sp-pp2-dp4-ep4-zero1"
    assert str(ParallelLayout(1, 1, 1, 1, sequence_parallel=False, zero_stage=0)) == "one-zero0"


def test_two_independent_axes_and_the_stage_name_a_rank() -> None:
    layout = ParallelLayout(48, 2, 3, 4, sequence_parallel=True, zero_stage=1)
    places = [layout.coordinates(rank) for rank in range(48)]
    assert len({(c.tensor, c.data, c.pipe) for c in places}) == 48
    assert len({(c.expert, c.expert_data, c.pipe) for c in places}) == 48


def test_a_fault_of_the_batch_alone_is_not_told_twice() -> None:
    """The config's own checks say that 3 does not divide 13, whatever the ranks."""
    assert list(layout_faults(_config(training__global_batch_size=13), 2)) == []
