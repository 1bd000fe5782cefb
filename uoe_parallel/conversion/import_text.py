"""Sample text on its way through layers that are being imported, and what it is good for there.

Shape suffixes: S positions, B sequences, T tokens, D model width, F neurons, V ids.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from uoe_parallel.conversion.clusters import clusters_of_neurons
from uoe_parallel.conversion.import_sample import Sample
from uoe_parallel.conversion.routers import captured_input, fit_router, inner_activity
from uoe_parallel.experts.attention import SelectiveMultiHeadAttention
from uoe_parallel.experts.mlp import DenseMLPWeights, UnionOfMLPExperts
from uoe_parallel.model.block import DenseBlock, RoutedBlock
from uoe_parallel.model.context import Context, micro_batch_context
from uoe_parallel.model.embedding import Embedding
from uoe_parallel.model.language_model import TransformerBlock
from uoe_parallel.parallel.groups import ParallelGroups

Slices = Literal["contiguous", "clusters"]
Routers = Literal["random", "activation"]

_CLUSTER_TOKENS = 4096
"""Tokens by whose activities neurons are told apart: as many rows of a layer's are held."""


@dataclass(frozen=True)
class Losses:
    """Of held-out text, nats per token."""

    dense: float
    """With all experts on and gates of one."""
    routed: float


class TextInLayers:
    """Hidden states [S, B, D] of a sample, before the layer that comes next.

    Each layer is given what the dense layers before it make of the text, so that it is studied as
    the model that it comes from uses it.
    """

    def __init__(
        self,
        sample: Sample,
        embedding: Embedding,
        groups: ParallelGroups,
        slices: Slices,
        routers: Routers,
        seed: int,
    ) -> None:
        self._groups = groups
        self._slices: Slices = slices
        self._routers: Routers = routers
        self._seed = seed
        device = embedding.tokens.weight.device
        self._tokens = [tokens_BS.to(device) for tokens_BS in sample.held_out]

        def embedded(tokens_BS: Tensor) -> Tensor:
            tokens_BS = tokens_BS.to(device)
            shape = (tokens_BS.shape[0], tokens_BS.shape[1])
            documents = micro_batch_context(shape, None, groups, device).documents
            return embedding(tokens_BS, documents)

        self._studied = [embedded(tokens_BS) for tokens_BS in sample.studied]
        self._dense = [embedded(tokens_BS) for tokens_BS in sample.held_out]
        self._routed = list(self._dense)

    def pass_through(self, layer: TransformerBlock) -> None:
        """Slice the layer's blocks and give them routers, as was asked for, and move on behind
        it."""
        attention_in, feed_forward_in = self._study(layer)
        routed_blocks = [(layer.attention, attention_in), (layer.feed_forward, feed_forward_in)]
        for block, inputs in routed_blocks:
            if isinstance(block, RoutedBlock):
                self._cut(block, inputs)
        with _all_experts(layer):
            self._dense = [layer(x_SBD, self._context(x_SBD)) for x_SBD in self._dense]
        self._routed = [layer(x_SBD, self._context(x_SBD)) for x_SBD in self._routed]

    def judge(self, logits: Callable[[Tensor], Tensor]) -> Losses:
        """logits: of hidden states behind the last layer, [S, B, D] to [S, B, V]."""
        return Losses(self._loss(logits, self._dense), self._loss(logits, self._routed))

    def _study(self, layer: TransformerBlock) -> tuple[list[Tensor], list[Tensor]]:
        """Takes the studied text through the dense layer; the inputs of its two blocks."""
        with (
            _all_experts(layer),
            captured_input(layer.attention) as attention_in,
            captured_input(layer.feed_forward) as feed_forward_in,
        ):
            self._studied = [layer(x_SBD, self._context(x_SBD)) for x_SBD in self._studied]
        return attention_in, feed_forward_in

    def _cut(self, block: RoutedBlock, inputs: Sequence[Tensor]) -> None:
        experts = block.experts
        assert isinstance(experts, UnionOfMLPExperts | SelectiveMultiHeadAttention)
        if isinstance(experts, UnionOfMLPExperts) and self._slices == "clusters":
            activity_TF = _activity(experts, inputs)
            order_F = clusters_of_neurons(activity_TF, experts.num_experts, self._seed)
            reorder_neurons(experts, order_F)
        if self._routers == "activation":
            weight_ED = fit_router(experts, inputs)
            # Scores are linear, so that what predicts the experts of a token predicts, from the
            # mean over a segment, their mean there.
            for level in block.router.levels:
                weight = block.router.without_shared(weight_ED.t()).t()
                block.get_parameter(level).copy_(weight)

    def _context(self, x_SBD: Tensor) -> Context:
        shape = (x_SBD.shape[1], x_SBD.shape[0])
        return micro_batch_context(shape, None, self._groups, x_SBD.device)

    def _loss(self, logits: Callable[[Tensor], Tensor], hidden: Sequence[Tensor]) -> float:
        total, count = 0.0, 0
        for x_SBD, tokens_BS in zip(hidden, self._tokens, strict=True):
            logits_TV = logits(x_SBD[:-1]).flatten(0, 1)
            labels_T = tokens_BS.t()[1:].flatten()
            total += float(F.cross_entropy(logits_TV.double(), labels_T, reduction="sum"))
            count += len(labels_T)
        return total / count


def reorder_neurons(experts: UnionOfMLPExperts, order_F: Tensor) -> None:
    """Put neuron order_F[i] of a whole block, on one rank, into place i. The union stays the
    same."""
    dense = experts.to_dense()
    parts = {field.name: getattr(dense, field.name) for field in fields(DenseMLPWeights)}
    # By the neurons' dimension, the first one but of the weights that lead out of the block.
    moved = {
        name: part[order_F] if name.endswith(("_FD", "_F")) else part[:, order_F]
        for name, part in parts.items()
        if part is not None and name.endswith(("_FD", "_F", "_DF"))
    }
    experts.load_dense(replace(dense, **moved))


def _activity(experts: UnionOfMLPExperts, inputs: Sequence[Tensor]) -> Tensor:
    """How much each neuron adds to each token, [T, F]: what it feeds to the second linear, by the
    norm of its weights there."""
    rows: list[Tensor] = []
    for x_SBD in inputs:
        rows.append(inner_activity(experts, x_SBD).abs())
        if sum(map(len, rows)) >= _CLUSTER_TOKENS:
            break
    return torch.cat(rows)[:_CLUSTER_TOKENS] * experts.fc2.weight.norm(dim=0)


@contextmanager
def _all_experts(layer: TransformerBlock) -> Iterator[None]:
    """As `LanguageModel.all_experts`, of one layer."""
    blocks: list[DenseBlock] = [layer.attention, layer.feed_forward]
    routed = [block for block in blocks if isinstance(block, RoutedBlock)]
    for block in routed:
        block.takes_all = True
    try:
        yield
    finally:
        for block in routed:
            block.takes_all = False
