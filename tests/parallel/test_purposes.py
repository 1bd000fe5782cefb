"""A collective knows what it is for, wherever it is called."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from tests.harness import Ranks
from tests.model.cases import start
from tests.tiny import tiny_config
from uoe_parallel.parallel.purposes import (
    Phase,
    Purpose,
    current_phase,
    current_purpose,
    during,
    labelled,
)
from uoe_parallel.parallel.random import recompute

GROUP, OTHER_GROUP = cast(ProcessGroup, object()), cast(ProcessGroup, object())
Told = list[tuple[Purpose | None, Purpose | None, Phase]]


def _now() -> tuple[Purpose | None, Purpose | None, Phase]:
    return current_purpose(GROUP), current_purpose(OTHER_GROUP), current_phase()


class _Telling(torch.autograd.Function):
    """Tells of itself where another would call a collective."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, told: Told) -> Tensor:
        ctx.told = told
        told.append(_now())
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        ctx.told.append(_now())
        return grad_outputs[0], None


def test_a_label_holds_in_both_passes_and_on_its_group_alone() -> None:
    told: Told = []
    x = torch.ones(2, requires_grad=True)
    with during("forward"):
        y = labelled(Purpose.HEAD, GROUP, _Telling.apply, x, told)
        y = _Telling.apply(y, told)
    y.sum().backward()
    told.append(_now())
    assert told == [
        (Purpose.HEAD, None, "forward"),
        (None, None, "forward"),
        (None, None, "backward"),
        (Purpose.HEAD, None, "backward"),
        (None, None, "step"),
    ]


def _recompute() -> Told:
    start(tiny_config())
    told: Told = []
    x = torch.ones(2, requires_grad=True)

    def function(x: Tensor) -> Tensor:
        return labelled(Purpose.HEAD, GROUP, _Telling.apply, x, told)

    with during("forward"):
        y = recompute(function, x)
    y.sum().backward()
    return told


def test_a_pass_that_is_repeated_in_backward_is_recomputation(ranks: Ranks) -> None:
    (told,) = ranks(1).run(_recompute)
    assert told == [(Purpose.HEAD, None, phase) for phase in ("forward", "recompute", "backward")]


def test_a_label_ends_with_its_function() -> None:
    def fail() -> None:
        raise KeyError

    with pytest.raises(KeyError):
        labelled(Purpose.HEAD, GROUP, fail)
    assert _now() == (None, None, "step")


def test_every_purpose_is_its_name() -> None:
    assert f"{Purpose.DISPATCH_ROWS}" == "dispatch rows" == Purpose.DISPATCH_ROWS
    assert Purpose("weights").category == "ZeRO"
    assert {purpose.category for purpose in Purpose} == {
        *("dispatch", "combine", "gather", "reduce", "pipeline", "gradient", "ZeRO", "control")
    }
