"""What a rank sends in one optimizer step: every collective, by purpose, computed and not run.

Counted is `Trainer.train_step` of a run that is under way: the check of token ids, forward and
backward passes, pipeline, gradients, their norm, weights. Left out are what DeepSpeed says more in
its first two steps (shapes to the next stage; under ZeRO 3, the order of modules); reports,
validation, checkpoints and recorded routes; and groups of one rank, which send nothing. Numbers of
calls and bytes are those that `observe.CollectiveObserver` sees in a real run, but for what
`reduction` states.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain, groupby

import torch

from uoe_parallel.analysis.exchange import ExchangeSizes
from uoe_parallel.analysis.reduction import gradient_traffic
from uoe_parallel.analysis.states import StateRules
from uoe_parallel.analysis.transfer import Transfer, group_sizes, merged, times
from uoe_parallel.config.schema import RunConfig
from uoe_parallel.experts.documents import Documents
from uoe_parallel.model.block import DenseBlock, RoutedBlock, Union
from uoe_parallel.model.heads import VocabularyHead
from uoe_parallel.model.language_model import LanguageModel, TransformerBlock
from uoe_parallel.parallel.device import DTYPES
from uoe_parallel.parallel.layout import ParallelLayout
from uoe_parallel.parallel.purposes import Phase, Purpose
from uoe_parallel.routing.level import Level

Exchanges = Mapping[str, Sequence[ExchangeSizes]]
"""By the name of each routed block that spreads its tokens: the sizes of its exchange in every
micro-batch of the step."""

_COUNT = 8  # bytes of an int64, and of an fp64


def step_traffic(
    model: LanguageModel,
    config: RunConfig,
    exchanges: Exchanges,
    rules: StateRules | None = None,
) -> list[Transfer]:
    """What this rank sends in one step of training `model`, its stage: as it is before DeepSpeed
    gets it, on meta too. rules: of the same, if they are known."""
    number = micro_batches(config, model.groups.layout)
    passes = _Passes(model, config)
    transfers = chain(
        _bookkeeping(),
        times(chain(passes.fixed(), _between_stages(model, passes)), number),
        _pipeline_loss(model, passes),
        passes.exchanged(exchanges, number),
        _moved_rules(model),
        gradient_traffic(rules or StateRules(model, config), number),
    )
    sizes = group_sizes(model.groups)
    return merged(t for t in transfers if sizes[t.group] > 1)


def micro_batches(config: RunConfig, layout: ParallelLayout) -> int:
    """Micro-batches of a data-parallel rank in a step."""
    training = config.training
    return training.global_batch_size // (training.micro_batch_size * layout.data)


def blocks_that_exchange(model: LanguageModel) -> dict[str, RoutedBlock]:
    """The routed blocks of this stage whose rows travel, by name."""
    blocks = model.routed_blocks().items()
    return {
        name: block
        for name, block in blocks
        if block.spreads_tokens and block.expert_group.size() > 1 and not _gathers(block)
    }


def exchange_traffic(
    sizes: ExchangeSizes, group: str, rank: int, row: int, gate: int
) -> Iterator[Transfer]:
    """Of one exchange, of rows of `row` bytes and gates of `gate` bytes, by rank `rank` of the
    `group`."""

    def all_to_all(purpose: Purpose, phase: Phase, counts: list[int], size: int) -> Transfer:
        payload, kept = sum(counts) * size, counts[rank] * size
        return Transfer(purpose, phase, group, "all_to_all", 1, payload, kept)

    each = [2] * len(sizes.send_rows)
    yield all_to_all(Purpose.DISPATCH_COUNTS, "forward", each, _COUNT)
    yield all_to_all(Purpose.DISPATCH_ROWS, "forward", sizes.send_rows, row)
    yield all_to_all(Purpose.DISPATCH_ROWS, "backward", sizes.receive_rows, row)
    # A gate and the number of its pair, of the same size.
    yield all_to_all(Purpose.DISPATCH_GATES, "forward", sizes.send_pairs, 2 * gate)
    yield all_to_all(Purpose.DISPATCH_GATES, "backward", sizes.receive_pairs, gate)
    yield all_to_all(Purpose.COMBINE_ROWS, "forward", sizes.receive_rows, row)
    yield all_to_all(Purpose.COMBINE_ROWS, "backward", sizes.send_rows, row)


class _Passes:
    """Forward and backward pass of one micro-batch through this stage."""

    def __init__(self, model: LanguageModel, config: RunConfig) -> None:
        dtype = DTYPES[config.training.precision]
        self.model = model
        self.config = config
        self.sharded = model.sequence_parallel
        self.tensor_size = model.groups.tensor.size()
        self.sequences = config.training.micro_batch_size
        self.tokens = self.sequences * config.model.sequence_length
        self.width = config.model.hidden_size
        self.recomputes = config.training.recompute == "full"
        self.element = dtype.itemsize
        """Bytes of an activation's element."""
        self.precise = torch.promote_types(dtype, torch.float32).itemsize
        """Of scores and gates."""

    @property
    def whole(self) -> int:
        """Bytes of the hidden states of all tokens."""
        return self.tokens * self.width * self.element

    @property
    def shard(self) -> int:
        """Bytes of the hidden states that lie on this rank between blocks."""
        return self.whole // self.model.num_shards

    def fixed(self) -> Iterator[Transfer]:
        """All that does not depend on routes."""
        model = self.model
        yield from self._documents()
        if model.groups.is_first_stage:
            yield from self._embedding()
        for alike in self._kinds_of_blocks():
            block = self._repeated(chain(self._norm(), self._block(alike[0])))
            yield from times(block, len(alike))
        if model.groups.is_last_stage:
            yield from self._norm()
            yield from self._head()

    def _kinds_of_blocks(self) -> Iterable[list[DenseBlock]]:
        """Blocks that send alike: those of a kind, routed or not."""
        kinds: dict[tuple[str, type], list[DenseBlock]] = defaultdict(list)
        for layer in self.model.layers.values():
            assert isinstance(layer, TransformerBlock)
            for name, block in (("attention", layer.attention), ("ffn", layer.feed_forward)):
                kinds[name, type(block)].append(block)
        return kinds.values()

    def _documents(self) -> Iterator[Transfer]:
        """What the sequences that meet in a wide expert group tell each other."""
        groups = self.model.groups
        if self.config.has_documents and groups.expert.size() > groups.tensor.size():
            payload = self.tokens * _COUNT
            yield Transfer(Purpose.DOCUMENTS, "forward", "expert", "all_gather", 1, payload)

    def exchanged(self, exchanges: Exchanges, number: int) -> Iterator[Transfer]:
        """What travels to experts and back, in all `number` micro-batches."""
        blocks = blocks_that_exchange(self.model)
        assert all(len(exchanges[name]) == number for name in blocks)
        kinds: dict[tuple[int, str], list[str]] = defaultdict(list)
        for name, block in blocks.items():
            kinds[id(exchanges[name]), _name_of_experts(block)].append(name)
        for (_, group), alike in kinds.items():
            rank = blocks[alike[0]].expert_group.rank()
            for _, equal in groupby(exchanges[alike[0]], key=id):
                sizes, *others = equal
                transfers = self._repeated(self._exchange(sizes, group, rank))
                yield from times(transfers, len(alike) * (1 + len(others)))

    def _repeated(self, transfers: Iterable[Transfer]) -> Iterator[Transfer]:
        """Of a layer, whose forward pass comes twice if it is recomputed."""
        for transfer in transfers:
            again = self.recomputes and transfer.phase == "forward"
            # Only a pass with gradients has losses.
            if not again or transfer.purpose != Purpose.BALANCE:
                yield transfer
            if again:
                yield replace(transfer, phase="recompute")

    def _exchange(self, sizes: ExchangeSizes, group: str, rank: int) -> Iterator[Transfer]:
        return exchange_traffic(sizes, group, rank, self.width * self.element, self.precise)

    def _norm(self) -> Iterator[Transfer]:
        for _ in ("weight", "bias")[: 1 if self.config.model.norm == "rms_norm" else 2]:
            yield from self._replicated_weight(self.element * self.width)

    def _embedding(self) -> Iterator[Transfer]:
        if self.config.model.positions == "learned":
            size = self.config.model.sequence_length * self.width * self.element
            yield from self._replicated_weight(size)
        if self.sharded:
            yield self._scatter(Purpose.EMBEDDING, "forward")
            yield self._gather(Purpose.EMBEDDING, "backward")
        else:
            yield self._reduce(Purpose.EMBEDDING, "forward", self.whole)

    def _block(self, block: DenseBlock) -> Iterator[Transfer]:
        if isinstance(block, RoutedBlock):
            yield from self._routing(block)
        else:
            yield from self._column_parallel(Purpose.DENSE_BLOCKS)
            if self.sharded:
                yield self._scatter(Purpose.DENSE_BLOCKS, "forward")
                yield self._gather(Purpose.DENSE_BLOCKS, "backward")
            else:
                yield self._reduce(Purpose.DENSE_BLOCKS, "forward", self.whole)
        bias = block.experts.output_bias
        if bias is not None:
            yield from self._replicated_weight(self.element * self.width)

    def _column_parallel(self, purpose: Purpose) -> Iterator[Transfer]:
        """Megatron's linear, which gathers its input a second time for the weight's gradient."""
        if self.sharded:
            yield self._gather(purpose, "forward")
            yield self._gather(purpose, "backward")
            yield self._scatter(purpose, "backward")
        else:
            yield self._reduce(purpose, "backward", self.whole)

    def _routing(self, block: RoutedBlock) -> Iterator[Transfer]:
        """Of a routed block, but for its exchange."""
        for level in block.router.levels.values():
            yield from self._level(level, block.router.num_routed)
        if not block.spreads_tokens:
            gates = self.tokens * block.router.num_experts * self.precise
            yield self._reduce(Purpose.REPLICATED_ROWS, "forward", self.whole)
            yield self._reduce(Purpose.REPLICATED_ROWS, "backward", self.whole)
            yield self._reduce(Purpose.REPLICATED_GATES, "backward", gates)
        elif _gathers(block):
            yield from self._gathered(block)

    def _gathered(self, block: RoutedBlock) -> Iterator[Transfer]:
        """Of a block whose experts need the rows of all tokens of their group."""
        group, ranks = _name_of_experts(block), block.expert_group.size()
        pairs = self.tokens // self.model.num_shards * block.router.num_experts

        def to_experts(phase: Phase, element: int) -> Transfer:
            payload = pairs * element
            kept = payload // ranks
            return Transfer(Purpose.GATHERED_GATES, phase, group, "all_to_all", 1, payload, kept)

        yield to_experts("forward", 1)  # the mask, in bytes
        yield to_experts("forward", self.precise)
        yield to_experts("backward", self.precise)
        phases: tuple[Phase, Phase] = ("forward", "backward")
        for phase in phases:
            sums = self.shard * ranks
            yield Transfer(Purpose.GATHERED_ROWS, phase, group, "all_gather", 1, self.shard)
            yield Transfer(Purpose.GATHERED_ROWS, phase, group, "reduce_scatter", 1, sums)

    def _level(self, level: Level, experts: int) -> Iterator[Transfer]:
        """Of one decision of a router."""
        scopes = {rule.scope for rule in level.balance}
        if "batch" in scopes:
            yield Transfer(Purpose.BALANCE, "forward", "data", "all_reduce", 1, _COUNT * experts)
        if not self.sharded:
            return
        yield from self._replicated_weight(self.precise * experts * self.width)
        if scopes - {"none"}:
            yield self._reduce(Purpose.BALANCE, "forward", _COUNT * self.sequences * experts)
        scores = self.tokens * experts * self.precise
        share = scores // self.tensor_size
        length = self.tokens // self.sequences
        documents = Documents.whole(length, 1, torch.device("cpu"))
        units = level.units(replace(documents, one_each=not self.config.has_documents))
        if not level.scores_lie_within(units, length // self.tensor_size):
            yield Transfer(Purpose.SCORES, "forward", "tensor", "all_gather", 1, share)
            yield Transfer(Purpose.SCORES, "backward", "tensor", "reduce_scatter", 1, scores)
        if not level.chooses_by_unit:
            yield Transfer(Purpose.SCORES, "forward", "tensor", "all_gather", 1, share)

    def _replicated_weight(self, size: int) -> Iterator[Transfer]:
        """The gradient of a whole weight that meets a shard of the tokens."""
        if self.sharded:
            yield self._reduce(Purpose.REPLICATED_WEIGHTS, "backward", size)

    def _head(self) -> Iterator[Transfer]:
        head = self.model.head
        if isinstance(head, VocabularyHead):
            yield from self._column_parallel(Purpose.HEAD)
            yield from self._loss(head)
        elif self.sharded:
            yield self._reduce(Purpose.HEAD, "forward", self.sequences * self.width * self.precise)

    def _loss(self, head: VocabularyHead) -> Iterator[Transfer]:
        if self.element == 8:  # see VocabularyHead.losses
            vocabulary = head.logits.output_size // self.tensor_size
            payload = self.tokens * vocabulary * self.element
            yield Transfer(Purpose.LOSS, "forward", "tensor", "all_gather", 1, payload)
        else:
            for _ in ("largest logit", "logit of the label", "sum of exponentials"):
                yield self._reduce(Purpose.LOSS, "forward", self.tokens * self.precise)

    def _gather(self, purpose: Purpose, phase: Phase) -> Transfer:
        return Transfer(purpose, phase, "tensor", "all_gather", 1, self.shard)

    def _scatter(self, purpose: Purpose, phase: Phase) -> Transfer:
        return Transfer(purpose, phase, "tensor", "reduce_scatter", 1, self.whole)

    def _reduce(self, purpose: Purpose, phase: Phase, payload: int) -> Transfer:
        return Transfer(purpose, phase, "tensor", "all_reduce", 1, payload)


def _gathers(block: RoutedBlock) -> bool:
    """Whether all rows of an expert group come to each of its ranks."""
    experts: Union = block.experts  # pyright: ignore[reportAssignmentType]
    return block.spreads_tokens and experts.needs_all_rows


def _name_of_experts(block: RoutedBlock) -> str:
    return "expert" if block.expert_group.size() > block.group.size() else "tensor"


def _between_stages(model: LanguageModel, passes: _Passes) -> Iterator[Transfer]:
    groups = model.groups
    if not groups.is_last_stage:
        yield Transfer(Purpose.STAGE_OUTPUTS, "forward", "next_stage", "send", 1, passes.shard)
    if not groups.is_first_stage:
        yield Transfer(Purpose.STAGE_INPUTS, "backward", "previous_stage", "send", 1, passes.shard)


def _pipeline_loss(model: LanguageModel, passes: _Passes) -> Iterator[Transfer]:
    """DeepSpeed's own mean of the loss, which the last stage tells the others."""
    groups = model.groups
    if groups.pipe.size() == 1:
        return
    if groups.is_last_stage:
        yield Transfer(Purpose.DEEPSPEED_LOSS, "step", "data", "all_reduce", 1, passes.precise)
    told = 2 * 4 if groups.is_last_stage else 0
    yield Transfer(Purpose.DEEPSPEED_LOSS, "step", "pipe", "broadcast", 1, told)


def _moved_rules(model: LanguageModel) -> Iterator[Transfer]:
    """What routing rules learn from a step."""
    rules = [rule for b in model.routed_blocks().values() for rule in b.router.running]
    size = sum(rule.observed.numel() for rule in rules) * _COUNT
    if rules:
        yield Transfer(Purpose.RULES, "step", "data", "all_reduce", 1, size)
    if rules and model.sequence_parallel:
        yield Transfer(Purpose.RULES, "step", "tensor", "all_reduce", 1, size)


def _bookkeeping() -> Iterator[Transfer]:
    yield Transfer(Purpose.STEP_AGREEMENT, "step", "world", "all_reduce", 1, 4 * _COUNT)
    yield Transfer(Purpose.VALID_TOKENS, "step", "data", "all_reduce", 1, _COUNT)
    yield Transfer(Purpose.JUDGEMENT, "step", "world", "all_reduce", 1, 2 * _COUNT)
