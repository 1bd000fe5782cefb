"""What follows from a comparison's runs."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from tests.comparison.made_up import comparison, diverged, result, three, with_noise
from uoe_parallel.comparison.findings import ACCURACY, LOSS, find


def test_differences_are_paired_by_seed() -> None:
    findings = find(three())
    pair = findings.pair("better", "dense", LOSS)
    assert pair is not None
    assert pair.difference.values == pytest.approx([-0.1, -0.09, -0.11])
    assert pair.difference.is_told_apart
    alike = findings.pair("alike", "dense", LOSS)
    assert alike is not None
    assert not alike.difference.is_told_apart


def test_two_baselines_are_compared_once() -> None:
    made = three()
    config = made.config.model_copy(update={"baselines": ["dense", "alike"]})
    pairs = [(p.contender, p.baseline) for p in find(replace(made, config=config)).pairs]
    assert sorted(pairs) == [("alike", "dense"), ("better", "alike"), ("better", "dense")]


def test_classification_is_judged_by_accuracy_first() -> None:
    findings = find(replace(three(), task="classification"))
    assert findings.measures == [ACCURACY, LOSS]
    pair = findings.pair("better", "dense", ACCURACY)
    assert pair is not None
    assert pair.difference.mean == pytest.approx(0.01)


def test_contenders_are_judged_where_all_have_got() -> None:
    """dense ends at 8000 tokens, where better is halfway, 0.5 log 2 above its end."""
    tokens, flops = find(three()).at_equal
    assert (tokens.at, flops.at) == (8000, 8e9)
    assert tokens.differences["better"].mean == pytest.approx(-0.1 + 0.5 * math.log(2))
    assert flops.differences["better"].mean == pytest.approx(-0.1)
    assert "dense" not in tokens.differences


def test_who_was_not_validated_so_early_is_left_out() -> None:
    late = result("late", with_noise(2.0, 0, 0, 0), steps=80_000)
    [tokens, _] = find(comparison([*three().results, late])).at_equal
    assert set(tokens.losses) == {"dense", "better", "alike"}


def test_flops_to_the_baselines_end() -> None:
    """better gets to 2.0 when 0.1 of its fall of 0.5 for each factor e is left."""
    shares = find(three()).share_to_reach["dense"]
    assert shares["better"] == pytest.approx(math.exp(-0.2))
    assert shares["dense"] == pytest.approx(1)


def test_a_diverged_run_takes_its_contenders_mean_and_nobody_elses() -> None:
    dense, better, alike = three().results
    findings = find(comparison([dense, diverged(better, seed=2), alike]))
    assert findings.held_out["loss"]["better"].not_finite == 1
    pair = findings.pair("better", "dense", LOSS)
    assert pair is not None
    assert pair.difference.mean is None
    flops = findings.at_equal[1]
    assert flops.at == 8e9
    assert flops.losses["better"].not_finite == 1
    assert flops.differences["alike"].mean is not None
    assert findings.share_to_reach["dense"]["dense"] is not None


def test_accuracy_of_a_diverged_run_does_not_count() -> None:
    dense, better, alike = three().results
    lost = [replace(run, loss=math.inf) for run in better.runs]
    made = comparison([dense, replace(better, runs=lost), alike], task="classification")
    assert find(made).held_out["accuracy"]["better"].not_finite == 3


def test_a_diverged_baseline_has_no_end_to_reach() -> None:
    dense, better, alike = three().results
    shares = find(comparison([diverged(dense, seed=1), better, alike])).share_to_reach["dense"]
    assert set(shares.values()) == {None}


def test_families_are_what_is_routed() -> None:
    made = three()
    both = result("two", [2.0, 2.0, 2.0], kinds=["feed_forward", "attention"])
    plain = result("plain", [2.0, 2.0, 2.0])
    findings = find(comparison([*made.results, both, plain]))
    assert [findings.family(name) for name in findings.results] == [
        "baseline",
        "feed-forward only",
        "attention only",
        "both",
        "not routed",
    ]


def test_without_the_baselines_runs_there_is_nothing_to_compare_with() -> None:
    _, better, alike = three().results
    made = comparison([better, alike], others=["dense"])
    findings = find(made)
    assert findings.baselines == findings.pairs == []
    assert findings.missing == ["dense"]
    assert findings.reference.name == "better"
