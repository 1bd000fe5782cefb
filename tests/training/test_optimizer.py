from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

from tests.harness import Ranks
from tests.tiny import USED_VOCAB_SIZE, VOCAB_SIZE, tiny_config
from uoe_parallel.config.schema import TrainingConfig
from uoe_parallel.experts.backends import choose_backend
from uoe_parallel.model.language_model import LanguageModel
from uoe_parallel.parallel.device import use_device
from uoe_parallel.parallel.groups import start_groups
from uoe_parallel.parallel.layout import ParallelLayout
from uoe_parallel.training.optimizer import build_optimizer, parameter_groups, set_learning_rates

CPU = torch.device("cpu")
CUDA = torch.device("cuda")
"""Only named here: no test puts anything on it."""


class FusedAdam(torch.optim.AdamW):
    """Stands for apex's, which takes one argument more."""

    def __init__(self, params: Any, *, adam_w_mode: bool, **arguments: Any) -> None:
        super().__init__(params, **arguments)
        self.adam_w_mode = adam_w_mode


def _training(**changes: Any) -> TrainingConfig:
    fields = {"steps": 10, "global_batch_size": 1, "micro_batch_size": 1, "learning_rate": 0.5}
    return TrainingConfig.model_validate(fields | changes)


def _module(**shapes: tuple[int, ...]) -> nn.Module:
    module = nn.Module()
    for name, shape in shapes.items():
        module.register_parameter(name, nn.Parameter(torch.ones(shape)))
    return module


def _group_of_each_parameter() -> dict[str, list[str]]:
    config = tiny_config()
    groups = start_groups(ParallelLayout.from_config(config.parallel, 1))
    model = LanguageModel(
        config,
        groups,
        vocab_size=VOCAB_SIZE,
        used_vocab_size=USED_VOCAB_SIZE,
        backend=choose_backend(use_device(0).torch_device, torch.float32),
    )
    names = {param: name for name, param in model.named_parameters()}
    return {
        group["name"]: [names[param] for param in group["params"]]
        for group in parameter_groups(model, config.training)
    }


def test_every_parameter_of_the_model_is_in_its_group(ranks: Ranks) -> None:
    [groups] = ranks(1).run(_group_of_each_parameter)
    everything = [name for names in groups.values() for name in names]
    assert len(everything) == len(set(everything))
    kinds = {
        "router": {name for name in everything if "router" in name},
        "no_decay": {name for name in everything if "norm" in name or "bias" in name},
    }
    # 2 layers with 2 routed blocks and 2 norms each, and the norm of the head.
    assert len(kinds["router"]) == 4
    assert sum("norm" in name for name in kinds["no_decay"]) == 5
    assert any("bias" in name for name in kinds["no_decay"])
    kinds["decay"] = set(everything) - kinds["router"] - kinds["no_decay"]
    assert any("embedding" in name for name in kinds["decay"])
    assert {name: set(members) for name, members in groups.items()} == kinds


def test_groups_carry_their_decay_and_peak_rate() -> None:
    module = _module(weight=(2, 2), bias=(2,), router_weight=(2, 2))
    training = _training(weight_decay=0.25, router_learning_rate=0.125)
    fields = ("name", "weight_decay", "peak_lr", "lr")
    assert [tuple(g[f] for f in fields) for g in parameter_groups(module, training)] == [
        ("decay", 0.25, 0.5, 0.5),
        ("no_decay", 0.0, 0.5, 0.5),
        ("router", 0.0, 0.125, 0.125),
    ]


def test_routers_share_the_main_rate_unless_given_their_own() -> None:
    [group] = parameter_groups(_module(router_weight=(2, 2)), _training())
    assert group["peak_lr"] == 0.5


def test_groups_without_parameters_are_left_out() -> None:
    assert [group["name"] for group in parameter_groups(_module(bias=(2,)), _training())] == [
        "no_decay"
    ]


def test_every_group_follows_the_schedule_from_its_own_peak() -> None:
    module = _module(weight=(2, 2), router_weight=(2, 2))
    training = _training(
        router_learning_rate=0.125, min_learning_rate=0.05, warmup_steps=1, steps=11
    )
    optimizer, _ = build_optimizer(parameter_groups(module, training), training, CPU, 1)
    # Half way up, the peak, half way down from 1 to 0.1, and past the end.
    for step, factor in ((0, 0.5), (1, 1.0), (6, 0.55), (11, 0.1), (50, 0.1)):
        assert set_learning_rates(optimizer, step, training) == pytest.approx(0.5 * factor)
        rates = [group["lr"] for group in optimizer.param_groups]
        assert rates == pytest.approx([0.5 * factor, 0.125 * factor])


def test_only_the_decay_group_decays() -> None:
    """Without gradients AdamW's step is weight decay alone."""
    module = _module(weight=(2, 2), bias=(2,), router_weight=(2, 2))
    training = _training(weight_decay=0.1)
    optimizer, _ = build_optimizer(parameter_groups(module, training), training, CPU, 1)
    for param in module.parameters():
        param.grad = torch.zeros_like(param)
    optimizer.step()
    values = {name: param[0].detach().unique().item() for name, param in module.named_parameters()}
    assert values == {"weight": pytest.approx(1 - 0.5 * 0.1), "bias": 1.0, "router_weight": 1.0}


def _apex(monkeypatch: pytest.MonkeyPatch, **contents: object) -> None:
    """Make `import apex.optimizers` give a module of `contents`; none: as if not installed."""
    module = ModuleType("apex.optimizers")
    vars(module).update(contents)
    monkeypatch.setitem(sys.modules, "apex", ModuleType("apex"))
    monkeypatch.setitem(sys.modules, "apex.optimizers", module if contents else None)


def _built(device: torch.device) -> tuple[torch.optim.Optimizer, str]:
    training = _training(betas=(0.5, 0.75), eps=0.001)
    groups = parameter_groups(_module(weight=(2, 2)), training)
    optimizer, name = build_optimizer(groups, training, device, 1)
    [group] = optimizer.param_groups
    assert (group["betas"], group["eps"], group["lr"]) == ((0.5, 0.75), 0.001, 0.5)
    return optimizer, name


def test_apex_is_used_on_cuda_where_it_imports(monkeypatch: pytest.MonkeyPatch) -> None:
    _apex(monkeypatch, FusedAdam=FusedAdam)
    optimizer, name = _built(CUDA)
    assert isinstance(optimizer, FusedAdam) and optimizer.adam_w_mode
    assert [group["step"] for group in optimizer.param_groups] == [0], (
        "or a resumed run counts anew"
    )
    assert name == "apex.optimizers.FusedAdam"


def test_apex_is_not_used_on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    _apex(monkeypatch, FusedAdam=FusedAdam)
    optimizer, name = _built(CPU)
    assert type(optimizer) is torch.optim.AdamW and optimizer.defaults["fused"]
    assert name == "torch.optim.AdamW(fused=True)"


@pytest.mark.parametrize("contents", [{}, {"another": "project"}])
def test_torch_is_used_on_cuda_without_apex(
    monkeypatch: pytest.MonkeyPatch, contents: dict[str, object]
) -> None:
    _apex(monkeypatch, **contents)
    optimizer, name = _built(CUDA)
    assert type(optimizer) is torch.optim.AdamW and optimizer.defaults["fused"]
    assert name == "torch.optim.AdamW(fused=True)"


@pytest.mark.parametrize(("precision", "zero_stage"), [("fp32", 3), ("bf16", 3), ("bf16", 0)])
def test_apex_is_left_where_deepspeed_would_break_its_count_or_hide_its_masters(
    monkeypatch: pytest.MonkeyPatch, precision: str, zero_stage: int
) -> None:
    _apex(monkeypatch, FusedAdam=FusedAdam)
    training = _training(precision=precision)
    groups = parameter_groups(_module(weight=(2, 2)), training)
    _, name = build_optimizer(groups, training, CUDA, zero_stage)
    assert name == "torch.optim.AdamW(fused=True)"
