from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.harness import Ranks
from tests.inference.cases import open_tiny
from tests.model.rules import CAUSAL_RULES
from uoe_parallel.errors import UserError
from uoe_parallel.inference.generation import Continuation, generate
from uoe_parallel.inference.sampling import Sampling
from uoe_parallel.inference.terminal import harmless

PROMPTS = ["def ", "A d\u00e9j\u00e0 vu that is longer than the context", "x"]
LAYOUTS: dict[str, dict[str, Any]] = {
    "tensor": {"parallel": {"tensor": 2}},
    "pipeline": {"parallel": {"pipeline": 2}},
    "wide experts": {"parallel": {"expert": 2}},
}
RULE = CAUSAL_RULES["patches with capacity"]


def _generate(sections: dict[str, Any], batch_size: int, tokens: int = 40) -> list[Continuation]:
    opened = open_tiny(feed_forward=RULE, attention=RULE, **sections)
    seeds = list(range(len(PROMPTS)))
    sampling = Sampling(tokens, temperature=0.8, top_p=0.95)
    return generate(opened, PROMPTS, sampling=sampling, seeds=seeds, batch_size=batch_size)


@pytest.mark.parametrize(
    "layout",
    ["pipeline", "wide experts", pytest.param("tensor", marks=pytest.mark.slow)],
)
def test_no_layout_shows(ranks: Ranks, layout: str) -> None:
    [expected] = ranks(1).run(_generate, {}, 3)
    assert len({text.text for text in expected}) == len(PROMPTS)
    for texts in ranks(2).run(_generate, LAYOUTS[layout], 3):
        assert texts == expected


def test_no_batch_shows(ranks: Ranks) -> None:
    [expected] = ranks(1).run(_generate, {}, 3)
    assert ranks(1).run(_generate, {}, 2) == [expected]


def _greedy(resets: bool) -> tuple[str, str]:
    """A text, and what the likeliest ids of whole passes over it come to."""
    data = {"train": "unused", "reset_at_documents": resets}
    opened = open_tiny(data=data, model={"sequence_length": 64})
    sampling = Sampling(num_tokens=12, temperature=0)
    [text] = generate(opened, ["def "], sampling=sampling, seeds=[0])
    ids = [*([] if resets else [opened.tokenizer.eod]), *b"def "]
    first = len(ids)
    with opened.model.replicated_tokens():
        while (len(ids) < first + 12 and ids[-1] != opened.tokenizer.eod) or len(ids) == first:
            ids.append(int(opened.logits(torch.tensor([ids]))[0, -1].argmax()))
    return text.text, opened.tokenizer.decode(ids[first:])


@pytest.mark.parametrize("resets", [False, True])
def test_text_follows_from_the_end_of_a_document_and_the_prompt(ranks: Ranks, resets: bool) -> None:
    [(text, expected)] = ranks(1).run(_greedy, resets)
    assert text == expected


def _stream() -> tuple[list[tuple[int, str]], list[Continuation]]:
    opened = open_tiny()
    heard: list[tuple[int, str]] = []
    texts = generate(
        opened,
        ["a"] * 6,
        sampling=Sampling(150),
        seeds=list(range(6)),
        batch_size=1,
        hear=lambda number, piece: heard.append((number, piece)),
    )
    return heard, texts


def test_pieces_come_one_text_after_the_other_and_are_the_texts(ranks: Ranks) -> None:
    [(heard, texts)] = ranks(1).run(_stream)
    numbers = [number for number, _ in heard]
    assert numbers == sorted(numbers)
    for number, text in enumerate(texts):
        assert "".join(piece for n, piece in heard if n == number) == text.text
    assert {text.ended for text in texts} == {False, True}
    assert all(text.ended or text.tokens == 150 for text in texts)
    assert len({text.text for text in texts}) == 6  # of one prompt, with a seed each


def _refuse(prompt: str, sections: dict[str, Any]) -> str:
    try:
        generate(open_tiny(**sections), [prompt], sampling=Sampling(1), seeds=[0])
    except UserError as error:
        return str(error)
    return "taken"


def test_what_cannot_be_continued_is_told(ranks: Ranks) -> None:
    apart = {"data": {"train": "unused", "reset_at_documents": True}}
    masked = {"model": {"task": "masked_token"}}
    assert ranks(1).run(_refuse, "", {}) == ["taken"]
    assert "a prompt is empty" in ranks(1).run(_refuse, "", apart)[0]
    assert "model.task=masked_token" in ranks(1).run(_refuse, "a", masked)[0]


def test_terminal_obeys_nothing() -> None:
    text = harmless("a\x1b[31mb\r\x07\x9b\u202ec\n\td\u00e9")
    assert text == "a\ufffd[31mb\ufffd\ufffd\ufffd\ufffdc\n\td\u00e9"
