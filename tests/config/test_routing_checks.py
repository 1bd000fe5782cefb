"""Every rule about routing finds what it is for, and what just holds is no fault."""

from __future__ import annotations

from typing import Any

import pytest

from tests.config.test_checks import faults
from uoe_parallel.config.schema import RunConfig

SEGMENTS: dict[str, Any] = {"feed_forward__segment_length": 8, "feed_forward__segment_experts": 4}
ROUTED: dict[str, Any] = {"attention__routed_layers": "all"}

BROKEN: list[tuple[dict[str, Any], str]] = [
    (
        {"feed_forward__shared_experts": 8},
        (
            "feed_forward.shared_experts = 8 leaves none of feed_forward.num_experts = 8 to be "
            "routed; use at most 7"
        ),
    ),
    (
        {"feed_forward__top_k": 7, "feed_forward__shared_experts": 2},
        ("feed_forward.top_k = 7 is more than the 6 experts that are not shared; use at most 6"),
    ),
    (
        {**SEGMENTS, "feed_forward__top_k": 5},
        (
            "feed_forward.top_k = 5 is more than feed_forward.segment_experts = 4, those that a "
            "segment keeps; use at most 4"
        ),
    ),
    (
        {**SEGMENTS, "feed_forward__segment_experts": 9},
        (
            "feed_forward.segment_experts = 9 is more than the number of experts, "
            "feed_forward.num_experts = 8; use at most 8"
        ),
    ),
    (
        {"feed_forward__segment_length": 8},
        (
            "feed_forward.segment_length = 8 is given without feed_forward.segment_experts; give "
            "feed_forward.segment_experts, or remove it"
        ),
    ),
    (
        {**ROUTED, "attention__segment_experts": 2},
        (
            "attention.segment_experts = 2 is given without attention.segment_length; give "
            "attention.segment_length, or remove it"
        ),
    ),
    (
        {**SEGMENTS, "feed_forward__patch_length": 3},
        (
            "feed_forward.segment_length = 8 is not a multiple of feed_forward.patch_length = 3; "
            "use 9"
        ),
    ),
    (
        {**SEGMENTS, "feed_forward__segment_length": 64},
        (
            "feed_forward.segment_length = 64 makes one segment of a context of "
            "model.sequence_length = 64, and in a causal model the first segment keeps all "
            "experts; use at most 63"
        ),
    ),
    (
        {"feed_forward__selection": None},
        (
            "feed_forward.selection = null leaves the choice to segments, and "
            "feed_forward.segment_experts is not given; give feed_forward.segment_length and "
            'feed_forward.segment_experts, or use "top_k"'
        ),
    ),
    (
        {"feed_forward__selection": "topk"},
        'feed_forward.selection = "topk" has no rule "topk"; did you mean top_k?',
    ),
    (
        {**ROUTED, "attention__gate": "cosine"},
        (
            'attention.gate = "cosine" has no rule "cosine"; use one of sigmoid, softmax, '
            'softmax_of_chosen, relu, or a class as "module:Class"'
        ),
    ),
    (
        {"feed_forward__balance": ["bias", "bias"]},
        'feed_forward.balance = ["bias", "bias"] names "bias" twice; use ["bias"]',
    ),
    (
        {"feed_forward__gate": "not_a_module:Gate"},
        (
            'feed_forward.gate = "not_a_module:Gate" names a class that can\'t be imported '
            "(ModuleNotFoundError: No module named 'not_a_module'); write it as "
            '"module:Class", a class as docs/routing.md shows, where Python finds it'
        ),
    ),
    (
        {"feed_forward__selection": "expert_choice"},
        (
            'feed_forward.selection = "expert_choice" looks at later tokens to choose for earlier '
            "ones, which a causal model can't know when it predicts them; use top_k or threshold, "
            "or another model.task than next_token"
        ),
    ),
    (
        {"feed_forward__gate": "softmax_of_chosen", "feed_forward__top_k": 1},
        (
            'feed_forward.gate = "softmax_of_chosen" is 1 whatever the score where '
            "feed_forward.top_k = 1, without a gradient; use softmax, or feed_forward.top_k = 2"
        ),
    ),
    (
        {
            "feed_forward__gate": "softmax_of_chosen",
            "feed_forward__selection": None,
            **SEGMENTS,
            "feed_forward__segment_experts": 1,
        },
        (
            'feed_forward.gate = "softmax_of_chosen" is 1 whatever the score where '
            "feed_forward.segment_experts = 1, without a gradient; use softmax, or "
            "feed_forward.segment_experts = 2"
        ),
    ),
    (
        {
            "feed_forward__capacity_factor": 1.0,
            "feed_forward__selection": "expert_choice",
            "model__task": "masked_token",
        },
        (
            "feed_forward.capacity_factor = 1.0 is for rules that fill experts unevenly, and "
            "expert_choice balances them; leave it out, or use top_k"
        ),
    ),
    (
        {**SEGMENTS, "feed_forward__capacity_factor": 1.0, "feed_forward__selection": None},
        (
            "feed_forward.capacity_factor = 1.0 has nothing to limit: segments choose, and nothing "
            "of theirs is dropped; leave it out, or use top_k"
        ),
    ),
    (
        {
            "feed_forward__selection": "threshold",
            "feed_forward__balance": ["bias", "sequence_loss"],
        },
        (
            'feed_forward.balance = ["bias", "sequence_loss"] names bias, and threshold balances '
            'by itself; use ["sequence_loss"]'
        ),
    ),
    (
        {"feed_forward__selection": "fractions:Fraction"},
        (
            'feed_forward.selection = "fractions:Fraction" names a class without per_unit, '
            'looks_ahead, balances; write it as "module:Class", a class as docs/routing.md '
            "shows, where Python finds it"
        ),
    ),
    (
        {"feed_forward__gate": "softmax", "feed_forward__shared_experts": 7},
        (
            'feed_forward.gate = "softmax" is 1 whatever the score of the one expert of '
            "feed_forward that is routed; use sigmoid or relu, or route more experts"
        ),
    ),
    (
        {
            "feed_forward__gate": "softmax_of_chosen",
            "feed_forward__top_k": 1,
            "feed_forward__selection": "threshold",
        },
        (
            'feed_forward.gate = "softmax_of_chosen" is 1 whatever the score where '
            "feed_forward.top_k = 1, without a gradient; use softmax, or feed_forward.top_k = 2"
        ),
    ),
    (
        {"feed_forward__options": {"p": 0.5}},
        (
            'feed_forward.options = {"p": 0.5} is for rules of other packages, and none is named; '
            "remove it, or name a class in selection, gate or balance"
        ),
    ),
    (
        {"training__trains": "routers", "feed_forward__routed_layers": "none"},
        (
            'training.trains = "routers" leaves nothing to train, as no layer is routed; route '
            'layers, or use "all"'
        ),
    ),
    (
        {"distillation__weight": 0.5},
        (
            "distillation.weight = 0.5 has the model learn from its own weights, which "
            'training.trains = "all" moves; set training.trains to "routers", or use 0'
        ),
    ),
]


@pytest.mark.parametrize(("changes", "expected"), BROKEN)
def test_a_broken_rule_names_field_value_and_mend(changes: dict[str, Any], expected: str) -> None:
    assert expected in [str(fault) for fault in faults(**changes)]


@pytest.mark.parametrize(
    "changes",
    [
        {"feed_forward__shared_experts": 6},
        {**SEGMENTS, "feed_forward__top_k": 4, "feed_forward__patch_length": 4},
        {**SEGMENTS, "feed_forward__segment_length": 63},
        {
            **SEGMENTS,
            "feed_forward__segment_length": 64,
            "model__task": "masked_token",
        },
        {**SEGMENTS, "feed_forward__selection": None, "feed_forward__top_k": 8},
        {"feed_forward__selection": "expert_choice", "model__task": "masked_token"},
        {"feed_forward__selection": "expert_choice", "feed_forward__routed_layers": "none"},
        {"feed_forward__gate": "softmax_of_chosen"},
        {
            "feed_forward__selection": "threshold",
            "feed_forward__balance": ["bias"],
            **SEGMENTS,
        },
        {"feed_forward__gate": "softmax", "feed_forward__top_k": 1},
        {"feed_forward__balance": []},
        {"attention__selection": "nothing at all"},
        {"training__trains": "routers", "distillation__weight": 1.0},
        {
            "feed_forward__options": {"p": 0.5},
            "feed_forward__gate": "uoe_parallel.routing.gates.relu:ReluGate",
        },
    ],
)
def test_what_just_holds_is_no_fault(changes: dict[str, Any]) -> None:
    assert faults(**changes) == []


def test_rules_name_fields_that_exist() -> None:
    for changes, _ in BROKEN:
        for fault in faults(**changes):
            for field in fault.fields:
                section, name = field.split(".")
                inner = RunConfig.model_fields[section].annotation
                assert name in inner.model_fields  # pyright: ignore
