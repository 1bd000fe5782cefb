"""What contenders' models are, and what a token costs in them."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.comparison.cases import DENSE, comparison
from uoe_parallel.comparison.contenders import models
from uoe_parallel.comparison.settings import Contender
from uoe_parallel.errors import UserError


def test_a_contender_changes_fields_and_keeps_the_others(tmp_path: Path) -> None:
    contenders = {
        "dense": Contender(change=DENSE),
        "other": Contender(change={"feed_forward": {"gate": "softmax"}}),
    }
    found = models(comparison(tmp_path, contenders=contenders))
    assert found["dense"].config.routed_blocks == {}
    assert found["other"].config.feed_forward.gate == "softmax"
    assert found["other"].config.feed_forward.top_k == 3
    assert found["other"].config.attention.gate == "sigmoid"


def test_a_dense_model_gets_the_width_at_which_a_token_costs_as_much(tmp_path: Path) -> None:
    found = models(comparison(tmp_path))
    assert list(found) == ["dense", "cheap", "routed"]
    dense, cheap, routed = found.values()
    assert routed.flops_per_token < dense.flops_per_token
    # A step of the width is as many columns as there are experts: up, gate and down, both ways.
    step = 2 * 3 * 3 * 2 * 32 * 8
    assert abs(cheap.flops_per_token - routed.flops_per_token) <= step / 2
    assert cheap.config.model.ffn_size % 8 == 0
    assert dense.parameters.total == dense.parameters.active
    assert routed.parameters.active < routed.parameters.total


def test_a_width_that_does_not_exist_is_told(tmp_path: Path) -> None:
    one = {"top_k": 1}
    contenders = {
        "dense": Contender(change=DENSE),
        "narrow": Contender(change={"attention": one, "feed_forward": one}),
        "cheap": Contender(change=DENSE, same_flops_as="narrow"),
    }
    told = r"contenders\.cheap\.same_flops_as = narrow: .*ffn_size; give cheap fewer layers"
    with pytest.raises(UserError, match=told):
        models(comparison(tmp_path, contenders=contenders))


def test_a_config_that_is_wrong_is_told_with_its_contender(tmp_path: Path) -> None:
    contenders = {"dense": Contender(change={"model": {"num_heads": 7}})}
    with pytest.raises(
        UserError, match=r"the run of contender dense has 2 faults:\n  - model\.hidd"
    ):
        models(comparison(tmp_path, contenders=contenders))
