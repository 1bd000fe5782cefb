"""From dense weights to the parameters of a union of experts, layer by layer.

One layer is in memory at a time, whatever the size of the model. Sample text, if there is any, goes
through each layer as soon as it is built: its hidden states are all that is kept between layers.

Shape suffixes: S positions, B sequences, T tokens, D model width, F neurons, V ids.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn

from uoe_parallel.checkpoint import Piece
from uoe_parallel.config.schema import RunConfig
from uoe_parallel.conversion.import_architectures import (
    Architecture,
    EmbeddingWeights,
    LayerWeights,
    NormWeights,
)
from uoe_parallel.conversion.import_sample import Sample
from uoe_parallel.conversion.import_text import Losses, Routers, Slices, TextInLayers
from uoe_parallel.experts.attention import SelectiveMultiHeadAttention
from uoe_parallel.experts.backends import pick_backend
from uoe_parallel.experts.mlp import UnionOfMLPExperts
from uoe_parallel.model.block import RoutedBlock
from uoe_parallel.model.builder import LayerBuilder
from uoe_parallel.model.embedding import Embedding
from uoe_parallel.model.heads import VocabularyHead
from uoe_parallel.model.language_model import TransformerBlock
from uoe_parallel.model.norm import Norm
from uoe_parallel.parallel.groups import ParallelGroups

M = TypeVar("M", bound=nn.Module)


@dataclass(frozen=True)
class Vocabulary:
    used: int
    """Ids that mean something."""
    padded: int
    """Rows of the embedding."""


class LayerImport:
    """Builds the layers of a config from an architecture's weights, on one rank.

    dtype: of the source's tensors, which ours are written in; they are computed with in fp32 or
    fp64. Weights that the source does not have, those of routers, stay in that.
    """

    def __init__(
        self,
        architecture: Architecture,
        config: RunConfig,
        vocabulary: Vocabulary,
        groups: ParallelGroups,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self._architecture = architecture
        self._config = config
        self._vocabulary = vocabulary
        self._groups = groups
        self._device = device
        self._dtype = dtype
        precise = torch.promote_types(dtype, torch.float32)
        backend, _ = pick_backend(device, precise, "loop", groups.world)
        self._builder = LayerBuilder(config, groups, backend, precise)
        self.losses: Losses | None = None
        """Of held-out text, once all parts are made of a sample."""

    @torch.no_grad()
    def parts(
        self,
        slices: Slices,
        routers: Routers,
        sample: Sample | None,
        advance: Callable[[], object] = lambda: None,
    ) -> Iterator[Sequence[Piece]]:
        """The entries of a checkpoint: the embedding's, each layer's, the end's. `advance` is
        called when a layer is done. Without a sample slices are contiguous and routers random."""
        assert sample is not None or (slices, routers) == ("contiguous", "random")
        embedding = self._built(self._builder.embedding(self._vocabulary.padded))
        self._load_embedding(embedding, self._architecture.embedding())
        yield self._pieces("embedding", embedding)
        text = None
        if sample is not None:
            text = TextInLayers(sample, embedding, self._groups, slices, routers, self._config.seed)
        for number in range(self._config.model.num_layers):
            layer = self._built(TransformerBlock(self._builder, number))
            load_layer(layer, self._architecture.layer(number))
            if text is not None:
                text.pass_through(layer)
            yield self._pieces(f"layers.{number}", layer)
            advance()
        norm = self._built(self._builder.norm())
        head = self._builder.head(self._vocabulary.padded, self._vocabulary.used)
        assert isinstance(head, VocabularyHead)
        self._load_end(norm, self._built(head))
        yield [*self._pieces("final_norm", norm), *self._pieces("head", head)]
        if text is not None:
            tied_to = embedding.tokens if head.tied else None
            self.losses = text.judge(lambda x_SBD: head(norm(x_SBD), tied_to))

    def _built(self, module: M) -> M:
        return module.to(self._device).eval()

    def _load_embedding(self, embedding: Embedding, weights: EmbeddingWeights) -> None:
        embedding.tokens.weight.copy_(self._rows(weights.tokens_VD))
        if weights.positions_LD is not None:
            assert embedding.positions is not None
            embedding.positions.copy_(weights.positions_LD)

    def _load_end(self, norm: Norm, head: VocabularyHead) -> None:
        weights = self._architecture.end()
        load_norm(norm, weights.norm)
        if weights.head_VD is not None:
            assert head.logits.weight is not None
            head.logits.weight.copy_(self._rows(weights.head_VD))

    def _rows(self, source_VD: Tensor) -> Tensor:
        """Rows of our vocabulary. An id of the tokenizer that the source has no row for, such as an
        end of documents of our own, gets the mean of all: as likely as they are on average. Rows
        beyond the vocabulary are left out, and those of padding mean nothing."""
        used, padded = self._vocabulary.used, self._vocabulary.padded
        rows_VD = source_VD.new_zeros(padded, source_VD.shape[1])
        taken = min(len(source_VD), padded)
        rows_VD[:taken] = source_VD[:taken]
        if taken < used:
            rows_VD[taken:used] = source_VD.double().mean(0).to(source_VD.dtype)
        return rows_VD

    def _pieces(self, prefix: str, module: nn.Module) -> list[Piece]:
        routers = {
            f"{name}.{level}"
            for name, block in module.named_modules()
            if isinstance(block, RoutedBlock)
            for level in block.router.levels
        }
        pieces: list[Piece] = []
        for name, param in module.named_parameters():
            dtype = param.dtype if name in routers else self._dtype
            value = param.detach().to("cpu", dtype)
            pieces.append(Piece.whole(f"{prefix}.{name}/weight", value))
        return pieces


def load_layer(layer: TransformerBlock, weights: LayerWeights) -> None:
    """Fill a whole layer, on one rank, with dense weights. Routers stay as they are."""
    attention, feed_forward = layer.attention.experts, layer.feed_forward.experts
    assert isinstance(attention, SelectiveMultiHeadAttention)
    assert isinstance(feed_forward, UnionOfMLPExperts)
    load_norm(layer.attention_norm, weights.attention_norm)
    attention.load_dense(weights.attention)
    load_norm(layer.feed_forward_norm, weights.feed_forward_norm)
    feed_forward.load_dense(weights.feed_forward)


def load_norm(norm: Norm, weights: NormWeights) -> None:
    norm.weight.copy_(weights.weight_D)
    if weights.bias_D is not None:
        assert norm.bias is not None
        norm.bias.copy_(weights.bias_D)
