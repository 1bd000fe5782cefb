"""What runs inside the rank processes for the engine's tests."""

from __future__ import annotations

from dataclasses import dataclass
from math import nan

import torch
from torch import Tensor, nn

from tests.model.cases import build_model, random_tokens, start
from tests.tiny import USED_VOCAB_SIZE
from uoe_parallel.checkpoint import Piece
from uoe_parallel.config.schema import RunConfig
from uoe_parallel.data.batches import MicroBatch
from uoe_parallel.model.decoding import DecodingMemory
from uoe_parallel.training.evaluation import Evaluation
from uoe_parallel.training.optimizer import parameter_groups, set_learning_rates
from uoe_parallel.training.timers import StepTimer

STEPS = 3
MOMENTS = ("exp_avg", "exp_avg_sq")
REALLY_RELEASED = {
    "zero_optimization": {
        "stage3_param_persistence_threshold": 0,
        "stage3_max_live_parameters": 0,
        "stage3_max_reuse_distance": 0,
        "stage3_prefetch_bucket_size": 0,
    }
}
"""Without these, ZeRO 3 keeps parameters as small as the tests' whole on every rank."""
MASK = USED_VOCAB_SIZE
"""The id after those of text."""


@dataclass(frozen=True)
class Outcome:
    """What steps reported, and what they left behind."""

    losses: list[float]
    gradient_norms: list[float]
    pieces: list[Piece]


def global_batch(config: RunConfig, step: int) -> MicroBatch:
    """All sequences of a step, each with another number of labels that count or, where these are
    classes, of real tokens."""
    tokens = random_tokens(config, seed=100 + step)
    lengths = torch.tensor([16, 3, 9, 1]).roll(step).unsqueeze(1)
    beginning = torch.arange(tokens.shape[1]) < lengths
    if config.model.task == "next_token":
        return MicroBatch(tokens, tokens.roll(-1, 1), beginning)
    if config.model.num_classes is not None:
        labels = tokens[:, :1] % config.model.num_classes
        counts = torch.tensor([[True], [True], [False], [True]])
        return MicroBatch(tokens, labels, counts, torch.where(beginning, 0, -1))
    # Two documents a sequence, and one sequence with nothing to predict.
    chosen = beginning & (tokens % 2 == 0) & (lengths != 3)
    return MicroBatch(tokens.where(~chosen, MASK), tokens, chosen, (~beginning).long())


def split(batch: MicroBatch, size: int) -> list[MicroBatch]:
    """Into micro-batches of `size` sequences."""
    parts = [None if t is None else t.split(size) for t in vars(batch).values()]
    return [
        MicroBatch(*(None if part is None else part[i] for part in parts))  # pyright: ignore
        for i in range(len(batch.tokens) // size)
    ]


def run_engine(config: RunConfig, steps: int = STEPS) -> Outcome:
    """Optimizer steps under the config's layout."""
    from uoe_parallel.training.pipeline import build_engine
    from uoe_parallel.training.state import capture

    groups = start(config)
    dtype = torch.float64 if config.training.precision == "fp64" else torch.float32
    model = build_model(config, groups, dtype)
    engine = build_engine(model, config, groups, torch.device("cpu"))
    timer = StepTimer(lambda: None)
    outcome = Outcome([], [], [])
    for step in range(steps):
        shares = split(global_batch(config, step), config.training.micro_batch_size)
        mine = shares[groups.data_rank :: groups.layout.data]
        result = engine.step(mine, step, timer)
        outcome.losses.append(result.loss)
        outcome.gradient_norms.append(result.gradient_norm)
    masters = config.training.precision == "bf16"
    outcome.pieces.extend(capture(engine.deepspeed, model, groups, masters=masters))
    return outcome


def evaluate(config: RunConfig) -> tuple[Evaluation, Tensor | None]:
    """Of two batches; and the logits [B, S, V] of an odd number of tokens if they are next ones."""
    from uoe_parallel.training.pipeline import build_engine

    groups = start(config)
    model = build_model(config, groups)
    engine = build_engine(model, config, groups, torch.device("cpu"))
    batches = [global_batch(config, step) for step in range(2)]
    size = config.training.global_batch_size // groups.layout.data
    evaluation = engine.evaluate([split(batch, size)[groups.data_rank] for batch in batches])
    if config.model.task != "next_token":
        return evaluation, None
    engine.deepspeed.eval()
    with model.replicated_tokens():
        tokens, memory = batches[0].tokens[:1, :5], DecodingMemory()
        logits = engine.logits(tokens)
        one_by_one = [engine.logits(tokens[:, part], memory) for part in ([0, 1, 2], [3], [4])]
        torch.testing.assert_close(torch.cat(one_by_one, 1), logits, rtol=1e-5, atol=1e-5)
    return evaluation, logits


def run_plainly(config: RunConfig) -> Outcome:
    """The same steps on one rank with nothing but torch."""
    training = config.training
    dtype = torch.float64 if training.precision == "fp64" else torch.float32
    model = build_model(config, start(config), dtype)
    optimizer = torch.optim.AdamW(
        parameter_groups(model, training), betas=training.betas, eps=training.eps
    )
    losses, norms = [], []
    for step in range(STEPS):
        batch = global_batch(config, step)
        set_learning_rates(optimizer, step, training)
        losses_of_labels = model(batch.tokens, batch.labels, batch.documents)
        loss = losses_of_labels[batch.loss_mask].mean()
        optimizer.zero_grad()
        loss.backward()
        clip = training.gradient_clipping
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), clip)))
        optimizer.step()
        losses.append(float(loss.detach()))
    pieces = []
    for name, param in model.named_parameters():
        state = optimizer.state[param] if param.requires_grad else {}
        kinds = {"weight": param} | {kind: state[kind] for kind in MOMENTS if kind in state}
        pieces += [Piece.whole(f"{name}/{kind}", t.detach()) for kind, t in kinds.items()]
    return Outcome(losses, norms, pieces)


def kept_by_a_forward_pass(config: RunConfig) -> tuple[int, set[str], set[str]]:
    """How many weights the experts have, which were gathered at some time of a forward pass, and
    whose gathered storage autograd kept for the backward pass."""
    from uoe_parallel.training.engine import TrainingEngine

    groups = start(config)
    model = build_model(config, groups)
    engine = TrainingEngine(model, config, groups, torch.device("cpu"))
    ends = ("fc1.weight", "fc2.weight", "qkv.weight", "output.weight")
    weights = {name: p for name, p in model.named_parameters() if name.endswith(ends)}
    gathered: set[str] = set()
    kept: set[str] = set()

    def whole() -> dict[int, str]:
        return {p.untyped_storage().data_ptr(): n for n, p in weights.items() if p.numel() > 0}

    def look(module: nn.Module, arguments: object) -> None:
        gathered.update(whole().values())

    def pack(saved: Tensor) -> Tensor:
        name = whole().get(saved.untyped_storage().data_ptr())
        if name is not None:
            kept.add(name)
        return saved

    for module in model.modules():
        module.register_forward_pre_hook(look)  # after DeepSpeed's, which gathers
    batch = global_batch(config, 0)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved):
        engine.token_losses(batch)
    return len(weights), gathered, kept


def assemble(outcomes: list[Outcome]) -> dict[str, Tensor]:
    """The full tensors out of all ranks' pieces, random state left out."""
    full: dict[str, Tensor] = {}
    for outcome in outcomes:
        for piece in outcome.pieces:
            if piece.key.startswith("random/"):
                continue
            target = full.setdefault(piece.key, torch.full(piece.global_shape, nan).double())
            box = zip(piece.offsets, piece.tensor.shape, strict=True)
            target[tuple(slice(o, o + n) for o, n in box)] = piece.tensor.double()
    return full
