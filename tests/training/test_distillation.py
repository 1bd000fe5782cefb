"""Routers that learn from the dense teacher that the model was cut out of."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.harness import Ranks
from tests.model.cases import build_model, start
from tests.programs import metrics
from tests.tiny import tiny_config
from tests.training.cases import REALLY_RELEASED, STEPS, global_batch, split
from tests.training.runs import config_of, live, tensors_of
from uoe_parallel.config.schema import RunConfig
from uoe_parallel.data.batches import MicroBatch
from uoe_parallel.model.language_model import LanguageModel
from uoe_parallel.training.optimizer import parameter_groups, set_learning_rates
from uoe_parallel.training.timers import StepTimer

WEIGHT, TEMPERATURE = 0.7, 2.0
DISTILLATION: dict[str, float] = {"weight": WEIGHT, "temperature": TEMPERATURE}
ROUTERS: dict[str, Any] = {"trains": "routers", "micro_batch_size": 1}
DENSE: dict[str, Any] = {kind: {"routed_layers": "none"} for kind in ("feed_forward", "attention")}
MODELS: dict[str, dict[str, Any]] = {
    "as it is": {"dropout": 0.0},
    "as in GPT-2": {"norm": "layer_norm", "positions": "learned", "activation": "gelu_tanh"},
    "classification": {"task": "classification", "num_classes": 3},
}

Row = tuple[float, float, float, float]
"""Of a step: loss, gradient norm, divergence and the teacher's loss."""


def distilling_config(model: str = "as it is", **sections: Any) -> RunConfig:
    training = ROUTERS | sections.pop("training", {})
    return tiny_config(
        model=MODELS[model],
        distillation=DISTILLATION,
        training=training,
        deepspeed=REALLY_RELEASED,
        **sections,
    )


def distil(config: RunConfig) -> list[Row]:
    """Steps under the config's layout."""
    from uoe_parallel.training.pipeline import build_engine

    groups = start(config)
    engine = build_engine(build_model(config, groups), config, groups, torch.device("cpu"))
    rows: list[Row] = []
    for step in range(STEPS):
        shares = split(global_batch(config, step), config.training.micro_batch_size)
        mine = shares[groups.data_rank :: groups.layout.data]
        result = engine.step(mine, step, StepTimer(lambda: None))
        assert engine.model.training
        divergence, teacher_loss = result.distillation.values()
        rows.append((result.loss, result.gradient_norm, divergence, teacher_loss))
    return rows


def distil_plainly(config: RunConfig) -> list[Row]:
    """The same on one rank with nothing but torch, and a dense model of the same weights."""
    groups, training = start(config), config.training
    student = build_model(config, groups)
    teacher = build_model(config.model_copy(update=_dense(config)), groups)
    lacking = teacher.load_state_dict(student.state_dict(), strict=False)
    assert not lacking.missing_keys
    optimizer = torch.optim.AdamW(
        parameter_groups(student, training), betas=training.betas, eps=training.eps
    )
    rows: list[Row] = []
    for step in range(STEPS):
        batch = global_batch(config, step)
        set_learning_rates(optimizer, step, training)
        logits = [_logits_that_count(model, batch) for model in (student, teacher)]
        labels = batch.labels[batch.loss_mask]
        loss, teacher_loss = (F.cross_entropy(x_NV, labels) for x_NV in logits)
        log_q, log_p = (F.log_softmax(x_NV / TEMPERATURE, -1) for x_NV in logits)
        divergence = F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)
        optimizer.zero_grad()
        ((1 - WEIGHT) * loss + WEIGHT * TEMPERATURE**2 * divergence).backward()
        clip = training.gradient_clipping
        norm = torch.nn.utils.clip_grad_norm_(student.parameters(), clip)
        optimizer.step()
        rows.append((float(loss), float(norm), float(divergence), float(teacher_loss)))
    return rows


def _dense(config: RunConfig) -> dict[str, Any]:
    sections = {"feed_forward": config.feed_forward, "attention": config.attention}
    return {
        name: routing.model_copy(update={"routed_layers": "none"})
        for name, routing in sections.items()
    }


def _logits_that_count(model: LanguageModel, batch: MicroBatch) -> Tensor:
    """fp64, [N, V] with what pads the vocabulary, or [N, C]."""
    logits = model.stage(batch.tokens, batch.documents).double()
    if logits.ndim == 2:
        return logits[batch.loss_mask.squeeze(1)]
    return logits.transpose(0, 1)[batch.loss_mask]


LAYOUTS = [
    pytest.param(
        world, parallel, model, id=f"{name}-{model}", marks=[pytest.mark.slow] if slow else []
    )
    for name, world, parallel, model, slow in (
        ("one", 1, {"zero_stage": 0}, "as it is", True),
        ("tp2-sp", 2, {"tensor": 2}, "as it is", False),
        ("tp2", 2, {"tensor": 2, "sequence_parallel": False}, "as it is", True),
        ("dp2-zero2", 2, {"zero_stage": 2}, "as it is", True),
        ("dp2-zero3", 2, {"zero_stage": 3}, "as it is", False),
        ("dp2-ep2", 2, {"expert": 2}, "as it is", True),
        ("pp2", 2, {"pipeline": 2}, "as it is", False),
        ("tp2-pp2", 4, {"tensor": 2, "pipeline": 2}, "as it is", True),
        ("tp2-sp", 2, {"tensor": 2}, "classification", True),
        ("dp2", 2, {"zero_stage": 1}, "classification", True),
        ("tp2-sp", 2, {"tensor": 2}, "as in GPT-2", True),
    )
]


@pytest.mark.parametrize(("world", "parallel", "model"), LAYOUTS)
def test_steps_equal_plain_torch_with_a_dense_teacher(
    ranks: Ranks, world: int, parallel: dict[str, Any], model: str
) -> None:
    [expected] = ranks(1).run(distil_plainly, distilling_config(model))
    for rows in ranks(world).run(distil, distilling_config(model, parallel=parallel)):
        for found, row in zip(rows, expected, strict=True):
            assert found == pytest.approx(row, rel=5e-5)


def test_teacher_has_no_dropout(ranks: Ranks) -> None:
    [[(*_, expected), *_]] = ranks(1).run(distil, distilling_config())
    config = distilling_config()
    config = config.model_copy(update={"model": config.model.model_copy(update={"dropout": 0.3})})
    [[(*_, teacher_loss), *_]] = ranks(1).run(distil, config)
    assert teacher_loss == pytest.approx(expected, rel=1e-6)


def gaps() -> list[float]:
    """After training a dense model to count in steps: by how much the loss of the model cut out of
    it lies above the dense one's, in each step in which routers alone learn from the latter."""
    from uoe_parallel.training.pipeline import build_engine

    training: dict[str, Any] = {
        "steps": 200,
        "learning_rate": 0.01,
        "gradient_clipping": 1.0,
        "global_batch_size": 16,
        "micro_batch_size": 16,
    }
    config = tiny_config(**DENSE, model={"init_std": 0.05}, training=training)
    groups = start(config)
    dense = build_model(config, groups)
    engine = build_engine(dense, config, groups, torch.device("cpu"))
    for step in range(60):
        engine.step(_counting(step), step, StepTimer(lambda: None))
    config = tiny_config(
        model={"init_std": 0.05},
        training=training | {"trains": "routers", "learning_rate": 0.03},
        distillation={"weight": 1.0},
    )
    student = build_model(config, groups)
    student.load_state_dict(dense.state_dict(), strict=False)
    engine = build_engine(student, config, groups, torch.device("cpu"))
    found = []
    for step in range(40):
        result = engine.step(_counting(100 + step), step, StepTimer(lambda: None))
        found.append(result.loss - result.distillation["distillation/teacher_loss"])
    return found


def _counting(step: int) -> list[MicroBatch]:
    generator = torch.Generator().manual_seed(step)
    first, pace = torch.randint(0, 8, (2, 16, 1), generator=generator)
    tokens = (first + (1 + pace % 3) * torch.arange(17)) % 16
    mask = torch.ones(16, 16, dtype=torch.bool)
    return [MicroBatch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), mask)]


def test_routers_learn_to_do_as_the_teacher_does(ranks: Ranks) -> None:
    [found] = ranks(1).run(gaps)
    first, last = sum(found[:4]) / 4, sum(found[-4:]) / 4
    assert first > 0.2, "the cut must have done harm"
    assert last < 0.7 * first


def test_dense_then_routers_then_all(ranks: Ranks, tmp_path: Path) -> None:
    dense = config_of(tmp_path / "dense", **DENSE)
    ranks(1).run(live, dense)
    routers = config_of(
        tmp_path / "routers",
        training=ROUTERS | {"steps": 2},
        distillation=DISTILLATION,
        checkpoint={"start_from": dense.run_dir},
        parallel={"zero_stage": 2},
    )
    ranks(2).run(live, routers)
    everything = config_of(
        tmp_path / "all",
        training={"steps": 1},
        checkpoint={"start_from": routers.run_dir},
        parallel={"tensor": 2},
    )
    ranks(2).run(live, everything)

    records = metrics(Path(routers.run_dir))
    names = ("distillation/divergence", "distillation/teacher_loss")
    assert all(record[name] > 0 for record in records for name in names)
    first, second, third = (
        {
            key: t
            for key, t in tensors_of(Path(c.run_dir), c.training.steps).items()
            if key.endswith("weight")
        }
        for c in (dense, routers, everything)
    )
    assert len(second) == len(third) == len(first) + 4
    assert all(torch.equal(weight, second[key]) for key, weight in first.items())
    assert not any(torch.equal(weight, second[key]) for key, weight in third.items())
