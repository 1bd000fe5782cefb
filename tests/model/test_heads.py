"""The heads of bidirectional models: what they compute, and that layouts don't change it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.harness import Ranks
from tests.model.cases import build_model, full_gradients, random_tokens, relative_difference, start
from tests.tiny import USED_VOCAB_SIZE, tiny_config
from uoe_parallel.config.schema import RunConfig
from uoe_parallel.model.heads import VocabularyHead

TASKS: dict[str, dict[str, Any]] = {
    "masked tokens": {"model": {"task": "masked_token"}},
    "masked tokens, untied": {"model": {"task": "masked_token", "tie_embeddings": False}},
    "classes": {"model": {"task": "classification", "num_classes": 3}},
}
LENGTHS = [16, 3, 9, 0]
"""Real tokens of each sequence."""


@dataclass(frozen=True)
class Result:
    losses: Tensor
    correct: Tensor
    logits: Tensor
    """Whole."""
    hidden: Tensor
    """Normed [S or S/P, B, D]: what the head was given."""
    gradients: dict[str, Tensor]


def documents_of(config: RunConfig) -> Tensor:
    length = config.model.sequence_length
    return torch.where(torch.arange(length) < torch.tensor(LENGTHS).unsqueeze(1), 0, -1)


def labels_of(config: RunConfig) -> Tensor:
    tokens = random_tokens(config, seed=4)
    return tokens[:, :1] % 3 if config.model.task == "classification" else tokens


def run_head(config: RunConfig) -> Result:
    """fp64: a forward and a backward pass, each label with another weight."""
    groups = start(config)
    model = build_model(config, groups, torch.float64)
    tokens, labels, documents = random_tokens(config), labels_of(config), documents_of(config)
    seen: list[Tensor] = []
    assert model.final_norm is not None
    model.final_norm.register_forward_hook(lambda *call: seen.append(call[2]))
    losses, correct = model(tokens, labels, documents, judged=True)
    weights = torch.linspace(0.5, 1.5, losses.numel(), dtype=torch.float64).view_as(losses)
    (losses * weights).sum().backward()
    with torch.no_grad():
        logits = model(tokens, None, documents)
    gradients = full_gradients(model, groups)
    return Result(losses.detach(), correct, logits, seen[0].detach(), gradients)


def class_logits_of_replicated_tokens(config: RunConfig) -> Tensor:
    model = build_model(config, start(config), torch.float64)
    with model.replicated_tokens():
        return model(random_tokens(config), None, documents_of(config))


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("sequence_parallel", [True, False])
def test_losses_and_gradients_are_those_of_one_rank(
    ranks: Ranks, task: str, sequence_parallel: bool
) -> None:
    [expected] = ranks(1).run(run_head, tiny_config(**TASKS[task]))
    parallel = {"tensor": 2, "sequence_parallel": sequence_parallel}
    for found in ranks(2).run(run_head, tiny_config(**TASKS[task], parallel=parallel)):
        torch.testing.assert_close(found.losses, expected.losses, rtol=1e-11, atol=1e-12)
        torch.testing.assert_close(found.logits, expected.logits, rtol=1e-10, atol=1e-12)
        assert torch.equal(found.correct, expected.correct)
        worst, name = relative_difference(found.gradients, expected.gradients, eps=1e-6)
        assert worst < 1e-11, name


def test_classes_follow_from_the_mean_of_real_tokens(ranks: Ranks) -> None:
    config = tiny_config(**TASKS["classes"])
    [found] = ranks(1).run(run_head, config)
    [(weight, bias)] = ranks(1).run(_class_parameters, config)
    assert (weight.shape, bias.tolist()) == ((3, 32), [0.0] * 3)
    for b, length in enumerate(LENGTHS):
        mean = found.hidden[:length, b].sum(0) / max(length, 1)
        torch.testing.assert_close(found.logits[b], weight @ mean + bias)
    losses = -found.logits.log_softmax(-1).gather(1, labels_of(config))
    torch.testing.assert_close(found.losses, losses)
    assert torch.equal(found.correct, found.logits.argmax(-1, keepdim=True) == labels_of(config))


def _class_parameters(config: RunConfig) -> tuple[Tensor, Tensor]:
    head = build_model(config, start(config), torch.float64).head
    assert head is not None
    weight, bias = (param.detach() for param in head.parameters())
    return weight, bias


def test_right_tokens_are_those_with_the_highest_logit(ranks: Ranks) -> None:
    config = tiny_config(model={"task": "masked_token"}, parallel={"tensor": 2})
    for judged in ranks(2).run(_judge_own_guesses, config):
        right, shifted = judged
        assert right.shape == (4, 16) and right.all(), "the best guess, on whichever rank it is"
        assert not shifted.any()


def _judge_own_guesses(config: RunConfig) -> tuple[Tensor, Tensor]:
    model = build_model(config, start(config))
    tokens = random_tokens(config)
    with torch.no_grad():
        assert isinstance(model.head, VocabularyHead)
        model.head.used_vocab_size = 264  # the padding is guessed at first
        guesses = model(tokens).argmax(-1)
        return tuple(model(tokens, g, judged=True)[1] for g in (guesses, (guesses + 1) % 264))


def test_classes_of_replicated_tokens(ranks: Ranks) -> None:
    config = tiny_config(**TASKS["classes"])
    [expected] = ranks(1).run(class_logits_of_replicated_tokens, config)
    sharded = tiny_config(**TASKS["classes"], parallel={"tensor": 2})
    for found in ranks(2).run(class_logits_of_replicated_tokens, sharded):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


def test_a_classifier_has_no_head_over_the_vocabulary(ranks: Ranks) -> None:
    names = set(ranks(1).run(run_head, tiny_config(**TASKS["classes"]))[0].gradients)
    assert {"head.weight", "head.bias", "embedding.tokens.weight"} <= names
    assert "head.logits.weight" not in names


def test_padding_has_no_share_of_a_softmax(ranks: Ranks) -> None:
    """Whatever its rows hold; with two ranks all of it is on the second."""
    for tensor in (1, 2):
        config = tiny_config(parallel={"tensor": tensor}, model={"tie_embeddings": False})
        for losses, expected, padding_gradient in ranks(tensor).run(_judge_beside_padding, config):
            torch.testing.assert_close(losses, expected)
            assert not padding_gradient.any()


def _judge_beside_padding(config: RunConfig) -> tuple[Tensor, Tensor, Tensor]:
    """Losses, what they are over the used vocabulary alone, and the gradient of padding's rows."""
    model = build_model(config, start(config), torch.float64)
    assert isinstance(model.head, VocabularyHead)
    weight = model.head.logits.weight
    assert weight is not None
    own = max(USED_VOCAB_SIZE - model.groups.tensor_rank * len(weight), 0)
    with torch.no_grad():
        weight[own:] = 50.0
    tokens_BS = random_tokens(config)
    losses_BS = model(tokens_BS, tokens_BS)
    losses_BS.sum().backward()
    with torch.no_grad():
        expected_BS = F.cross_entropy(model(tokens_BS).transpose(1, 2), tokens_BS, reduction="none")
    assert weight.grad is not None
    return losses_BS.detach(), expected_BS, weight.grad[own:]
