"""lm-evaluation-harness with a task of our own, and no network."""

from __future__ import annotations

import json
import math
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from tests.harness import Ranks
from tests.inference.cases import open_tiny
from uoe_parallel.errors import UserError
from uoe_parallel.inference.evaluation import TextScore, evaluate_texts
from uoe_parallel.inference.opening import OpenedModel

QUESTIONS = [
    {"question": "1 and 1", "choices": ["two", "three", "a dozen"], "answer": 0},
    {"question": "three less 2", "choices": ["b", "a"], "answer": 1},
    {"question": "d\u00e9j\u00e0 ", "choices": [" vu", "nothing"], "answer": 0},
]
TEXTS = ["Short text.", "A text that is  longer\nthan the context of a d\u00e9j\u00e0 vu.", "a"]
TASKS: dict[str, dict[str, Any]] = {
    "choices": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_target": "answer",
        "doc_to_choice": "choices",
        "metric_list": [{"metric": "acc"}],
    },
    "perplexity": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "bits_per_byte"}, {"metric": "word_perplexity"}],
    },
    "writing": {
        "output_type": "generate_until",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{choices[0]}}",
        "generation_kwargs": {"until": ["e"], "max_gen_toks": 30},
        "metric_list": [{"metric": "exact_match"}],
    },
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tasks, and the documents that they ask about."""
    folder = tmp_path_factory.mktemp("harness")
    documents = folder / "questions.jsonl"
    lines = [q | {"text": text} for q, text in zip(QUESTIONS, TEXTS, strict=True)]
    documents.write_text("".join(json.dumps(line) + "\n" for line in lines))
    for name, fields in TASKS.items():
        task = {
            "task": name,
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(documents)}},
            "test_split": "test",
            **fields,
        }
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(task))
    return folder


def _evaluate(folder: Path, parallel: dict[str, Any]) -> tuple[Any, Any] | None:
    """The harness's numbers on this rank, and the texts that it was given."""
    os.environ |= {"HF_HOME": str(folder / "home"), "HF_DATASETS_OFFLINE": "1"}
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.tasks import TaskManager

    from uoe_parallel.inference.harness import HarnessModel

    model = HarnessModel(open_tiny(parallel=parallel), batch_size=2)
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    found: Any = simple_evaluate(
        model=model, tasks=list(TASKS), task_manager=manager, bootstrap_iters=0
    )
    if found is None:
        return None
    return found["results"], [sample["resps"][0][0] for sample in found["samples"]["writing"]]


def _nats(opened: OpenedModel, before: list[int], ids: list[int]) -> float:
    """Of ids after others, each with all that the model can see before it."""
    total = 0.0
    for number, token in enumerate(ids):
        seen = torch.tensor([[*before, *ids[:number]]])
        with torch.no_grad():
            total -= float(opened.logits(seen)[0, -1].log_softmax(-1)[token])
    return total


def _by_hand() -> tuple[float, dict[str, float]]:
    """The share of right choices, and what this project's own evaluation says of the texts."""
    opened = open_tiny()
    right = 0
    for question in QUESTIONS:
        context = question["question"].rstrip()
        moved = question["question"].removeprefix(context)
        choices = [f"{moved} {choice}" for choice in question["choices"]]
        losses = [_nats(opened, [*context.encode()], [*choice.encode()]) for choice in choices]
        right += losses.index(min(losses)) == question["answer"]
    texts = evaluate_texts(opened, {text: text for text in TEXTS}, stride=16)
    return right / len(QUESTIONS), TextScore.total(list(texts.values())).values


def test_tasks_are_evaluated_as_by_hand_whatever_the_layout(ranks: Ranks, folder: Path) -> None:
    first, second = ranks(2).run(_evaluate, folder, {"tensor": 2})
    assert first is not None and second is None  # who speaks, and who goes along
    results, texts = first
    [(accuracy, values)] = ranks(1).run(_by_hand)
    assert results["choices"]["acc,none"] == pytest.approx(accuracy)
    for name in ("bits_per_byte", "word_perplexity"):
        assert results["perplexity"][f"{name},none"] == pytest.approx(values[name])
    assert len(texts) == len(QUESTIONS) and all("e" not in text for text in texts)


def _likelihoods(contexts: list[tuple[str, str]], resets: bool) -> list[tuple[float, bool, float]]:
    """Of continuations, and what they are by hand."""
    from lm_eval.api.instance import Instance

    from uoe_parallel.inference.harness import HarnessModel

    opened = open_tiny(data={"train": "unused", "reset_at_documents": resets})
    requests = [
        Instance(request_type="loglikelihood", doc={}, arguments=pair, idx=number)
        for number, pair in enumerate(contexts)
    ]
    found = HarnessModel(opened).loglikelihood(requests, disable_tqdm=True)
    expected = []
    for context, continuation in contexts:
        before, ids = [*context.encode()], [*continuation.encode()]
        nats = 0.0
        if not before and resets:
            nats, before, ids = math.log(opened.model.used_vocab_size), ids[:1], ids[1:]
        expected.append(nats + _nats(opened, before or [opened.tokenizer.eod], ids))
    return [(*answer, nats) for answer, nats in zip(found, expected, strict=True)]


@pytest.mark.parametrize("resets", [False, True])
def test_likelihoods_are_those_of_continuations(ranks: Ranks, resets: bool) -> None:
    pairs = [("a context", " and"), ("b", "c"), ("", "at first"), ("the last", " token")]
    [found] = ranks(1).run(_likelihoods, pairs, resets)
    for likelihood, _, nats in found:
        assert likelihood == pytest.approx(-nats, abs=1e-9)


def _write(options: dict[str, Any], repeats: int) -> list[str] | str:
    from lm_eval.api.instance import Instance

    from uoe_parallel.inference.harness import HarnessModel

    request = Instance(
        request_type="generate_until", doc={}, arguments=("a prompt", options), idx=0
    )
    try:
        return HarnessModel(open_tiny()).generate_until([request] * repeats, disable_tqdm=True)
    except UserError as error:
        return str(error)


def test_drawn_texts_differ_where_a_request_is_repeated(ranks: Ranks) -> None:
    greedy = {"until": [], "max_gen_toks": 8}
    drawn = greedy | {"do_sample": True, "temperature": 1.0}
    assert len(set(ranks(1).run(_write, greedy, 3)[0])) == 1
    assert len(set(ranks(1).run(_write, drawn, 3)[0])) == 3


def test_option_that_is_not_known_is_told(ranks: Ranks) -> None:
    [told] = ranks(1).run(_write, {"until": ["a"], "num_beams": 4}, 1)
    assert isinstance(told, str) and told.startswith("generation_kwargs: num_beams is not known")


def test_without_the_harness_it_is_told_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval.api.instance", None)
    monkeypatch.delitem(sys.modules, "uoe_parallel.inference.harness", raising=False)
    with pytest.raises(UserError, match=r"install uoe-parallel\[evaluation\]"):
        import uoe_parallel.inference.harness  # noqa: F401
