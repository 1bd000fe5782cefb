"""Floating-point operations, computed and not run: two for a multiply-add of a matrix product.

Other arithmetic counts for nothing, as in torch's flop counter, which sees these very numbers in a
real run (`flop_counter`).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from uoe_parallel.analysis.transfer import Phase
from uoe_parallel.analysis.work import BlockWork, Workload
from uoe_parallel.config.schema import RoutingConfig, RunConfig
from uoe_parallel.experts.attention import SelectiveMultiHeadAttention
from uoe_parallel.experts.documents import Documents
from uoe_parallel.experts.mlp import UnionOfMLPExperts
from uoe_parallel.experts.padded import causal_pieces, length_classes
from uoe_parallel.model.block import DenseBlock, RoutedBlock
from uoe_parallel.model.context import Context, micro_batch_context
from uoe_parallel.model.heads import VocabularyHead
from uoe_parallel.model.language_model import LanguageModel, TransformerBlock
from uoe_parallel.model.stages import active_share
from uoe_parallel.routing.level import Level

SCORES_FORWARD = 2
"""Products of queries x keys x width in attention's forward pass: scores, and weighted values."""
SCORES_BACKWARD = 5
"""The same in the backward pass of a fused kernel: the scores once more, and a gradient for each
factor of both products."""


@dataclass(frozen=True)
class Computation:
    """What a rank multiplies for one purpose in one phase of a micro-batch."""

    purpose: str
    """One of "attention projections", "attention" (scores and weighted values), "experts"
    (feed-forward, dense or routed), "routers", "routing statistics", "head"."""
    phase: Phase
    flops: int


def micro_batch_flops(
    model: LanguageModel,
    config: RunConfig,
    work: Workload,
    context: Context | None = None,
    *,
    pads: bool = True,
) -> list[Computation]:
    """Of one micro-batch's forward and backward pass through this rank's stage, on meta too.

    context: the documents of the micro-batch, on the CPU; None for sequences of one each. pads:
    whether attention is computed as on a CPU, over runs padded to one length and, if causal, cut
    into pieces; otherwise over each run as it is, as by CUDA's half-precision kernels wherever they
    can.
    """
    context = context or _whole_sequences(model, config)
    sums: dict[tuple[str, Phase], int] = defaultdict(int)
    for computation in _Passes(model, config, context, pads).all(work):
        sums[computation.purpose, computation.phase] += computation.flops
    return [Computation(purpose, phase, flops) for (purpose, phase), flops in sums.items()]


def _whole_sequences(model: LanguageModel, config: RunConfig) -> Context:
    shape = config.training.micro_batch_size, config.model.sequence_length
    context = micro_batch_context(shape, None, model.groups, torch.device("cpu"))
    own, group = (
        replace(documents, one_each=not config.has_documents)
        for documents in (context.documents, context.expert_group)
    )
    return Context(own, group)


@dataclass(frozen=True)
class ModelFlops:
    """Forward and backward pass of the whole model, per token of a full sequence of one document,
    two for a multiply-add."""

    routed: float
    """As it is, where every expert is chosen as often as any other."""
    dense_twin: float
    """Were no block routed."""


def model_flops_per_token(config: RunConfig, vocab_size: int) -> ModelFlops:
    """What the model needs, whatever the layout, and no more: nothing recomputed, no padding, no
    statistics.

    vocab_size: padded, as `LanguageModel` takes it. Attention counts as in `flop_counter`: whole
    rectangles of queries and keys, causal or not, and five products backward for two forward.
    """
    model, layers = config.model, range(config.model.num_layers)
    outputs = vocab_size
    if model.num_classes is not None:
        outputs = model.num_classes / model.sequence_length
    head = 3 * 2 * model.hidden_size * outputs
    return ModelFlops(
        routed=head + sum(_layer(config, n).flops for n in layers),
        dense_twin=head + sum(_layer(_dense_twin(config), n).flops for n in layers),
    )


@dataclass(frozen=True)
class ParameterCounts:
    """Of the whole model, a tied embedding counted once."""

    total: int
    active: int
    """That a token's pass touches on average: experts' weights and biases by the share of experts
    that it visits, all others whole, also the embedding."""


def parameter_counts(config: RunConfig, vocab_size: int) -> ParameterCounts:
    """vocab_size: padded, as `LanguageModel` takes it."""
    model = config.model
    untied_head = model.num_classes is None and not model.tie_embeddings
    vectors = (1 + untied_head) * vocab_size
    vectors += model.sequence_length if model.positions == "learned" else 0
    rest = vectors * model.hidden_size + _norm(config)
    if model.num_classes is not None:
        rest += model.num_classes * (model.hidden_size + 1)
    layers = [_layer(config, number) for number in range(model.num_layers)]
    twin = _layer(_dense_twin(config), 0)
    total = rest + sum(twin.active + layer.routers for layer in layers)
    active = rest + sum(layer.active + layer.routers for layer in layers)
    return ParameterCounts(round(total), round(active))


def _dense_twin(config: RunConfig) -> RunConfig:
    none = {"routed_layers": "none"}
    return config.model_copy(
        update={
            "attention": config.attention.model_copy(update=none),
            "feed_forward": config.feed_forward.model_copy(update=none),
        }
    )


@dataclass(frozen=True)
class _Layer:
    """Of one token, on average."""

    active: float
    """Parameters that its pass touches, but for routers."""
    routers: int
    """Parameters of these."""
    flops: float
    """Forward and backward."""


def _layer(config: RunConfig, number: int) -> _Layer:
    model, attention, mlp = config.model, config.attention, config.feed_forward
    hidden, bias = model.hidden_size, int(model.bias)
    kinds = [(attention, model.kv_heads), (mlp, mlp.num_experts)]
    queries, experts = (active_share(routing, number, count) for routing, count in kinds)
    selects = attention.routes(number) and attention.keys_and_values == "selected"
    keys = queries if selects else 1.0
    # Columns of a query, a key and a value, and of what goes into the activation.
    columns = queries * hidden + keys * 2 * hidden * model.kv_heads / model.num_heads
    inner = experts * model.ffn_size * (2 if model.activation == "swiglu" else 1)
    weights = hidden * (columns + queries * hidden + inner + experts * model.ffn_size)
    biases = bias * (columns + inner + 2 * hidden)
    routers = [_router(config, r, count) for r, count in kinds if r.routes(number)]
    pairs = _overlap(attention, model.kv_heads) if selects else queries
    scores = 2 * hidden * model.sequence_length * pairs
    return _Layer(
        active=weights + biases + 2 * _norm(config),
        routers=sum(parameters for parameters, _ in routers),
        flops=3 * 2 * weights
        + (SCORES_FORWARD + SCORES_BACKWARD) * scores
        + 3 * 2 * sum(judged for _, judged in routers),
    )


def _norm(config: RunConfig) -> int:
    """Parameters of one."""
    return config.model.hidden_size * (2 if config.model.norm == "layer_norm" else 1)


def _overlap(routing: RoutingConfig, experts: int) -> float:
    """The share of a sequence's pairs of tokens that both visit an expert, on average over them."""
    routed = experts - routing.shared_experts
    return (routing.shared_experts + routed * (routing.chosen_experts / routed) ** 2) / experts


def _router(config: RunConfig, routing: RoutingConfig, experts: int) -> tuple[int, float]:
    """Parameters of a block's routers, and of these those that a token is multiplied by."""
    each = (experts - routing.shared_experts) * config.model.hidden_size
    length, judged = config.model.sequence_length, 0.0
    for level in routing.levels:
        firsts = level == "patches" and config.model.causal and not config.has_documents
        judged += -(-length // routing.patch_length) / length if firsts else 1.0
    return each * len(routing.levels), each * judged


class _Passes:
    """Forward and backward pass of one micro-batch through a stage."""

    def __init__(
        self, model: LanguageModel, config: RunConfig, context: Context, pads: bool
    ) -> None:
        self.model = model
        self.context = context
        self.causal = config.model.causal
        self.dropout = config.model.attention_dropout > 0
        self.width = config.model.hidden_size
        self.recompute = config.training.recompute
        self.length, self.sequences = context.documents.shape
        self.pads = pads

    @property
    def tokens(self) -> int:
        """Of this rank's sequences, whichever part of them it holds between blocks."""
        return self.length * self.sequences

    def all(self, work: Workload) -> Iterator[Computation]:
        alike: dict[tuple[str, int], list[tuple[DenseBlock, BlockWork | None]]] = defaultdict(list)
        for number, layer in self.model.layers.items():
            assert isinstance(layer, TransformerBlock)
            for kind, block in (
                ("attention", layer.attention),
                ("feed_forward", layer.feed_forward),
            ):
                # Blocks of a kind with one and the same work, or none, multiply alike.
                of_block = work.get(f"layers.{number}.{kind}")
                alike[kind, id(of_block)].append((block, of_block))
        for blocks in alike.values():
            for computation in self._block(*blocks[0]):
                yield replace(computation, flops=computation.flops * len(blocks))
        yield from self._head()

    def _block(self, block: DenseBlock, work: BlockWork | None) -> Iterator[Computation]:
        if isinstance(block, RoutedBlock):
            assert work is not None
            yield from self._routers(block)
            yield from self._routed(block, work)
        else:
            yield from self._dense(block)

    def _products(self, purpose: str, flops: int, *, again: bool) -> Iterator[Computation]:
        """Of a matrix product, whose backward pass has one for the gradient of each factor."""
        return self._phases(purpose, flops, 2 * flops, again=again)

    @staticmethod
    def _phases(purpose: str, forward: int, backward: int, *, again: bool) -> Iterator[Computation]:
        yield Computation(purpose, "forward", forward)
        if again:
            yield Computation(purpose, "recompute", forward)
        yield Computation(purpose, "backward", backward)

    def _routers(self, block: RoutedBlock) -> Iterator[Computation]:
        length, full = self.length // block.num_shards, self.recompute == "full"
        for level in block.router.levels.values():
            rows = self.sequences * self._judged(level, length)
            flops = 2 * rows * self.width * block.router.num_routed
            yield from self._products("routers", flops, again=full)
        # Which experts go together, of the pass that has gradients.
        flops = 2 * length * self.sequences * block.router.num_routed**2
        yield Computation("routing statistics", "recompute" if full else "forward", flops)

    def _judged(self, level: Level, length: int) -> int:
        """Of a rank's `length` tokens of a sequence, those that get scores of their own."""
        documents = self.context.documents
        firsts = level.summary == "first" and documents.one_each
        whole = length == self.length
        if firsts and (whole or level.scores_lie_within(level.units(documents), length)):
            return -(-length // level.unit_length)
        return length

    def _routed(self, block: RoutedBlock, work: BlockWork) -> Iterator[Computation]:
        again, experts, pairs = self.recompute != "none", block.experts, work.pairs
        if isinstance(experts, UnionOfMLPExperts):
            matrices = 3 if experts.gated else 2
            flops = 2 * pairs * self.width * experts.expert_width * matrices
            yield from self._products("experts", flops, again=again)
            return
        assert isinstance(experts, SelectiveMultiHeadAttention)
        is_wide = block.expert_group.size() > block.group.size()
        documents = self.context.expert_group if is_wide else self.context.documents
        lengths_G, keys_G = torch.tensor(work.run_lengths), None
        keys = pairs
        if experts.needs_all_rows:
            keys_G = _all_of(documents, experts)
            keys = int(keys_G.sum())
        queries = experts.queries_per_expert
        flops = 2 * self.width * experts.head_width * (2 * queries * pairs + 2 * keys)
        yield from self._products("attention projections", flops, again=again)
        yield from self._attention(experts, self._scores(lengths_G, keys_G), again=again)

    def _dense(self, block: DenseBlock) -> Iterator[Computation]:
        experts, full = block.experts, self.recompute == "full"
        rows = 2 * self.tokens * self.width
        if isinstance(experts, UnionOfMLPExperts):
            columns = experts.fc1.output_size_per_partition + experts.fc2.input_size_per_partition
            yield from self._products("experts", rows * columns, again=full)
            return
        assert isinstance(experts, SelectiveMultiHeadAttention)
        columns = experts.qkv.output_size_per_partition + experts.output.input_size_per_partition
        yield from self._products("attention projections", rows * columns, again=full)
        documents = self.context.documents
        if documents.one_each:
            scores = self.tokens * self.length * experts.qkv.num_local_slices
        else:
            scores = self._scores(_all_of(documents, experts), None)
        yield from self._attention(experts, scores, again=self.recompute != "none")

    def _attention(
        self, experts: SelectiveMultiHeadAttention, scores: int, *, again: bool
    ) -> Iterator[Computation]:
        """scores: of a query head of each expert together."""
        product = 2 * scores * experts.queries_per_expert * experts.head_width
        # With dropout a CPU has no fused kernel, and keeps the scores.
        backward = SCORES_BACKWARD - (1 if self.dropout and self.pads else 0)
        yield from self._phases(
            "attention", SCORES_FORWARD * product, backward * product, again=again
        )

    def _scores(self, lengths_G: Tensor, keys_G: Tensor | None) -> int:
        return attention_scores(
            lengths_G, keys_G, causal=self.causal, dropout=self.dropout, pads=self.pads
        )

    def _head(self) -> Iterator[Computation]:
        head = self.model.head
        if isinstance(head, VocabularyHead):
            flops = 2 * self.tokens * self.width * head.logits.output_size_per_partition
        elif head is not None:
            flops = 2 * self.sequences * self.width * len(head.bias)
        else:
            return
        yield from self._products("head", flops, again=False)


def attention_scores(
    lengths_G: Tensor, keys_G: Tensor | None, *, causal: bool, dropout: bool, pads: bool
) -> int:
    """Scores of one head that a backend computes for runs of queries, also those that it masks.

    lengths_G: int64 queries of each run. keys_G: int64 keys of each, None where these are the
    queries' rows. pads: as in `micro_batch_flops`.
    """
    if lengths_G.numel() == 0:
        return 0
    plain = causal and keys_G is None and not dropout
    of_keys_G = lengths_G if keys_G is None else keys_G
    if pads:
        return _in_pieces(lengths_G) if plain and lengths_G.any() else _padded(lengths_G, of_keys_G)
    # What half-precision kernels leave to padded ones is theirs.
    leaves = dropout or (causal and keys_G is not None)
    return _padded(lengths_G, of_keys_G) if leaves else int((lengths_G * of_keys_G).sum())


def _all_of(documents: Documents, experts: SelectiveMultiHeadAttention) -> Tensor:
    """Tokens of each document, for each expert of this rank."""
    return documents.real_tokens[1].repeat(experts.qkv.num_local_slices)


def _in_pieces(lengths_G: Tensor) -> int:
    _, lengths_C = length_classes(lengths_G, lengths_G)
    return sum(
        runs.stop * (later.stop - later.start) * (seen.stop - seen.start)
        for runs_G in lengths_C
        for runs, later, seen, _ in causal_pieces(runs_G)
    )


def _padded(lengths_G: Tensor, keys_G: Tensor) -> int:
    size_G = torch.maximum(lengths_G, keys_G)
    classes = zip(
        length_classes(lengths_G, size_G)[1], length_classes(keys_G, size_G)[1], strict=True
    )
    return sum(
        len(queries_G) * max(1, int(queries_G.max())) * max(1, int(others_G.max()))
        for queries_G, others_G in classes
    )
