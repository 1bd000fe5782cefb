from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch

from tests.harness import Ranks
from tests.inference.cases import TEXT, open_tiny
from tests.tiny import USED_VOCAB_SIZE
from uoe_parallel.errors import UserError
from uoe_parallel.inference.evaluation import TextScore, evaluate_texts, read_ids


def test_units_are_those_of_the_same_likelihood() -> None:
    values = TextScore(nats=12 * math.log(2), tokens=4, bytes=6, words=3).values
    assert values["loss"] == pytest.approx(3 * math.log(2))
    assert values["perplexity"] == pytest.approx(8)
    assert values["bits_per_byte"] == pytest.approx(2)
    assert values["word_perplexity"] == pytest.approx(16)


def test_perplexity_of_one_endless_word_is_infinite_and_no_error() -> None:
    assert TextScore(nats=1e4, tokens=4000, bytes=4000, words=1).values["word_perplexity"] == (
        math.inf
    )


def test_total_is_of_all_tokens_not_of_all_texts() -> None:
    total = TextScore.total([TextScore(10, 2, 3, 1), TextScore(2, 4, 5, 2)])
    assert total == TextScore(12, 6, 8, 3)


def _by_hand(resets: bool, all_experts: bool) -> tuple[TextScore, float]:
    """A text as one window, and minus the log-likelihood of its bytes one after the other."""
    data = {"train": "unused", "reset_at_documents": resets}
    opened = open_tiny(data=data, model={"sequence_length": 128})
    [scored] = evaluate_texts(opened, {"text": TEXT}, all_experts=all_experts).values()
    ids = torch.from_numpy(opened.tokenizer.encode(TEXT))
    nats = math.log(USED_VOCAB_SIZE) if resets else 0.0
    before = [] if resets else [opened.tokenizer.eod]
    read = torch.cat((torch.tensor(before, dtype=torch.int64), ids[:-1]))
    with torch.no_grad():
        if all_experts:
            with opened.model.all_experts():
                logits = opened.logits(read.unsqueeze(0))[0]
        else:
            logits = opened.logits(read.unsqueeze(0))[0]
    labels = ids[-len(read) :]
    nats -= float(logits.log_softmax(-1).gather(1, labels.unsqueeze(1)).sum())
    return scored, nats


@pytest.mark.parametrize("resets", [False, True])
@pytest.mark.parametrize("all_experts", [False, True])
def test_text_is_scored_as_by_hand(ranks: Ranks, resets: bool, all_experts: bool) -> None:
    [(scored, nats)] = ranks(1).run(_by_hand, resets, all_experts)
    assert scored.nats == pytest.approx(nats, abs=1e-9)
    assert scored.tokens == scored.bytes == len(TEXT.encode()) > len(TEXT)
    assert scored.words == len(TEXT.split()) == 12


def _stride(stride: int) -> tuple[list[int], list[float]]:
    opened = open_tiny()
    reading = read_ids(opened, opened.tokenizer.encode(TEXT), window=16, stride=stride)
    texts = {"a": TEXT, "b": TEXT[::-1]}
    scored = evaluate_texts(opened, texts, window=16, stride=stride, batch_size=3)
    return [w.scored for w in reading.windows], [s.nats for s in scored.values()]


def test_windows_follow_the_stride_and_texts_stay_apart(ranks: Ranks) -> None:
    [(near, near_nats)] = ranks(1).run(_stride, 2)
    [(far, far_nats)] = ranks(1).run(_stride, 16)
    assert sum(near) == sum(far) == len(TEXT.encode())
    assert set(near[1:-1]) == {2} and set(far[:-1]) == {16}
    assert near_nats != far_nats
    assert near_nats[0] != near_nats[1]


def _refuse(texts: dict[str, str], sections: dict[str, Any], sizes: dict[str, int]) -> str:
    try:
        window, stride = sizes.get("window"), sizes.get("stride")
        evaluate_texts(open_tiny(**sections), texts, window=window, stride=stride)
    except UserError as error:
        return str(error)
    return "taken"


@pytest.mark.parametrize(
    ("texts", "sections", "sizes", "told"),
    [
        ({"empty.txt": ""}, {}, {}, "empty.txt has no text"),
        ({"a": "a"}, {}, {"window": 17}, "window 17: .*sequence_length=16"),
        ({"a": "a"}, {}, {"window": 0}, "window 0"),
        ({"a": "a"}, {}, {"window": 8, "stride": 9}, "stride 9: choose 1 to window=8"),
        ({"a": "a"}, {"model": {"task": "masked_token"}}, {}, "model.task=masked_token"),
    ],
)
def test_what_cannot_be_evaluated_is_told(
    ranks: Ranks,
    texts: dict[str, str],
    sections: dict[str, Any],
    sizes: dict[str, int],
    told: str,
) -> None:
    [message] = ranks(1).run(_refuse, texts, sections, sizes)
    assert re.search(told, message), message
