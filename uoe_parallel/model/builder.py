"""From a config and groups to layers."""

from __future__ import annotations

import torch
from torch import nn
from torch.distributed import ProcessGroup

from uoe_parallel.config.schema import RoutingConfig, RunConfig
from uoe_parallel.experts.attention import SelectiveMultiHeadAttention
from uoe_parallel.experts.backends import Backend
from uoe_parallel.experts.mlp import UnionOfMLPExperts
from uoe_parallel.model.block import DenseBlock, RoutedBlock
from uoe_parallel.model.dropout import Dropout
from uoe_parallel.model.embedding import Embedding
from uoe_parallel.model.heads import ClassHead, VocabularyHead
from uoe_parallel.model.initialization import Initializer
from uoe_parallel.model.norm import Norm
from uoe_parallel.parallel.groups import ParallelGroups
from uoe_parallel.parallel.megatron import megatron_config
from uoe_parallel.parallel.sharding import mark_wide, partition_dim
from uoe_parallel.routing.router import Router


class LayerBuilder:
    """Builds the layers of a config: the one place that joins config, groups and layers."""

    def __init__(
        self, config: RunConfig, groups: ParallelGroups, backend: Backend, dtype: torch.dtype
    ) -> None:
        self.config = config
        self.groups = groups
        self.backend = backend
        self.dtype = dtype
        self.recompute = config.training.recompute
        self.megatron = megatron_config(groups.layout, dtype)
        self.init = Initializer(config.seed)

    def embedding(self, vocab_size: int) -> Embedding:
        model, std = self.config.model, self.config.model.init_std
        learned = model.positions == "learned" and self.groups.is_first_stage
        return Embedding(
            vocab_size,
            model.hidden_size,
            dtype=self.dtype,
            init=self.init.normal("embedding", std),
            length=model.sequence_length,
            # A tied embedding is on the last stage as well, and adds nothing there.
            positions_init=self.init.normal("embedding.positions", std) if learned else None,
            dropout=self.dropout(),
            config=self.megatron,
            group=self.groups.tensor,
            sequence_parallel=self.groups.layout.sequence_parallel,
        )

    def norm(self) -> Norm:
        return Norm(
            self.config.model.norm,
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
            rope_base=model.rope_base if model.positions == "rotary" else None,
            causal=model.causal,
            keys_and_values=self.config.attention.keys_and_values,
            bias=model.bias,
            backend=self.backend,
            config=self.megatron,
            qkv_init=self.init.normal(f"{name}.qkv", model.init_std),
            output_init=self.init.normal(f"{name}.output", self._output_std()),
            group=self._expert_group(self.config.attention, layer),
            dropout=model.attention_dropout,
            recompute=self.recompute == "selective",
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
            fc2_init=self.init.normal(f"{name}.fc2", self._expert_output_std(layer)),
            group=self._expert_group(self.config.feed_forward, layer),
            recompute=self.recompute == "selective",
        )
        return self._block(experts, num_experts, layer, "feed_forward")

    def head(self, vocab_size: int, used_vocab_size: int) -> VocabularyHead | ClassHead:
        model, init = self.config.model, self.init.normal("head", self.config.model.init_std)
        if model.num_classes is not None:
            return ClassHead(
                model.hidden_size,
                model.num_classes,
                dtype=self.dtype,
                init=init,
                group=self.groups.tensor,
                sequence_parallel=self.groups.layout.sequence_parallel,
            )
        return VocabularyHead(
            model.hidden_size,
            vocab_size,
            used_vocab_size,
            tied=model.tie_embeddings,
            config=self.megatron,
            init=init,
            group=self.groups.tensor,
        )

    def _block(self, experts: nn.Module, num_experts: int, layer: int, kind: str) -> DenseBlock:
        routing = self.config.attention if kind == "attention" else self.config.feed_forward
        tensor, sequence_parallel = self.groups.tensor, self.groups.layout.sequence_parallel
        if not routing.routes(layer):
            return DenseBlock(experts, group=tensor, sequence_parallel=sequence_parallel)
        expert_group = self._expert_group(routing, layer)
        if expert_group.size() > tensor.size():
            for param in experts.parameters():
                if partition_dim(param) is not None:
                    mark_wide(param, expert_group)
        router = Router(
            routing,
            num_experts=num_experts,
            context=self.config.model.sequence_length,
            causal=self.config.model.causal,
        )
        router_std = self.config.model.router_init_std
        return RoutedBlock(
            experts,
            routing,
            router,
            hidden_size=self.config.model.hidden_size,
            dtype=self.dtype,
            router_init=lambda name: self.init.normal(f"layers.{layer}.{kind}.{name}", router_std),
            loss_weight_per_sequence=self.groups.layout.data
            / self.config.training.global_batch_size,
            group=tensor,
            expert_group=expert_group,
            data_group=self.groups.data,
            sequence_parallel=sequence_parallel,
            recompute=self.recompute == "selective",
        )

    def _expert_group(self, routing: RoutingConfig, layer: int) -> ProcessGroup:
        """The ranks that share a block's experts; a dense block is cut like Megatron's."""
        wide = routing.spread == "expert" and routing.routes(layer)
        return self.groups.expert if wide else self.groups.tensor

    def _expert_output_std(self, layer: int) -> float:
        routing = self.config.feed_forward
        if not routing.routes(layer) or routing.initialization == "slices":
            return self._output_std()
        # A block as narrow as an expert would begin with sqrt(num_experts) times the deviation; a
        # mixture's gates sum to one, and those here to the number of chosen experts.
        return self._output_std() * routing.num_experts**0.5 / routing.chosen_experts

    def _output_std(self) -> float:
        # Residual branches start smaller the more of them add up (GPT-2).
        return self.config.model.init_std / (2 * self.config.model.num_layers) ** 0.5
