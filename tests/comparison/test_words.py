"""What is said of a comparison, and of what it leaves open."""

from __future__ import annotations

from dataclasses import replace

from tests.comparison.made_up import comparison, diverged, result, three, with_noise
from uoe_parallel.comparison.findings import find
from uoe_parallel.comparison.results import Comparison
from uoe_parallel.comparison.words import words


def cautions(made: Comparison) -> str:
    return "\n".join(words(find(made)).cautions)


def test_who_is_better_and_who_is_not_told_apart() -> None:
    told = words(find(three()))
    assert told.short == ["Beside dense, better: better; not told apart: alike."]
    better, alike = told.details
    assert better.startswith("better: loss lower than dense's by 0.1000 nats (5.0 %; 0.0752 to ")
    assert alike.startswith("alike: loss not told apart from dense's: +0.0100 nats (-0.0557 to ")
    assert "as many floating-point operations as dense" in told.terms
    assert "with 3 seeds" in told.terms


def test_words_follow_the_numbers_wherever_they_fall() -> None:
    worse = result("worse", with_noise(2.1, 0, 0.01, -0.01))
    told = words(find(comparison([three().results[0], worse])))
    assert told.short == ["Beside dense, worse: worse."]
    assert told.details[0].startswith("worse: loss higher than dense's by 0.1000 nats")
    same = words(find(comparison([three().results[0], replace(three().results[0], name="twin")])))
    assert same.details == ["twin: loss the same as dense's with every seed."]
    assert same.short == ["Beside dense, not told apart: twin."]


def test_higher_accuracy_is_better() -> None:
    told = words(find(replace(three(), task="classification")))
    assert told.short[0].startswith("Beside dense, better: better;")
    assert told.details[0].startswith(
        "better: accuracy higher than dense's by 1.00 points (0.75 to 1.25). loss lower than "
    )


def test_one_seed_proves_nothing() -> None:
    told = words(find(comparison([result("dense", [2.0]), result("better", [1.9])])))
    assert told.short == ["Beside dense, compared by one run only: better."]
    assert told.details == [
        "better: loss lower than dense's by 0.1000 nats (5.0 %; may be chance)."
    ]
    assert told.cautions[0].startswith("One seed: ")
    assert not any("intervals" in caution for caution in told.cautions)


def test_diverged_runs_are_named() -> None:
    dense, better, alike = three().results
    told = words(find(comparison([dense, diverged(better, seed=2), alike])))
    assert told.short == ["Beside dense, not told apart: alike; not compared: better."]
    assert told.details[0] == "better: not compared, as it has no finite loss in 1 of 3 runs."
    assert told.cautions[0].startswith("better has no finite loss in 1 of 3 runs.")
    told = words(find(comparison([diverged(dense, seed=1), better])))
    assert told.details == [
        "better: loss not compared with dense's, which is not finite in every run."
    ]


def test_chance_is_counted() -> None:
    """Two held-out intervals, and two at equal tokens and two at equal FLOPs."""
    said = cautions(three())
    assert "With 3 seeds an interval has 2 degrees of freedom." in said
    assert "There are 6 intervals of 95 %: about 0.3 of them" in said
    assert "better beside dense is still told apart" in said


def test_learning_rates_at_an_end_are_named() -> None:
    dense, better, alike = three().results
    made = comparison(
        [dense, replace(better, learning_rate=4e-3), replace(alike, learning_rate=1e-3)]
    )
    said = cautions(made)
    assert "The best learning rate of better is the highest of those tried" in said
    assert "The best learning rate of alike is the lowest of those tried" in said
    assert "those tried" not in cautions(three())
    assert "none of the contenders was tuned" in cautions(
        comparison(made.results, fields={"learning_rates": [1e-3]})
    )


def test_tries_without_a_finite_loss_are_named() -> None:
    dense, better, _ = three().results
    lost = replace(better, sweep={**better.sweep, 4e-3: float("inf")})
    assert "no finite loss: better at 0.004." in cautions(comparison([dense, lost]))


def test_what_the_budget_leaves_unequal() -> None:
    assert "differ in tokens: from 8 k of alike to 16 k of better" in cautions(three())
    assert "differ in FLOPs" not in cautions(three())
    by_tokens = comparison(three().results, fields={"budget": "tokens"})
    assert "differ in tokens" not in cautions(by_tokens)


def test_short_runs_say_nothing_of_long_ones() -> None:
    assert "Runs saw 0.008 to 0.016 tokens for each parameter" in cautions(three())
    small = [replace(found, parameters=100) for found in three().results]
    assert "for each parameter" not in cautions(comparison(small))


def test_runs_that_shared_the_machine_and_missing_ones() -> None:
    made = comparison(three().results, others=["later"], jobs=2, fields={"budget": "time"})
    said = cautions(made)
    assert "2 runs at once shared the machine, so times are rough, and so is this budget." in said
    assert "Left out, as not all of their runs are over: later." in said
    assert "shared the machine" not in cautions(three())
