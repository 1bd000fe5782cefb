"""The causal language model and the list of layers it is made of."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    VocabParallelEmbedding,
    vocab_parallel_cross_entropy,
)
from torch import Tensor, nn

from uoe_parallel.config.schema import RunConfig
from uoe_parallel.experts.attention import SelectiveMultiHeadAttention
from uoe_parallel.experts.backends import Backend
from uoe_parallel.experts.mlp import UnionOfMLPExperts
from uoe_parallel.model.block import DenseBlock, RoutedBlock
from uoe_parallel.model.dropout import Dropout
from uoe_parallel.model.initialization import Initializer
from uoe_parallel.model.norm import RMSNorm
from uoe_parallel.parallel import comm
from uoe_parallel.parallel.groups import ParallelGroups
from uoe_parallel.parallel.megatron import megatron_config
from uoe_parallel.parallel.random import recompute


class LayerBuilder:
    """Builds the layers of a config: the one place that joins config, groups and layers."""

    def __init__(
        self, config: RunConfig, groups: ParallelGroups, backend: Backend, dtype: torch.dtype
    ) -> None:
        self.config = config
        self.groups = groups
        self.backend = backend
        self.dtype = dtype
        self.megatron = megatron_config(groups.layout, dtype)
        self.init = Initializer(config.seed)

    def norm(self) -> RMSNorm:
        return RMSNorm(
            self.config.model.hidden_size,
            eps=self.config.model.norm_eps,
            dtype=self.dtype,
            group=self.groups.tensor,
            sequence_parallel=self.groups.layout.sequence_parallel,
        )

    def dropout(self) -> Dropout:
        return Dropout(
            self.config.model.dropout,
            sequence_parallel=self.groups.layout.sequence_parallel,
        )

    def attention(self, layer: int) -> DenseBlock:
        model, name = self.config.model, f"layers.{layer}.attention"
        experts = SelectiveMultiHeadAttention(
            model.hidden_size,
            model.num_heads,
            model.kv_heads,
            rope_base=model.rope_base,
            bias=model.bias,
            backend=self.backend,
            config=self.megatron,
            qkv_init=self.init.normal(f"{name}.qkv", model.init_std),
            output_init=self.init.normal(f"{name}.output", self._output_std()),
            group=self.groups.tensor,
            dropout=model.attention_dropout,
        )
        return self._block(experts, model.kv_heads, layer, "attention")

    def feed_forward(self, layer: int) -> DenseBlock:
        model, name = self.config.model, f"layers.{layer}.feed_forward"
        num_experts = self.config.feed_forward.num_experts
        experts = UnionOfMLPExperts(
            model.hidden_size,
            model.ffn_size,
            num_experts,
            activation=model.activation,
            bias=model.bias,
            backend=self.backend,
            config=self.megatron,
            fc1_init=self.init.normal(f"{name}.fc1", model.init_std),
            fc2_init=self.init.normal(f"{name}.fc2", self._output_std()),
            group=self.groups.tensor,
        )
        return self._block(experts, num_experts, layer, "feed_forward")

    def _block(self, experts: nn.Module, num_experts: int, layer: int, kind: str) -> DenseBlock:
        routing = self.config.attention if kind == "attention" else self.config.feed_forward
        tensor, sequence_parallel = self.groups.tensor, self.groups.layout.sequence_parallel
        if not routing.routes(layer):
            return DenseBlock(experts, group=tensor, sequence_parallel=sequence_parallel)
        return RoutedBlock(
            experts,
            routing,
            hidden_size=self.config.model.hidden_size,
            num_experts=num_experts,
            dtype=self.dtype,
            router_init=self.init.normal(
                f"layers.{layer}.{kind}.router", self.config.model.router_init_std
            ),
            loss_weight_per_sequence=self.groups.layout.data
            / self.config.training.global_batch_size,
            group=tensor,
            sequence_parallel=sequence_parallel,
        )

    def _output_std(self) -> float:
        # Residual branches start smaller the more of them add up (GPT-2).
        return self.config.model.init_std / (2 * self.config.model.num_layers) ** 0.5


class TransformerBlock(nn.Module):
    """x + attention(norm(x)), then x + feed_forward(norm(x)), both terms with dropout."""

    def __init__(self, builder: LayerBuilder, layer: int) -> None:
        super().__init__()
        self.attention_norm = builder.norm()
        self.attention = builder.attention(layer)
        self.feed_forward_norm = builder.norm()
        self.feed_forward = builder.feed_forward(layer)
        self.dropout = builder.dropout()
        self.recompute = builder.config.training.recompute_layers

    def forward(self, x_SBD: Tensor) -> Tensor:
        if self.recompute and torch.is_grad_enabled() and x_SBD.requires_grad:
            return recompute(self._forward, x_SBD)
        return self._forward(x_SBD)

    def _forward(self, x_SBD: Tensor) -> Tensor:
        x_SBD = x_SBD + self.dropout(self.attention(self.attention_norm(x_SBD)))
        return x_SBD + self.dropout(self.feed_forward(self.feed_forward_norm(x_SBD)))


class Embedding(nn.Module):
    """Token ids [B, S] to hidden states [S or S/P, B, D], the vocabulary cut over the group."""

    def __init__(self, builder: LayerBuilder, vocab_size: int) -> None:
        super().__init__()
        self.sequence_parallel = builder.groups.layout.sequence_parallel
        self.tokens = VocabParallelEmbedding(
            vocab_size,
            builder.config.model.hidden_size,
            init_method=builder.init.normal("embedding", builder.config.model.init_std),
            config=builder.megatron,
            tp_group=builder.groups.tensor,
        )
        self.dropout = builder.dropout()

    def forward(self, tokens_BS: Tensor) -> Tensor:
        self.tokens.reduce_scatter_embeddings = self.sequence_parallel
        hidden = self.tokens(tokens_BS)
        hidden = hidden if self.sequence_parallel else hidden.transpose(0, 1).contiguous()
        return self.dropout(hidden)


class Head(nn.Module):
    """Final norm and logits [S, B, V/P] of this rank's part of the vocabulary."""

    def __init__(self, builder: LayerBuilder, vocab_size: int) -> None:
        super().__init__()
        model = builder.config.model
        self.tied = model.tie_embeddings
        self.norm = builder.norm()
        self.logits = ColumnParallelLinear(
            model.hidden_size,
            vocab_size,
            config=builder.megatron,
            init_method=builder.init.normal("head", model.init_std),
            bias=False,
            skip_weight_param_allocation=model.tie_embeddings,
            tp_group=builder.groups.tensor,
        )

    def forward(self, x_SBD: Tensor, embedding: VocabParallelEmbedding) -> Tensor:
        # The tied weight is asked for here, inside the module that uses it: ZeRO 3 gathers it
        # for this forward and backward pass then, and not for longer.
        weight = embedding.weight if self.tied else None
        return self.logits(self.norm(x_SBD), weight=weight)[0]


class LanguageModel(nn.Module):
    """A causal transformer whose blocks are unions of experts.

    `vocab_size` is the padded size; `used_vocab_size` the number of ids that mean something.
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
    ) -> None:
        super().__init__()
        builder = LayerBuilder(config, groups, backend, dtype)
        self.group = groups.tensor
        self.used_vocab_size = used_vocab_size
        self.embedding = Embedding(builder, vocab_size)
        self.layers = nn.ModuleList(
            TransformerBlock(builder, layer) for layer in range(config.model.num_layers)
        )
        self.head = Head(builder, vocab_size)

    def hidden(self, tokens_BS: Tensor) -> Tensor:
        """Hidden states before the head, [S or S/P, B, D]."""
        x_SBD = self.embedding(tokens_BS)
        for layer in self.layers:
            x_SBD = layer(x_SBD)
        return x_SBD

    def forward(self, tokens_BS: Tensor, labels_BS: Tensor | None = None) -> Tensor:
        """Cross entropy of every token, fp32 nats [B, S], or with no labels the logits of the
        used vocabulary, [B, S, V]. The same on every rank of the tensor group.

        tokens_BS, labels_BS: int64 ids below the vocabulary size. With sequence parallelism S
        must be a multiple of the tensor size.
        """
        logits_SBV = self.head(self.hidden(tokens_BS), self.embedding.tokens)
        if labels_BS is None:
            logits_SBV = comm.gather_last_dim(logits_SBV, self.group)
            return logits_SBV[..., : self.used_vocab_size].transpose(0, 1)
        labels_SB = labels_BS.transpose(0, 1).contiguous()
        return vocab_parallel_cross_entropy(logits_SBV, labels_SB).transpose(0, 1)

    def routed_blocks(self) -> dict[str, RoutedBlock]:
        """The routed blocks by name, in order of depth."""
        return {
            name: module for name, module in self.named_modules() if isinstance(module, RoutedBlock)
        }

    @contextmanager
    def replicated_tokens(self) -> Iterator[None]:
        """Without gradients and with tokens on every rank: any sequence length, no dispatch.

        For decoding, where a step has too few tokens to shard.
        """
        # Megatron's layers, like ours, look at this attribute in every forward pass.
        sharded: list[Any] = [m for m in self.modules() if getattr(m, "sequence_parallel", False)]
        for module in sharded:
            module.sequence_parallel = False
        try:
            with torch.no_grad():
                yield
        finally:
            for module in sharded:
                module.sequence_parallel = True
