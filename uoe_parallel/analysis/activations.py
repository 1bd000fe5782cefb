"""What the passes of a stage keep of a micro-batch, and what they need on top of it.

A stage is a row of parts: the embedding, each block with its norm and its residual sum, the head.
Forward passes go through it from the first part to the last and keep bytes; backward passes come
back and let go of them. Followed are the tensors of a token's or a pair's width and those of a
router; what is smaller, such as a value per document, is left out.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from uoe_parallel.analysis.parts import Bytes, Part, Point, StagePart, joined, stacked
from uoe_parallel.analysis.work import BlockWork, Workload
from uoe_parallel.config.schema import RunConfig
from uoe_parallel.experts.attention import SelectiveMultiHeadAttention
from uoe_parallel.experts.backends import CHUNK_BYTES
from uoe_parallel.experts.mlp import UnionOfMLPExperts
from uoe_parallel.model.block import DenseBlock, RoutedBlock
from uoe_parallel.model.heads import VocabularyHead
from uoe_parallel.model.language_model import LanguageModel, TransformerBlock
from uoe_parallel.parallel.device import DTYPES

_INDEX = 8  # bytes of an int64


def padded_rows(lengths: Sequence[int]) -> int:
    """Rows of runs of these lengths as `experts.padded` lays them out on a CPU."""
    size_G = torch.tensor(lengths, dtype=torch.int64).clamp(min=1)
    class_G = (size_G.double().log2() + 0.5).ceil()
    return sum(
        int((class_G == number).sum()) * int(size_G[class_G == number].max())
        for number in class_G.unique()
    )


@dataclass(frozen=True)
class _Attention:
    """Bytes of attention to selected or to all keys."""

    kept: int
    keys: int
    """Kept of keys and values as they were projected."""
    rows: int
    """Of all tokens, that keys and values are projected from."""
    forward: int
    backward: int


class Activations:
    """Of one micro-batch in a rank's stage, on a CPU or on CUDA, whose kernels differ."""

    def __init__(
        self, model: LanguageModel, config: RunConfig, work: Workload, *, on_cuda: bool
    ) -> None:
        dtype = DTYPES[config.training.precision]
        self.model = model
        self.config = config
        self.work = work
        self.on_cuda = on_cuda
        self.element = dtype.itemsize
        self.precise = torch.promote_types(dtype, torch.float32).itemsize
        self.tokens = config.training.micro_batch_size * config.model.sequence_length
        self.own_tokens = self.tokens // model.num_shards
        self.width = config.model.hidden_size
        self.recompute = config.training.recompute
        self.has_fused_norm = on_cuda or config.model.norm == "layer_norm"  # torch's RMSNorm is not

    @property
    def row(self) -> int:
        """Bytes of a token's hidden state."""
        return self.width * self.element

    @property
    def shard(self) -> int:
        """Of the hidden states that lie on this rank between blocks."""
        return self.own_tokens * self.row

    def stage(self) -> StagePart:
        """All of it."""
        stage = stacked(list(self._parts()))
        model = self.model
        if not (model.tied and model.embedding is not None and model.groups.is_last_stage):
            return stage
        # The head's gradient of a tied weight waits for the embedding's to be added.
        tied = self.element * model.embedding.tokens.weight.numel()
        held = stage.points.held + Bytes(working=tied).numbers
        return replace(stage, points=replace(stage.points, held=held))

    def _parts(self) -> Iterator[Part]:
        yield self._entry()
        found: dict[tuple[Hashable, ...], Part] = {}
        for number, layer in self.model.layers.items():
            assert isinstance(layer, TransformerBlock)
            # Layers with the same work are alike but for which kinds of blocks they have.
            kind = *map(type, layer.children()), *map(id, self._work_of(number))
            if kind not in found:
                found[kind] = self._layer(layer, self._work_of(number))
            yield found[kind]
        if self.model.groups.is_last_stage:
            yield self._head()

    def _work_of(self, number: str) -> list[BlockWork | None]:
        """Of a layer's blocks, None of dense ones."""
        kinds = "attention", "feed_forward"
        return [self.work.get(f"layers.{number}.{kind}") for kind in kinds]

    def _layer(self, layer: TransformerBlock, work: Sequence[BlockWork | None]) -> Part:
        blocks = layer.attention, layer.feed_forward
        norms = layer.attention_norm, layer.feed_forward_norm
        part = joined(
            [
                self._with_norm(self._block(block, of_block), list(norm.parameters()))
                for block, of_block, norm in zip(blocks, work, norms, strict=True)
            ]
        )
        if self.recompute != "full":
            return part
        return self._recomputed(part, Bytes(self.shard), Bytes(working=self.shard))

    def _entry(self) -> Part:
        """What the layers start from: embedded or received."""
        held = Bytes(activations=self.shard)
        params = () if self.model.embedding is None else tuple(self.model.embedding.parameters())
        if not self.model.groups.is_first_stage:
            return Part(held, held, [], params)
        point = Point(held + Bytes(working=2 * self.shard), making=params)
        return Part(held, held + Bytes(working=self.tokens * self.row), [point], params)

    def _recomputed(self, part: Part, kept: Bytes, beside: Bytes) -> Part:
        """One whose first pass keeps `kept` alone, and whose second comes in backward. `beside`: in
        backward."""
        held = kept + beside
        points = [replace(p, held=p.held + held) for p in part.points]
        return Part(kept, part.forward, [Point(part.forward + held), *points], part.params)

    def _with_norm(self, block: Part, norm: Sequence[nn.Parameter]) -> Part:
        """A block between its norm and its residual sum."""
        tokens, width = self.own_tokens, self.width
        dropped = tokens * width * (1 if self.on_cuda else self.element)
        dropped = dropped if self.config.model.dropout > 0 else 0
        normed = self._norm_kept()
        working = Bytes(working=self.shard) + self._norm_backward()
        before = Part(normed, normed + working, [Point(normed + working, norm)], norm)
        result = Bytes(activations=self.shard + dropped)
        after = Part(result, result)
        # The sum comes after all of the block, and its gradient before and beside.
        carried = Bytes(working=self.shard)
        points = [replace(p, held=p.held + carried) for p in block.points]
        return joined([before, replace(block, points=points), after])

    def _norm_kept(self) -> Bytes:
        """Beside a norm's input and result: a factor for each token and a LayerNorm's mean; of an
        RMSNorm on a CPU the product without the weight and, if that is more precise than the input,
        the input like it."""
        numbers = 2 if self.config.model.norm == "layer_norm" else 1
        copies = 0 if self.has_fused_norm else 1 if self.precise == self.element else 2
        return Bytes(activations=self.own_tokens * self.precise * (numbers + copies * self.width))

    def _norm_backward(self) -> Bytes:
        """What a norm's gradient takes: without a kernel of its own it is that of one operation
        after the other, each with a result."""
        tensors = 2 if self.has_fused_norm else 5
        return Bytes(working=tensors * self.own_tokens * self.width * self.precise)

    def _block(self, block: DenseBlock, work: BlockWork | None) -> Part:
        """With what it keeps of its input."""
        experts = block.experts
        if isinstance(block, RoutedBlock):
            assert work is not None
            return self._routed(block, work)
        part = (
            self._dense_feed_forward(experts)
            if isinstance(experts, UnionOfMLPExperts)
            else self._dense_attention(experts)
        )
        # Of sharded tokens the linear keeps its own shard, and gathers the others again.
        own = Part(Bytes(activations=self.shard), Bytes(activations=self.shard))
        return joined([own, part])

    def _dense_feed_forward(self, experts: UnionOfMLPExperts) -> Part:
        active = self.tokens * experts.fc2.input_size_per_partition * self.element
        hidden = active * (2 if experts.gated else 1)
        kept = hidden if self.recompute == "selective" else 2 * hidden
        whole = self.tokens * self.row
        fc1, fc2 = list(experts.fc1.parameters()), list(experts.fc2.parameters())
        act = 3 if experts.gated else 2
        if self.recompute == "selective":  # its result, and that of the pass before
            act += 2
        inner = hidden + active * (2 if experts.gated else 1)
        points = [
            Point(_held(inner, whole + active), fc2),
            Point(_held(inner - active, act * active), (), fc2),
            Point(_held(0, hidden + 2 * whole), fc1, fc2),
        ]
        return Part(_held(kept, 0), _held(inner, whole + active), points, (*fc1, *fc2))

    def _dense_attention(self, experts: nn.Module) -> Part:
        assert isinstance(experts, SelectiveMultiHeadAttention)
        queries = self.tokens * experts.output.input_size_per_partition * self.element
        projected = self.tokens * experts.qkv.output_size_per_partition * self.element
        heads = experts.output.input_size_per_partition // experts.head_width
        sums = self.tokens * heads * self.precise
        inner = projected + 2 * queries + sums
        kept = projected + queries if self.recompute == "selective" else inner
        again = projected if self.recompute == "selective" else 0
        whole = self.tokens * self.row
        qkv, output = list(experts.qkv.parameters()), list(experts.output.parameters())
        inner += again
        points = [
            Point(_held(kept, whole + queries), output),
            Point(_held(inner, 5 * queries), (), output),
            Point(_held(again, 3 * projected), (), output),
            Point(_held(0, projected + 2 * whole), qkv, output),
        ]
        return Part(_held(kept, 0), _held(inner, projected + whole), points, (*qkv, *output))

    def _routed(self, block: RoutedBlock, work: BlockWork) -> Part:
        """Router, dispatch, experts and combine."""
        experts = block.experts
        arithmetic = (
            self._feed_forward(experts, work)
            if isinstance(experts, UnionOfMLPExperts)
            else self._attention(experts, work)
        )
        rows = work.rows * self.row
        keeps_rows = self.recompute == "selective" or isinstance(
            experts, SelectiveMultiHeadAttention
        )
        if block.spreads_tokens:  # what was exchanged is there until the block is done
            passing = work.sent_rows * self.row + (0 if keeps_rows else rows)
            forward = arithmetic.forward + Bytes(dispatch=passing)
            arithmetic = replace(arithmetic, forward=forward)
        if self.recompute == "selective":  # with the result and its gradient
            arithmetic = self._recomputed(arithmetic, Bytes(), Bytes(working=2 * rows))
        return joined([self._router(block), *self._dispatch(block, work, keeps_rows), arithmetic])

    def _router(self, block: RoutedBlock) -> Part:
        """Its input, scores, gates and probabilities of each level."""
        pairs = self.own_tokens * block.router.num_experts
        levels = len(block.router.levels)
        kept = self.own_tokens * self.width * self.precise
        kept += levels * (4 * pairs * self.precise + pairs + self.own_tokens * self.precise)
        weights = [block.get_parameter(name) for name in block.router.levels]
        working = Bytes(working=2 * self.own_tokens * self.width * self.precise)
        held = Bytes(activations=kept)
        return Part(
            held,
            held + Bytes(working=3 * pairs * self.precise),
            [Point(held + working, weights)],
            weights,
        )

    def _dispatch(self, block: RoutedBlock, work: BlockWork, keeps_rows: bool) -> list[Part]:
        """Rows to where the experts are, and their sums back."""
        pairs, rows = work.pairs, work.rows * self.row
        indices = _INDEX * (3 * pairs + work.rows) + self.precise * pairs
        if not block.spreads_tokens:
            # Hidden states that nothing else keeps.
            own = rows if keeps_rows and self.precise != self.element else 0
            held = Bytes(activations=indices + own)
            back = Bytes(working=2 * rows)
            return [Part(held, held + back, [Point(held + back)])]
        sent = work.sent_rows * self.row
        indices += _INDEX * (2 * work.sent_rows + 2 * work.sent_pairs + pairs)
        held = Bytes(indices, rows if keeps_rows else 0)
        travelling = Bytes(dispatch=sent + rows)
        return [Part(held, held + travelling + Bytes(dispatch=rows), [Point(held + travelling)])]

    def _chunk(self, work: BlockWork, experts: int) -> int:
        """Bytes of pairs' results that wait to be summed."""
        result = work.pairs * self.row
        if self.on_cuda or result <= CHUNK_BYTES:
            return result
        runs = len(work.run_lengths) // experts
        lengths = work.run_lengths
        counts = [sum(lengths[i : i + runs]) for i in range(0, len(lengths), runs)]
        return max(CHUNK_BYTES, max(counts) * self.row)

    def _feed_forward(self, experts: UnionOfMLPExperts, work: BlockWork) -> Part:
        active = work.pairs * experts.expert_width * self.element
        hidden = active * (2 if experts.gated else 1)
        copies, rows = work.pairs * self.row, work.rows * self.row
        kept = copies + hidden + active
        chunk = self._chunk(work, experts.fc1.num_local_slices)
        fc1, fc2 = list(experts.fc1.parameters()), list(experts.fc2.parameters())
        points = [
            Point(_held(kept, rows + chunk + 2 * active), fc2),
            Point(_held(copies + hidden, (6 if experts.gated else 3) * active), (), fc2),
            Point(_held(copies, hidden), fc1, fc2),
            Point(_held(0, copies + rows), (), (*fc1, *fc2)),
        ]
        return Part(_held(kept, 0), _held(kept, rows + chunk), points, (*fc1, *fc2))

    def _attention(self, experts: nn.Module, work: BlockWork) -> Part:
        assert isinstance(experts, SelectiveMultiHeadAttention)
        wide, rows = experts.head_width * self.element, work.rows * self.row
        queries = work.pairs * experts.queries_per_expert * wide
        projected = queries + (0 if experts.needs_all_rows else 2 * work.pairs * wide)
        copies = work.pairs * self.row
        chunk = self._chunk(work, experts.qkv.num_local_slices)
        qkv, output = list(experts.qkv.parameters()), list(experts.output.parameters())
        attention = self._attend(experts, work)
        # Queries' part of the weight has a gradient of the size of the whole one.
        others = self.element * sum(p.numel() for p in qkv) if experts.needs_all_rows else 0
        gated = Part(_held(2 * queries, 0), _held(2 * queries, rows + chunk))
        keys = attention.keys + (attention.rows if experts.needs_all_rows else 0)
        inner = attention.kept + keys
        kept = inner + 2 * queries
        points = [
            Point(_held(kept, rows + chunk + 2 * queries), output),
            Point(_held(kept, 3 * queries), (), output),
            Point(_held(kept - queries, queries + attention.backward), (), output),
            Point(_held(keys, 3 * projected), (), output),
            Point(_held(keys, projected + copies + others), qkv, output),
            Point(_held(0, copies + rows + keys), (), (*qkv, *output)),
        ]
        forward = max(copies + 2 * projected, inner + attention.forward, kept + rows + chunk)
        return Part(gated.kept + _held(inner, 0), _held(0, forward), points, (*qkv, *output))

    def _attend(self, experts: SelectiveMultiHeadAttention, work: BlockWork) -> _Attention:
        """From rotated queries, keys and values to what queries attend to."""
        number, wide = experts.queries_per_expert, experts.head_width * self.element
        runs, pairs, dropout = work.run_lengths, work.pairs, self.config.model.attention_dropout
        queries = pairs * number * wide
        every = experts.needs_all_rows
        key_runs = [work.rows * experts.qkv.num_local_slices // len(runs)] * len(runs)
        keys = sum(key_runs) if every else pairs
        # Of all tokens' keys and values, their rows, gathered from whole sequences.
        rows = work.rows * self.row
        if self.on_cuda and dropout == 0 and not (experts.causal and every):
            kept = (0 if every else 2 * keys * wide) + queries + pairs * number * self.precise
            # Gradients of keys and values come for each query head.
            backward = 3 * queries + 2 * (number + 1) * keys * wide
            return _Attention(kept, 2 * keys * wide if every else 0, rows, 0, backward)
        if experts.causal and not every and dropout == 0:
            padded = padded_rows(runs)
            places, sums = padded * (number + 2) * wide, padded * number * self.precise
            backward = 5 * padded * number * wide + places
            return _Attention(places + sums + 2 * _INDEX * pairs, 0, 0, 0, backward)
        longest = max(1, *runs)
        padded = len(runs) * longest if every else padded_rows(runs)
        padded_keys = sum(key_runs) if every else padded
        places = padded * number * wide
        mask = padded * max(key_runs) * self.element if every and experts.causal else 0
        kept = queries + 2 * places + 2 * padded_keys * wide + mask
        kept += padded * number * self.precise + _INDEX * (2 * pairs + keys)
        backward = 3 * places + 2 * number * padded_keys * wide
        return _Attention(kept, 2 * keys * wide, rows, mask // self.element, backward)

    def _head(self) -> Part:
        head, norm = self.model.head, self.model.final_norm
        assert head is not None and norm is not None
        own = Bytes(activations=self.shard) + self._norm_kept()
        of_norm = Point(own + self._norm_backward(), list(norm.parameters()), [*head.parameters()])
        if not isinstance(head, VocabularyHead):
            return Part(own, own, [of_norm], [*norm.parameters(), *head.parameters()])
        size = self.tokens * head.logits.output_size_per_partition
        logits = size * self.precise
        cast = size * self.element if self.element != self.precise else 0
        held = own + Bytes(activations=logits)
        back = Bytes(working=cast + self.tokens * self.row)
        own_params = list(head.parameters())
        params = [*norm.parameters(), *own_params]
        points = [Point(held + back, own_params), of_norm]
        return Part(held, held + Bytes(working=cast), points, params)


def _held(kept: int, working: int) -> Bytes:
    return Bytes(activations=kept, working=working)
