"""Routes of one layout are kept, and every other layout follows them or compares with them."""

from __future__ import annotations

import errno
import os
import shutil
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from tests.harness import Ranks
from tests.model.cases import build_model, random_tokens, start
from tests.programs import Outcome, call_program, metrics, only_complaint, write_run
from tests.tiny import tiny_config
from uoe_parallel.checkpoint import Piece, find_checkpoint, open_checkpoint, save_checkpoint
from uoe_parallel.config.load import load_config
from uoe_parallel.config.schema import RunConfig
from uoe_parallel.experts.documents import Documents
from uoe_parallel.model.block import RoutedBlock
from uoe_parallel.model.context import Context
from uoe_parallel.parallel.groups import distributed, start_groups
from uoe_parallel.parallel.layout import ParallelLayout
from uoe_parallel.routing.level import Decision
from uoe_parallel.routing.router import Routing
from uoe_parallel.routing.tape import Player, Recorder, pack, unpack
from uoe_parallel.training.console import TrainingConsole
from uoe_parallel.training.trainer import Trainer

STEPS = 2
BATCH, LENGTH = 8, 16
EXPERTS = {"attention": 4, "feed_forward": 12}
"""Those of attention fill half a byte, the others a byte and a half."""
BLOCKS = {f"layers.{layer}.{kind}": n for layer in range(2) for kind, n in EXPERTS.items()}
TOKENS = BATCH * LENGTH * len(BLOCKS)
SECONDS = 30

Masks = dict[str, Tensor]
"""By block: bool [S, B, E] of a pass, or of a step [BATCH, LENGTH, E]."""


class Pass(NamedTuple):
    """What the blocks of a rank did in one training pass."""

    own: Masks
    """What they chose."""
    used: Masks
    """By what they routed."""


class Steps(NamedTuple):
    """What a rank saw of the steps of a run."""

    losses: list[float]
    norms: list[float]
    validation: list[float]
    reports: list[dict[str, float]]
    passes: list[list[Pass]]
    """Of each step, one for each micro-batch."""


class Layout(NamedTuple):
    world: int
    micro: int
    tensor: int = 1
    sharded: bool = False
    pipeline: int = 1
    expert: int = 1

    def overrides(self) -> list[str]:
        return [
            f"parallel.tensor={self.tensor}",
            f"parallel.sequence_parallel={str(self.sharded).lower()}",
            f"parallel.pipeline={self.pipeline}",
            f"parallel.expert={max(self.expert, self.tensor)}",
            f"training.micro_batch_size={self.micro}",
        ]

    def whole(self, seen: list[Steps], step: int, which: str) -> Masks:
        """The masks of all ranks in a step, put together in the global order by hand."""
        whole: Masks = {}
        for name in BLOCKS:
            holders = [rank for rank in seen if name in rank.passes[step][0].own]
            assert len(holders) * self.pipeline == self.world
            starts = range(0, len(holders), self.tensor)
            replicas = [holders[start : start + self.tensor] for start in starts]
            columns = []  # in the order of the batch: [S, micro, E]
            for number in range(BATCH // self.micro // len(replicas)):
                for replica in replicas:
                    masks = [getattr(rank.passes[step][number], which)[name] for rank in replica]
                    assert self.sharded or all(torch.equal(mask, masks[0]) for mask in masks)
                    columns.append(torch.cat(masks) if self.sharded else masks[0])
            whole[name] = torch.cat(columns, dim=1).transpose(0, 1)
        return whole

    def __str__(self) -> str:
        """Tells what is not as on one rank: `2 ranks, micro 4, tensor 2`."""
        axes = [f"{n} {v}" for n, v in self._asdict().items() if n != "world" and v > 1]
        return ", ".join([f"{self.world} ranks", *axes, *(["sharded"] if self.sharded else [])])


ONE_RANK = Layout(1, 2)
TP_SP = Layout(2, 2, tensor=2, sharded=True)
TP = Layout(2, 4, tensor=2)
DP = Layout(2, 2)
PP = Layout(2, 1, pipeline=2)
OTHERS = [
    *(TP_SP, TP, DP, PP),
    Layout(2, 2, expert=2),
    Layout(4, 1, tensor=2, sharded=True, pipeline=2),
    Layout(4, 1, tensor=2, sharded=True, expert=4),
]


def named(layouts: list[Layout]) -> Any:
    return pytest.mark.parametrize("layout", layouts, ids=str)


def write(folder: Path, **sections: Any) -> Path:
    """The YAML of a run of STEPS steps of four micro-batches on one rank."""
    changes: dict[str, Any] = {
        "feed_forward": {"num_experts": EXPERTS["feed_forward"]},
        "model": {"ffn_size": 96},
        "training": {"global_batch_size": BATCH, "micro_batch_size": 2, "steps": STEPS},
    }
    for name, section in sections.items():
        changes[name] = changes.get(name, {}) | section
    return write_run(folder, **changes)


def watch(name: str, block: RoutedBlock, passes: list[Pass]) -> None:
    """Add to `passes` what the block does in training."""

    def decide(x_SBD: Tensor, context: Context) -> list[Decision]:
        decisions = RoutedBlock._decide(block, x_SBD, context)
        if block.training:
            if not passes or name in passes[-1].own:
                passes.append(Pass({}, {}))
            passes[-1].own[name] = decisions[-1].mask_SBE
        return decisions

    def losses(decisions: list[Decision], routing: Routing, documents: Documents) -> Tensor:
        passes[-1].used[name] = routing.mask_SBE
        return RoutedBlock._losses(block, decisions, routing, documents)

    block._decide, block._losses = decide, losses


def take_steps(config: RunConfig, validate: bool = False) -> Steps:
    """On every rank: the steps of a run, each reported."""
    seen = Steps([], [], [], [], [])
    with distributed() as device:
        groups = start_groups(ParallelLayout.from_config(config.parallel, dist.get_world_size()))
        trainer = Trainer(config, groups, device, TrainingConsole(quiet=True))
        passes: list[Pass] = []
        for name, block in trainer.model.routed_blocks().items():
            watch(name, block, passes)
        for _ in range(config.training.steps):
            result = trainer.train_step()
            seen.losses.append(result.loss)
            seen.norms.append(result.gradient_norm)
            seen.reports.append(trainer.routes.report())
            seen.passes.append(list(passes))
            passes.clear()
            assert all(block.tape is None for block in trainer.model.routed_blocks().values())
            if validate:
                seen.validation.append(trainer.evaluate("validation").loss)
    return seen


def train(config: RunConfig) -> int:
    """On every rank: a run from its newest checkpoint to its end; the step it began after."""
    with distributed() as device:
        groups = start_groups(ParallelLayout.from_config(config.parallel, dist.get_world_size()))
        trainer = Trainer(config, groups, device, TrainingConsole(quiet=True))
        reader = find_checkpoint(trainer.folder.checkpoints, groups.world)
        trainer.train()
    return reader.step if reader else 0


def run(ranks: Ranks, path: Path, layout: Layout, *overrides: str, **options: bool) -> list[Steps]:
    config = load_config(path, [*layout.overrides(), *overrides])
    return ranks(layout.world).run(take_steps, config, **options)


def read(folder: Path, step: int) -> Masks:
    """The record of a step (from 0)."""
    reader = open_checkpoint(folder, step + 1, None)
    assert reader.keys() == BLOCKS.keys()
    return {name: unpack(reader.read(name), experts) for name, experts in BLOCKS.items()}


def rewrite(source: Path, target: Path, step: int, masks: Masks) -> None:
    """The record of a step as in `source`, with other masks, into `target`."""
    pieces = [Piece.whole(name, pack(mask).contiguous()) for name, mask in masks.items()]
    state = open_checkpoint(source, step + 1, None).state
    save_checkpoint(target, step + 1, pieces, state, None, keep=None)


def assert_same(left: Masks, right: Masks) -> None:
    assert left.keys() == right.keys()
    for name, mask in left.items():
        assert torch.equal(mask, right[name]), name


def flips(left: Masks, right: Masks) -> dict[str, float]:
    """What is to be reported where the one stands against the other."""
    flipped = sum(int((mask != right[name]).any(-1).sum()) for name, mask in left.items())
    return {"routes/flipped_tokens": float(flipped), "routes/tokens": float(TOKENS)}


class Recorded(NamedTuple):
    path: Path
    """The run's YAML; tests add overrides."""
    folder: Path
    """One rank's record. Tests must not write to it."""
    forced: Path
    """The same with each token's experts moved on by one place."""
    seen: Steps
    """One rank that wrote the record."""
    followed: Steps
    """One rank that followed the forced one."""


@pytest.fixture(scope="module")
def recorded(ranks: Ranks, tmp_path_factory: pytest.TempPathFactory) -> Recorded:
    folder = tmp_path_factory.mktemp("recorded")
    path, kept, forced = write(folder), folder / "kept", folder / "forced"
    [seen] = run(ranks, path, ONE_RANK, f"routes.record={kept}")
    for step in range(STEPS):
        moved = {name: mask.roll(1, -1) for name, mask in read(kept, step).items()}
        rewrite(kept, forced, step, moved)
    [followed] = run(ranks, path, ONE_RANK, f"routes.replay={forced}")
    return Recorded(path, kept, forced, seen, followed)


def test_record_is_what_one_rank_used_in_the_order_of_the_batch(recorded: Recorded) -> None:
    folders = sorted(folder.name for folder in recorded.folder.iterdir())
    assert folders == ["step-00000001", "step-00000002"]
    for step in range(STEPS):
        assert_same(read(recorded.folder, step), ONE_RANK.whole([recorded.seen], step, "used"))
        reader = open_checkpoint(recorded.folder, step + 1, None)
        for name, experts in BLOCKS.items():
            assert reader.read(name).shape == (BATCH, LENGTH, -(-experts // 8))
            assert reader.dtype(name) == torch.uint8
    assert recorded.seen.reports == [{}, {}]


@named(OTHERS)
def test_every_layout_writes_the_same_record(
    ranks: Ranks, recorded: Recorded, tmp_path: Path, layout: Layout
) -> None:
    seen = run(ranks, recorded.path, layout, f"routes.record={tmp_path}")
    for step in range(STEPS):
        assert_same(read(tmp_path, step), layout.whole(seen, step, "used"))
        assert_same(read(tmp_path, step), read(recorded.folder, step))


@named([TP_SP, TP, DP, PP])
def test_one_ranks_routes_are_those_of_other_layouts(
    ranks: Ranks, recorded: Recorded, layout: Layout
) -> None:
    seen = run(ranks, recorded.path, layout, f"routes.replay={recorded.folder}")
    for step in range(STEPS):
        assert_same(layout.whole(seen, step, "used"), read(recorded.folder, step))
    for rank in seen:
        assert rank.reports == [{"routes/flipped_tokens": 0.0, "routes/tokens": TOKENS}] * STEPS
        assert rank.losses == pytest.approx(recorded.seen.losses, rel=2e-5)


@named([ONE_RANK, *OTHERS])
def test_changed_record_is_followed_and_flips_are_counted(
    ranks: Ranks, recorded: Recorded, layout: Layout
) -> None:
    seen = run(ranks, recorded.path, layout, f"routes.replay={recorded.forced}")
    for step in range(STEPS):
        used = layout.whole(seen, step, "used")
        assert_same(used, read(recorded.forced, step))
        expected = flips(layout.whole(seen, step, "own"), used)
        assert [rank.reports[step] for rank in seen] == [expected] * layout.world
        assert 0 < expected["routes/flipped_tokens"] < TOKENS
    for rank in seen:
        assert rank.losses == pytest.approx(recorded.followed.losses, rel=2e-5)
        assert rank.norms == pytest.approx(recorded.followed.norms, rel=2e-5)
    for own, other in zip(recorded.seen.losses, seen[0].losses, strict=True):
        assert abs(own - other) > 1e-3, "other experts must show in the loss"


@named([ONE_RANK, TP_SP, PP])
def test_comparison_changes_no_bit_and_validation_knows_of_no_record(
    ranks: Ranks, recorded: Recorded, layout: Layout
) -> None:
    alone = run(ranks, recorded.path, layout, validate=True)
    compared = run(ranks, recorded.path, layout, f"routes.compare={recorded.forced}", validate=True)
    for step in range(STEPS):
        own = layout.whole(alone, step, "own")
        assert_same(layout.whole(compared, step, "used"), own)
        expected = flips(own, read(recorded.forced, step))
        assert [rank.reports[step] for rank in compared] == [expected] * layout.world
    for before, after in zip(alone, compared, strict=True):
        assert before.reports == [{}] * STEPS
        assert (before.losses, before.norms) == (after.losses, after.norms)
        assert before.validation == after.validation


def test_bf16_layouts_on_one_record_agree_and_tell_of_near_ties(
    ranks: Ranks, recorded: Recorded, tmp_path: Path
) -> None:
    bf16 = "training.precision=bf16"
    [seen] = run(ranks, recorded.path, ONE_RANK, bf16, f"routes.record={tmp_path}")
    for layout in (TP_SP, PP):
        for rank in run(ranks, recorded.path, layout, bf16, f"routes.replay={tmp_path}"):
            assert rank.losses == pytest.approx(seen.losses, rel=3e-3)
            flipped = [report["routes/flipped_tokens"] for report in rank.reports]
            assert all(count < 0.1 * TOKENS for count in flipped)


def test_report_adds_up_steps_until_it_is_taken(
    ranks: Ranks, recorded: Recorded, tmp_path: Path
) -> None:
    path = write(tmp_path, logging={"every": STEPS})
    overrides = [f"routes.replay={recorded.forced}", *TP_SP.overrides()]
    ranks(2).run(train, load_config(path, overrides))
    [record] = metrics(tmp_path / "run")
    flipped = sum(report["routes/flipped_tokens"] for report in recorded.followed.reports)
    assert record["routes/flipped_tokens"] == flipped
    assert record["routes/tokens"] == STEPS * TOKENS


class Orders(NamedTuple):
    """What passes in some order left behind."""

    gradients: Masks
    routes: Masks
    """uint8, as tapes keep them."""


def recompute(config: RunConfig, forced: Masks | None, pipelined: bool) -> Orders:
    """Two micro-batches through a model, with recomputation in the order of a pipeline stage
    that takes both forward before it takes the first backward, or in none and one by one."""
    model = build_model(config, start(config))
    tapes: dict[str, Any] = {}
    for name, block in model.routed_blocks().items():
        tapes[name] = Player(forced[name], 2, follow=True) if forced else Recorder(2)
        block.tape = tapes[name]
    batches = random_tokens(config).split(2)

    def forward(tokens: Tensor) -> Tensor:
        assert model.embedding is not None
        context = model.context((len(tokens), tokens.shape[1]), None, tokens.device)
        x: Any = model.embedding(tokens, context.documents)
        for layer in model.layers.values():
            if pipelined:
                x = checkpoint(layer, x, context, use_reentrant=True)
            else:
                x = layer(x, context)
        return model.logits(x).square().mean()

    if pipelined:
        for loss in [forward(tokens) for tokens in batches]:
            loss.backward()
    else:
        for tokens in batches:
            forward(tokens).backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return Orders(gradients, {name: tape.finish() for name, tape in tapes.items()})


# Segments choose too: their choice is kept before that of patches.
LEVELS: dict[str, dict[str, Any]] = {
    "patches": {},
    "segments": {"segment_length": 4, "segment_experts": 3, "gate": "softmax_of_chosen"},
}


@pytest.mark.parametrize("levels", LEVELS)
@pytest.mark.parametrize("follows", [False, True])
def test_recomputation_under_a_pipelines_order_changes_nothing(
    ranks: Ranks, follows: bool, levels: str
) -> None:
    config = tiny_config(feed_forward=LEVELS[levels], attention=LEVELS[levels])
    forced = None
    if follows:
        own = ranks(1).run(recompute, config, None, False)[0].routes
        # Other experts for the second micro-batch than for the first.
        forced = {name: routes.flip(0) for name, routes in own.items()}
    plain, recomputed = (
        ranks(1).run(recompute, config, forced, pipelined)[0] for pipelined in (False, True)
    )
    assert_same(plain.gradients, recomputed.gradients)
    assert_same(plain.routes, recomputed.routes)
    if follows:
        assert all(int(flipped) > 0 for flipped in plain.routes.values())


def test_recomputation_follows_the_same_record(ranks: Ranks) -> None:
    own = ranks(1).run(recompute, tiny_config(), None, False)[0].routes
    forced = {name: routes.flip(0) for name, routes in own.items()}
    plain, *others = (
        ranks(1).run(recompute, tiny_config(training={"recompute": mode}), forced, False)[0]
        for mode in ("none", "selective", "full")
    )
    assert all(int(flipped) > 0 for flipped in plain.routes.values())
    for found in others:
        assert_same(plain.gradients, found.gradients)
        assert_same(plain.routes, found.routes)


def followed_gates(config: RunConfig, forced: Masks) -> dict[str, float]:
    """Of each block the smallest gate of a followed pair, recorded of other sequences."""
    model = build_model(config, start(config))
    smallest: dict[str, float] = {}
    for name, block in model.routed_blocks().items():
        block.tape = Player(forced[name], 2, follow=True)

        def routing(
            decisions: list[Decision],
            documents: Documents,
            name: str = name,
            block: RoutedBlock = block,
        ) -> Routing:
            found = RoutedBlock._routing(block, decisions, documents)
            smallest[name] = float(found.gates_SBE[found.mask_SBE].min())
            return found

        block._routing = routing
    model(random_tokens(config).split(2)[0])
    return smallest


def test_a_segment_is_followed_too_so_that_no_recorded_pair_loses_its_gate(ranks: Ranks) -> None:
    config = tiny_config(feed_forward=LEVELS["segments"], attention=LEVELS["segments"])
    own = ranks(1).run(recompute, config, None, False)[0].routes
    forced = {name: routes.flip(0) for name, routes in own.items()}
    found = ranks(1).run(followed_gates, config, forced)[0]
    assert len(found) == 4
    assert all(gate > 0 for gate in found.values()), found


def test_evaluation_and_sampling_never_reach_a_tape(ranks: Ranks) -> None:
    ranks(1).run(evaluate_with_a_tape, tiny_config())


def evaluate_with_a_tape(config: RunConfig) -> None:
    model = build_model(config, start(config)).eval()
    for block in model.routed_blocks().values():
        block.tape = refuse
    tokens = random_tokens(config)
    model(tokens, tokens)
    with model.replicated_tokens():
        model(tokens)


def refuse(mask: Tensor) -> Tensor:
    raise AssertionError("a tape was asked in evaluation")


def test_resumed_run_writes_its_steps_again(ranks: Ranks, tmp_path: Path) -> None:
    """The steps after the checkpoint that it resumes from; those before it stay as they are."""
    folder = tmp_path / "routes"
    path = write(tmp_path, training={"steps": 3}, checkpoint={"every": 1, "keep": 3})
    config = load_config(path, [f"routes.record={folder}", *TP_SP.overrides()])
    assert ranks(2).run(train, config) == [0, 0]
    before = [read(folder, step) for step in range(3)]
    for step in (1, 2):  # as if they had been other steps
        rewrite(folder, folder, step, {name: ~mask for name, mask in before[step].items()})
    first = (folder / "step-00000001" / "manifest.json").stat()
    for name in ("step-00000002", "step-00000003"):
        shutil.rmtree(tmp_path / "run" / "checkpoints" / name)

    assert ranks(2).run(train, config) == [1, 1]
    assert sorted(f.name for f in folder.iterdir()) == [f"step-0000000{n}" for n in (1, 2, 3)]
    for step in range(3):
        assert_same(read(folder, step), before[step])
    assert (folder / "step-00000001" / "manifest.json").stat() == first


def test_dry_run_writes_no_record_and_reads_one(
    ranks: Ranks, recorded: Recorded, tmp_path: Path
) -> None:
    arguments = ("--config", recorded.path, "--dry-run")
    [outcome] = ranks(1).run(call_program, *arguments, f"routes.record={tmp_path / 'routes'}")
    assert outcome.code == 0 and list(tmp_path.iterdir()) == []
    missing = f"routes.replay={tmp_path / 'routes'}"
    assert "is not there" in only_complaint(ranks(1).run(call_program, *arguments, missing))


def test_model_without_routed_blocks_has_an_empty_record(ranks: Ranks, tmp_path: Path) -> None:
    none = [f"{kind}.routed_layers=none" for kind in EXPERTS]
    path = write(tmp_path)
    run(ranks, path, DP, f"routes.record={tmp_path / 'routes'}", *none)
    [seen] = run(ranks, path, ONE_RANK, f"routes.replay={tmp_path / 'routes'}", *none)
    assert seen.reports == [{"routes/flipped_tokens": 0.0, "routes/tokens": 0.0}] * STEPS


def complaint(ranks: Ranks, recorded: Recorded, folder: Path, *overrides: str) -> str:
    """What two ranks are told, which must not have trained."""
    command = ("--config", recorded.path, f"run_dir={folder / 'run'}", *TP_SP.overrides())
    outcomes = ranks(2).run(call_program, *command, *overrides, timeout=SECONDS)
    assert not (folder / "run" / "checkpoints").exists()
    return only_complaint(outcomes)


@pytest.mark.parametrize(
    ("use", "override", "told"),
    [
        ("replay", "seed=8", "seed: recorded 7, now 8"),
        ("compare", "training.global_batch_size=4", "global_batch_size: recorded 8, now 4"),
        ("replay", "model.sequence_length=32", "model.sequence_length: recorded 16, now 32"),
        ("compare", "feed_forward.num_experts=16", "layers.1.feed_forward: recorded 12, now 16"),
        ("replay", "model.num_layers=1", "experts of layers.1.attention: recorded 4, now null"),
        ("compare", "model.num_layers=6", "layers.2.attention: recorded null, now 4"),
        ("replay", "attention.routed_layers=[0]", "layers.1.attention: recorded 4, now null"),
    ],
)
def test_record_of_another_run_is_refused_by_name(
    ranks: Ranks, recorded: Recorded, tmp_path: Path, use: str, override: str, told: str
) -> None:
    source = f"routes.{use}={recorded.folder}"
    message = complaint(ranks, recorded, tmp_path, source, override)
    step = recorded.folder / "step-00000001"
    for word in (told, f"routes.{use}: {step} does not fit", "routes.record", "leave"):
        assert word in message
    assert ("and 3 more" in message) == (override == "model.num_layers=6")


def test_missing_and_damaged_records_are_named(
    ranks: Ranks, recorded: Recorded, tmp_path: Path
) -> None:
    folder = tmp_path / "routes"
    source = f"routes.replay={folder}"
    message = complaint(ranks, recorded, tmp_path, source)
    for word in (f"routes.replay: {folder / 'step-00000001'} is not there", "routes.record"):
        assert word in message
    rewrite(recorded.folder, folder, 0, read(recorded.folder, 0))
    assert "step-00000002 is not there" in complaint(ranks, recorded, tmp_path, source)

    (shard,) = folder.glob("*/*.safetensors")
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    message = complaint(ranks, recorded, tmp_path, source)
    assert "step-00000001 is not whole" in message and "checksum" in message


def test_checkpoint_is_no_record(ranks: Ranks, recorded: Recorded, tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "c", 1, [Piece.whole("w", torch.zeros(1))], {}, None, keep=1)
    message = complaint(ranks, recorded, tmp_path, f"routes.replay={tmp_path / 'c'}")
    assert "holds no routes" in message


def call_where_the_disk_fails(rank: int, method: str, *arguments: str | Path) -> Outcome:
    """Call the program, with a function of the disk's failing on one rank."""

    def fail(*_: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO), "the-broken-disk")

    mine = int(os.environ["RANK"]) == rank
    with mock.patch(f"uoe_parallel.checkpoint.{method}", fail) if mine else nullcontext():
        return call_program(*arguments)


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize(
    ("use", "method"), [("record", "store.save_file"), ("replay", "reader.CheckpointReader.read")]
)
def test_disk_that_fails_one_rank_ends_all(
    ranks: Ranks, recorded: Recorded, tmp_path: Path, use: str, method: str, rank: int
) -> None:
    folder = recorded.folder if use == "replay" else tmp_path / "routes"
    command = ("--config", recorded.path, f"routes.{use}={folder}", *TP_SP.overrides())
    outcomes = ranks(2).run(
        call_where_the_disk_fails, rank, method, *command, f"run_dir={tmp_path}", timeout=SECONDS
    )
    message = only_complaint(outcomes)
    for word in (f"routes.{use}", str(folder), "the-broken-disk"):
        assert word in message
