"""Masked tokens and classes of documents, from data to metrics, under every kind of layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.harness import Ranks
from tests.model.cases import relative_difference
from tests.programs import call_program, metrics, only_complaint, write_run
from tests.tiny import tiny_config, write_corpus
from tests.training.cases import Outcome, assemble, evaluate, run_engine, run_plainly
from uoe_parallel.data.labelled import labels_path, write_labelled_documents
from uoe_parallel.training.evaluation import Evaluation

MASKED: dict[str, Any] = {"task": "masked_token"}
CLASSES: dict[str, Any] = {"task": "classification", "num_classes": 3}
TASKS = {"masked tokens": MASKED, "classes": CLASSES}
LAYOUTS = [
    ("masked tokens", 2, {"zero_stage": 1}),
    ("masked tokens", 2, {"pipeline": 2, "zero_stage": 0}),
    ("masked tokens", 4, {"tensor": 2, "expert": 4, "zero_stage": 1}),
    ("classes", 2, {"zero_stage": 2}),
    ("classes", 2, {"zero_stage": 3}),
    ("classes", 2, {"pipeline": 2, "zero_stage": 0}),
    ("classes", 4, {"tensor": 2, "pipeline": 2, "zero_stage": 1}),
]


@pytest.fixture(scope="module")
def plain(ranks: Ranks) -> dict[str, tuple[Outcome, Evaluation]]:
    """For each task the steps of plain torch on one rank, and an evaluation there."""
    configs = {task: tiny_config(model=model) for task, model in TASKS.items()}
    return {
        task: (ranks(1).run(run_plainly, config)[0], ranks(1).run(evaluate, config)[0][0])
        for task, config in configs.items()
    }


@pytest.mark.parametrize(("task", "world", "parallel"), LAYOUTS)
def test_steps_and_evaluation_equal_plain_torch_on_one_rank(
    ranks: Ranks,
    plain: dict[str, tuple[Outcome, Evaluation]],
    task: str,
    world: int,
    parallel: dict[str, int],
) -> None:
    steps, expected = plain[task]
    # One sequence each: a micro-batch of masked tokens has none.
    config = tiny_config(model=TASKS[task], parallel=parallel, training={"micro_batch_size": 1})
    outcomes = ranks(world).run(run_engine, config)
    for outcome in outcomes:
        assert outcome.losses == pytest.approx(steps.losses, rel=2e-5)
        assert outcome.gradient_norms == pytest.approx(steps.gradient_norms, rel=2e-5)
    worst, name = relative_difference(assemble(outcomes), assemble([steps]), eps=1e-3)
    assert worst < 2e-4, name
    for evaluation, _ in ranks(world).run(evaluate, config):
        assert evaluation.loss == pytest.approx(expected.loss, rel=1e-6)
        assert evaluation.accuracy == expected.accuracy


def test_a_run_of_masked_tokens_resumes_under_another_layout(ranks: Ranks, tmp_path: Path) -> None:
    path = write_run(
        tmp_path,
        model=MASKED,
        data={"reset_at_documents": True},
        # A rate that does not depend on the number of steps.
        training={"micro_batch_size": 1, "min_learning_rate": 0.01},
    )
    _spread_documents(tmp_path)

    def run(world: int, folder: str, *overrides: str) -> str:
        arguments = ("--config", path, f"run_dir={tmp_path / folder}", *overrides)
        outcomes = ranks(world).run(call_program, *arguments)
        assert [outcome.code for outcome in outcomes] == [0] * world, outcomes
        return outcomes[0].out

    straight = run(1, "straight", "training.steps=4")
    run(2, "resumed", "training.steps=2")
    run(2, "resumed", "training.steps=4", "parallel.tensor=2", "training.micro_batch_size=2")
    whole, resumed = (
        [record["loss"] for record in metrics(tmp_path / folder)]
        for folder in ("straight", "resumed")
    )
    assert len(whole) == 4 and resumed == pytest.approx(whole, rel=1e-4)
    [record] = metrics(tmp_path / "straight", "test")
    assert 0 <= record["accuracy"] <= 1 and "bits_per_byte" not in record
    assert all("bits_per_byte" not in record for record in metrics(tmp_path / "straight"))
    assert "Sampled" not in straight and "bits/byte" not in straight
    result = f"{record['loss']:.4f} nats/masked token, accuracy {record['accuracy']:.2%}"
    assert f"test: loss {result} after step 4" in straight
    assert result in straight.split("Finished")[1]


def test_a_step_with_nothing_to_predict_is_no_fault(ranks: Ranks, tmp_path: Path) -> None:
    path = write_run(tmp_path, model=MASKED, data={"mask_probability": 1e-12})
    for outcome in ranks(2).run(call_program, "--config", path, "training.steps=1"):
        assert (outcome.code, outcome.err) == (0, "")
    assert [record["loss"] for record in metrics(tmp_path / "run")] == [0.0]
    assert [record["loss"] for record in metrics(tmp_path / "run", "test")] == [None]


def test_a_run_of_separate_documents_samples_text(ranks: Ranks, tmp_path: Path) -> None:
    path = write_run(tmp_path, data={"reset_at_documents": True}, parallel={"pipeline": 2})
    _spread_documents(tmp_path)
    first, _ = ranks(2).run(call_program, "--config", path, "training.steps=1")
    assert (first.code, first.err) == (0, "")
    assert "Sampled from the model:\nThe " in first.out


def test_training_learns_to_tell_which_byte_is_more_frequent(ranks: Ranks, tmp_path: Path) -> None:
    path = _write_classes(tmp_path)
    [first] = ranks(1).run(call_program, "--config", path, "training.validate_every=30")
    assert (first.code, first.err) == (0, "")
    before, *_, after = metrics(tmp_path / "run", "validation")
    assert before["step"] == 0 and before["accuracy"] < 0.8
    assert after["accuracy"] >= 0.95 and after["loss"] < 0.2, after
    [record] = metrics(tmp_path / "run", "test")
    result = f"{record['loss']:.4f} nats/document, accuracy {record['accuracy']:.2%}"
    assert result in first.out.split("Finished")[1]
    assert "Sampled" not in first.out and "bits_per_byte" not in record


def test_a_classifier_without_labels_is_told_so(ranks: Ranks, tmp_path: Path) -> None:
    path = _write_classes(tmp_path)
    labels_path(tmp_path / "validation").unlink()
    message = only_complaint(ranks(2).run(call_program, "--config", path))
    assert str(tmp_path / "validation.labels.npy") in message and "no such file" in message
    assert not (tmp_path / "run").exists()


def test_a_resumed_run_keeps_its_labels(ranks: Ranks, tmp_path: Path) -> None:
    path = _write_classes(tmp_path)
    [first] = ranks(1).run(call_program, "--config", path, "training.steps=1")
    assert first.code == 0, first
    labels = labels_path(tmp_path / "train")
    np.save(labels, 1 - np.load(labels))
    message = only_complaint(ranks(1).run(call_program, "--config", path, "training.steps=2"))
    assert "checksums" in message and "run_dir" in message


@pytest.mark.parametrize("field", ["data.reset_at_documents=true", "data.mask_probability=0.3"])
def test_a_resumed_run_keeps_what_it_predicts(ranks: Ranks, tmp_path: Path, field: str) -> None:
    path = write_run(tmp_path, model=MASKED)
    [first] = ranks(1).run(call_program, "--config", path, "training.steps=1")
    assert first.code == 0, first
    message = only_complaint(ranks(1).run(call_program, "--config", path, field))
    assert field.split("=")[0] in message


def test_text_with_the_masks_own_id_is_refused(ranks: Ranks, tmp_path: Path) -> None:
    path = write_run(tmp_path, model=MASKED)
    write_corpus(tmp_path / "train", 2000, vocab_size=258)
    message = only_complaint(ranks(1).run(call_program, "--config", path, "seed=1"))
    assert str(tmp_path / "train") in message and "token id 257" in message


def _spread_documents(folder: Path) -> None:
    """Ends of documents all over the corpora."""
    for split in ("train", "validation", "test"):
        tokens = np.memmap(folder / f"{split}.bin", dtype=np.uint16, mode="r+")
        tokens[::7] = 256
        tokens.flush()


def _write_classes(folder: Path) -> Path:
    """A run on documents of two bytes, whose class is the more frequent one."""
    path = write_run(
        folder,
        model={"task": "classification", "num_classes": 2},
        training={"steps": 60, "global_batch_size": 16, "micro_batch_size": 8},
        logging={"every": 10, "tensorboard": False},
    )
    random = np.random.default_rng(1)
    for split, count in (("train", 400), ("validation", 64), ("test", 64)):
        lengths = 2 * random.integers(2, 8, count) + 1
        shares = random.choice([0.2, 0.8], count)
        documents = [65 + random.binomial(1, p, n) for p, n in zip(shares, lengths, strict=True)]
        labels = [int(ids.mean() > 65.5) for ids in documents]
        write_labelled_documents(folder / split, documents, labels)
    return path
