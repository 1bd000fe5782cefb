"""The language model and the list of layers it is made of."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from uoe_parallel.config.rules import SELECTIONS, load_rule
from uoe_parallel.config.schema import RunConfig
from uoe_parallel.experts.backends import Backend
from uoe_parallel.experts.documents import Documents
from uoe_parallel.model.block import RoutedBlock
from uoe_parallel.model.builder import LayerBuilder
from uoe_parallel.model.context import Context, micro_batch_context
from uoe_parallel.model.decoding import DecodingMemory
from uoe_parallel.model.heads import ClassHead
from uoe_parallel.model.stages import stage_layers
from uoe_parallel.parallel.groups import ParallelGroups
from uoe_parallel.parallel.random import recompute
from uoe_parallel.routing.router import ROUTER_SUFFIX


class TransformerBlock(nn.Module):
    """x + attention(norm(x)), then x + feed_forward(norm(x)), both terms with dropout."""

    def __init__(self, builder: LayerBuilder, layer: int) -> None:
        super().__init__()
        self.attention_norm = builder.norm()
        self.attention = builder.attention(layer)
        self.feed_forward_norm = builder.norm()
        self.feed_forward = builder.feed_forward(layer)
        self.dropout = builder.dropout()
        self.recompute = builder.recompute == "full"

    def forward(self, x_SBD: Tensor, context: Context) -> Tensor:
        forward = partial(self._forward, context=context)
        return recompute(forward, x_SBD) if self.recompute else forward(x_SBD)

    def _forward(self, x_SBD: Tensor, context: Context) -> Tensor:
        attended = self.attention(self.attention_norm(x_SBD), context)
        x_SBD = x_SBD + self.dropout(attended)
        fed = self.feed_forward(self.feed_forward_norm(x_SBD), context)
        return x_SBD + self.dropout(fed)


class LanguageModel(nn.Module):
    """A transformer whose blocks are unions of experts, or one pipeline stage of it.

    Causal or bidirectional, and with the head that the config's task needs.

    `vocab_size` is the padded size; `used_vocab_size` the number of ids that mean something;
    `build_layer` makes the layer of a number. Parameters have the same names whatever the stage,
    with layers numbered over the whole model. The first and the last have a tied embedding.
    """

    def __init__(
        self,
        config: RunConfig,
        groups: ParallelGroups,
        *,
        vocab_size: int,
        used_vocab_size: int,
        backend: Backend,
        dtype: torch.dtype = torch.float32,
        build_layer: Callable[[LayerBuilder, int], TransformerBlock] = TransformerBlock,
    ) -> None:
        super().__init__()
        builder = LayerBuilder(config, groups, backend, dtype)
        self.groups = groups
        self.sequence_parallel = groups.layout.sequence_parallel
        self.num_layers = config.model.num_layers
        self.hidden_size = config.model.hidden_size
        self.used_vocab_size = used_vocab_size
        self.decodes_by_token = all(
            routing.selection is None or load_rule(SELECTIONS, routing.selection).per_unit
            for routing in (config.feed_forward, config.attention)
            if any(map(routing.routes, range(config.model.num_layers)))
        )
        """Whether one token at a time can be added to a memory: by the config, which all stages
        share, and not by the blocks of this one."""
        classifies = config.model.task == "classification"
        self.tied = config.model.tie_embeddings and not classifies
        # A class for a whole sequence costs next to nothing.
        head_size = 0 if classifies else vocab_size
        self.stage_layers = stage_layers(config, groups.pipe.size(), head_size)
        first, last = groups.is_first_stage, groups.is_last_stage
        self.embedding = builder.embedding(vocab_size) if first or (last and self.tied) else None
        self.layers = nn.ModuleDict(
            {str(n): build_layer(builder, n) for n in self.stage_layers[groups.stage]}
        )
        self.final_norm = builder.norm() if last else None
        self.head = builder.head(vocab_size, used_vocab_size) if last else None
        if config.training.trains == "routers":
            for name, param in self.named_parameters():
                param.requires_grad_(name.endswith(ROUTER_SUFFIX))

    @property
    def num_shards(self) -> int:
        """Ranks that a sequence's tokens lie over between blocks."""
        return self.groups.tensor.size() if self.sequence_parallel else 1

    def stage(
        self, x: Tensor, documents_BS: Tensor | None = None, memory: DecodingMemory | None = None
    ) -> Tensor:
        """This stage's part: of ids [B, S] on the first, of hidden states elsewhere, to the head's
        logits on the last and hidden states [S or S/P, B, D] elsewhere."""
        hidden = self.hidden(x, documents_BS, memory)
        return self.logits(hidden, documents_BS) if self.groups.is_last_stage else hidden

    def hidden(
        self, x: Tensor, documents_BS: Tensor | None = None, memory: DecodingMemory | None = None
    ) -> Tensor:
        """Hidden states after this stage's layers, [S or S/P, B, D].

        documents_BS: int64 [B, S], one id for all tokens of a document, another one for the next,
        -1 for padding; None if every sequence is one document. memory: of a causal model within
        `replicated_tokens`; an empty one is filled with sequences of one document each, with
        padding behind it if any, and to another one S = 1 token of each sequence is added.
        """
        if self.groups.is_first_stage:
            assert self.embedding is not None
            context = self.context((x.shape[0], x.shape[1]), documents_BS, x.device, memory)
            x = self.embedding(x, context.documents)
        else:
            shape = (x.shape[1], x.shape[0] * self.num_shards)
            context = self.context(shape, documents_BS, x.device, memory)
        for layer in self.layers.values():
            x = layer(x, context)
        if memory is not None:
            memory.advance(context.documents)
        return x

    def context(
        self,
        shape_BS: tuple[int, int],
        documents_BS: Tensor | None,
        device: torch.device,
        memory: DecodingMemory | None = None,
    ) -> Context:
        """What the layers need to know of a micro-batch of this shape."""
        if memory is None or memory.position_B is None:
            return micro_batch_context(shape_BS, documents_BS, self.groups, device, memory)
        assert shape_BS == (len(memory.position_B), 1), "one more token of each text"
        step = Documents.step(memory.position_B)
        return Context(step, step, memory)

    def logits(self, x_SBD: Tensor, documents_BS: Tensor | None = None) -> Tensor:
        """Of the last stage's hidden states [S or S/P, B, D]: [S, B, V/P] of tokens, [B, C] of
        classes. documents_BS: as in `hidden`."""
        assert self.final_norm is not None and self.head is not None
        x_SBD = self.final_norm(x_SBD)
        if isinstance(self.head, ClassHead):
            return self.head(x_SBD, documents_BS)
        tied_to = self.embedding.tokens if self.tied and self.embedding is not None else None
        return self.head(x_SBD, tied_to)

    def losses(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Cross entropy of every label, nats, [B, S] of tokens or [B, 1] of classes, fp32 (fp64 of
        fp64 logits). The same on every rank of the tensor group. May overwrite the logits."""
        assert self.head is not None
        return self.head.losses(logits, labels)

    def judge(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """The losses, and which predictions are right, bool of the same shape. The same on every
        rank of the tensor group. May overwrite the logits."""
        assert self.head is not None
        correct = self.head.correct(logits, labels)
        return self.head.losses(logits, labels), correct

    def forward(
        self,
        tokens_BS: Tensor,
        labels: Tensor | None = None,
        documents_BS: Tensor | None = None,
        *,
        judged: bool = False,
        memory: DecodingMemory | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """The `losses` of the labels, if `judged` what `judge` says of them, or with no labels the
        logits of the used vocabulary, [B, S, V], or of classes, [B, C]. The same on every rank of
        the tensor group. For a model of one stage.

        tokens_BS: int64 ids below the vocabulary size. With sequence parallelism S must be a
        multiple of the tensor size. labels: int64, ids [B, S] or classes [B, 1]. documents_BS,
        memory: as in `hidden`.
        """
        assert self.groups.pipe.size() == 1
        logits = self.stage(tokens_BS, documents_BS, memory)
        if labels is None:
            return self.whole(logits)
        return self.judge(logits, labels) if judged else self.losses(logits, labels)

    def whole(self, logits: Tensor) -> Tensor:
        """The logits of the used vocabulary [B, S, V], or of classes [B, C], on every rank of the
        tensor group."""
        assert self.head is not None
        return self.head.whole(logits)

    def routed_blocks(self) -> dict[str, RoutedBlock]:
        """The routed blocks of this stage by name, in order of depth."""
        blocks = {
            f"layers.{number}.{kind}": getattr(layer, kind)
            for number, layer in self.layers.items()
            for kind in ("attention", "feed_forward")
        }
        return {name: block for name, block in blocks.items() if isinstance(block, RoutedBlock)}

    @contextmanager
    def all_experts(self) -> Iterator[None]:
        """With every expert on and gates of one: the dense model that this one was cut out of."""
        blocks = self.routed_blocks().values()
        for block in blocks:
            block.takes_all = True
        try:
            yield
        finally:
            for block in blocks:
                block.takes_all = False

    @contextmanager
    def replicated_tokens(self) -> Iterator[None]:
        """Without gradients and with tokens on every rank: any sequence length, no dispatch.

        For decoding, where a step has too few tokens to shard.
        """
        # Megatron's layers, like ours, look at these attributes in every forward pass.
        spread: list[tuple[Any, str]] = [
            (module, name)
            for module in self.modules()
            for name in ("sequence_parallel", "spreads_tokens")
            if getattr(module, name, False)
        ]
        for module, name in spread:
            setattr(module, name, False)
        try:
            with torch.no_grad():
                yield
        finally:
            for module, name in spread:
                setattr(module, name, True)
