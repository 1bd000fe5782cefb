"""The YAML of a comparison, and what is wrong with it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.programs import CHECKOUT
from uoe_parallel.comparison.contenders import models
from uoe_parallel.comparison.plan import Plan
from uoe_parallel.comparison.settings import load_comparison
from uoe_parallel.errors import UserError
from uoe_parallel.parallel.layout import layout_faults

GIVEN = """
folder: somewhere
learning_rates: [0.01]
baselines: [dense]
run: {}
contenders:
  dense: {}
  other: {same_flops_as: dense}
"""


@pytest.mark.parametrize(
    "path", sorted((CHECKOUT / "configs" / "compare").glob("*.yaml")), ids=lambda path: path.stem
)
def test_comparisons_that_come_along_can_be_planned(path: Path) -> None:
    comparison = load_comparison(path)
    contenders = models(comparison)
    plan = Plan(comparison, contenders)
    ranks = 8 if path.stem.startswith("8x") else 1
    for training in plan.sweep() + plan.compared(dict.fromkeys(contenders, 1e-3)):
        assert training.config.training.steps > training.config.training.warmup_steps
        assert list(layout_faults(training.config, ranks)) == []


def test_overrides_go_into_runs_too(tmp_path: Path) -> None:
    path = tmp_path / "comparison.yaml"
    path.write_text(GIVEN)
    found = load_comparison(path, ["seeds=5", "run.model.num_layers=2", "budget=time"])
    assert (found.seeds, found.budget) == (5, "time")
    assert found.run == {"model": {"num_layers": 2}}


@pytest.mark.parametrize(
    ("names", "kept", "baselines"),
    [
        (["uoe"], ["dense", "uoe"], ["dense"]),
        (["cheap"], ["dense", "uoe", "cheap"], ["dense", "cheap"]),
        (["dense"], ["dense"], ["dense"]),
    ],
)
def test_some_contenders_alone_keep_what_they_need(
    names: list[str], kept: list[str], baselines: list[str], tmp_path: Path
) -> None:
    """The first baseline, which sets the budget, and whom another one's costs are those of."""
    path = tmp_path / "comparison.yaml"
    path.write_text(GIVEN)
    given = load_comparison(
        path,
        [
            "contenders={dense: {}, other: {}, uoe: {}, cheap: {same_flops_as: uoe}}",
            "baselines=[dense, cheap]",
        ],
    )
    found = given.only(names)
    assert (list(found.contenders), found.baselines) == (kept, baselines)
    with pytest.raises(UserError, match="--only none: no such contender"):
        given.only([*names, "none"])


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("baselines=[none]", "baselines: none is none of the contenders"),
        ("contenders.other.same_flops_as=other", "contenders.other.same_flops_as: other is no"),
        ("contenders.other.same_flops_as=third", "contenders.other.same_flops_as: third is no"),
        ("budget=money", "budget: input should be 'flops', 'tokens' or 'time'"),
        ("learning_rates=[]", "learning_rates: list should have at least 1 item"),
        ("contenders.dense.changes={}", "contenders.dense.changes: extra inputs are not"),
        ("seeds", 'has no "="'),
    ],
)
def test_mistakes_are_named(override: str, told: str, tmp_path: Path) -> None:
    path = tmp_path / "comparison.yaml"
    path.write_text(GIVEN)
    with pytest.raises(UserError) as caught:
        load_comparison(path, [override])
    assert str(path) in str(caught.value) and told.lower() in str(caught.value).lower()


def test_a_file_that_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot read the config .*none\.yaml"):
        load_comparison(tmp_path / "none.yaml")
