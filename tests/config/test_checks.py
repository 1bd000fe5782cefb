"""Every rule between fields finds what it is for, and its mend mends it."""

from __future__ import annotations

from typing import Any

import pytest

from uoe_parallel.config.checks import RULES
from uoe_parallel.config.faults import Fault
from uoe_parallel.config.schema import RunConfig

GOOD: dict[str, dict[str, Any]] = {
    "model": {
        "num_layers": 4,
        "hidden_size": 48,
        "ffn_size": 96,
        "num_heads": 12,
        "num_kv_heads": 4,
        "sequence_length": 64,
    },
    "data": {"train": "train"},
    "training": {
        "steps": 100,
        "global_batch_size": 12,
        "micro_batch_size": 4,
        "learning_rate": 0.01,
    },
    "parallel": {"tensor": 2},
}


def faults(**changes: object) -> list[Fault]:
    """Faults of the good config with `section__field` values changed."""
    tree = {section: dict(fields) for section, fields in GOOD.items()}
    for name, value in changes.items():
        section, field = name.split("__")
        tree.setdefault(section, {})[field] = value
    config = RunConfig.model_validate({"run_dir": "runs", **tree})
    return [fault for rule in RULES for fault in rule(config)]


def test_a_good_config_has_no_faults() -> None:
    assert faults() == []


BROKEN = [
    (
        {"model__hidden_size": 50},
        (
            "model.hidden_size = 50 is not a multiple of model.num_heads = 12; "
            "use 48 or 72, a multiple of 2 x model.num_heads"
        ),
    ),
    (
        {"model__hidden_size": 36},
        (
            "model.hidden_size = 36 makes heads 3 wide, and rotary positions need an even width; "
            "use 24 or 48, a multiple of 2 x model.num_heads"
        ),
    ),
    (
        {"model__hidden_size": 10},
        (
            "model.hidden_size = 10 is not a multiple of model.num_heads = 12; "
            "use 24, a multiple of 2 x model.num_heads"
        ),
    ),
    (
        {"model__hidden_size": 50, "model__positions": "learned"},
        (
            "model.hidden_size = 50 is not a multiple of model.num_heads = 12; "
            "use 48 or 60, or model.num_heads = 10"
        ),
    ),
    (
        {"model__num_kv_heads": 8},
        "model.num_kv_heads = 8 does not divide model.num_heads = 12; use 6",
    ),
    (
        {"model__num_kv_heads": 24},
        "model.num_kv_heads = 24 does not divide model.num_heads = 12; use 12",
    ),
    (
        {"model__ffn_size": 100},
        (
            "model.ffn_size = 100 is not a multiple of feed_forward.num_experts = 8; "
            "use 96 or 104, or feed_forward.num_experts = 10"
        ),
    ),
    (
        {"feed_forward__top_k": 9},
        (
            "feed_forward.top_k = 9 is more than the number of experts, "
            "feed_forward.num_experts = 8; use at most 8"
        ),
    ),
    (
        {"attention__top_k": 5, "attention__routed_layers": [0]},
        (
            "attention.top_k = 5 is more than the number of experts, model.num_kv_heads = 4; "
            "use at most 4"
        ),
    ),
    (
        {
            "attention__top_k": 13,
            "attention__routed_layers": "all",
            "model__num_kv_heads": None,
        },
        (
            "attention.top_k = 13 is more than the number of experts, model.num_heads = 12; "
            "use at most 12"
        ),
    ),
    (
        {"feed_forward__num_experts": 3},
        (
            "feed_forward.num_experts = 3 is not a multiple of parallel.tensor = 2; "
            "use 2 or 4, or parallel.tensor = 1"
        ),
    ),
    (
        {"model__num_kv_heads": 3},
        (
            "model.num_kv_heads = 3 is not a multiple of parallel.tensor = 2; "
            "use 2 or 4, or parallel.tensor = 1"
        ),
    ),
    (
        {"parallel__tensor": 8, "model__num_kv_heads": None},
        (
            "model.num_heads = 12 is not a multiple of parallel.tensor = 8; "
            "use 8 or 16, or parallel.tensor = 6"
        ),
    ),
    (
        {"model__vocab_multiple": 5},
        (
            "model.vocab_multiple = 5 is not a multiple of parallel.tensor = 2; "
            "use 4 or 6, or parallel.tensor = 1"
        ),
    ),
    (
        {"model__sequence_length": 63},
        (
            "model.sequence_length = 63 is not a multiple of parallel.tensor = 2; "
            "use 62 or 64, or parallel.tensor = 1"
        ),
    ),
    (
        {"feed_forward__routed_layers": [3, 4, -0, 9]},
        (
            "feed_forward.routed_layers = [3, 4, 0, 9] names [4, 9], and layers are counted from 0 "
            "to 3; use [0, 3]"
        ),
    ),
    (
        {"attention__routed_layers": [4]},
        (
            "attention.routed_layers = [4] names [4], and layers are counted from 0 to 3; "
            'name layers, or use "all" or "none"'
        ),
    ),
    (
        {"feed_forward__routed_layers": [1, 2, 1]},
        "feed_forward.routed_layers = [1, 2, 1] names a layer twice; use [1, 2]",
    ),
    (
        {"training__global_batch_size": 10},
        (
            "training.global_batch_size = 10 is not a multiple of training.micro_batch_size = 4; "
            "use 8 or 12, or training.micro_batch_size = 5"
        ),
    ),
    (
        {"training__min_learning_rate": 0.02},
        (
            "training.min_learning_rate = 0.02 is above training.learning_rate = 0.01; "
            "use at most 0.01, such as 0.001"
        ),
    ),
    (
        {"training__warmup_steps": 101},
        "training.warmup_steps = 101 is more than training.steps = 100; use at most 100",
    ),
    (
        {"profile__first_step": 91, "profile__steps": 10},
        (
            "profile.first_step = 91 and profile.steps = 10 reach beyond training.steps = 100; "
            "use at most 90, or fewer steps"
        ),
    ),
    (
        {"training__betas": (0.9, 1.0)},
        (
            "training.betas = [0.9, 1.0] holds a number outside [0, 1); "
            "use numbers such as [0.9, 0.95]"
        ),
    ),
    (
        {"training__betas": (-0.1, 0.5)},
        (
            "training.betas = [-0.1, 0.5] holds a number outside [0, 1); "
            "use numbers such as [0.9, 0.95]"
        ),
    ),
    (
        {"parallel__expert": 3},
        (
            "parallel.expert = 3 is not a multiple of parallel.tensor = 2; "
            "use 2 or 4, or parallel.tensor = 1"
        ),
    ),
    (
        {"parallel__expert": 4, "parallel__sequence_parallel": False},
        (
            "parallel.sequence_parallel = false leaves tokens on every tensor rank, and an expert "
            "group of 4 ranks would compute them 2 times; set it to true, or parallel.expert = 2"
        ),
    ),
    (
        {"parallel__expert": 16},
        (
            "feed_forward.num_experts = 8 is not a multiple of parallel.expert = 16; "
            "use 16, or parallel.expert = 8"
        ),
    ),
    (
        {"parallel__expert": 8, "attention__spread": "expert", "attention__routed_layers": "all"},
        (
            "model.num_kv_heads = 4 is not a multiple of parallel.expert = 8; "
            "use 8, or parallel.expert = 4"
        ),
    ),
    (
        {"parallel__pipeline": 2, "parallel__zero_stage": 2},
        (
            "parallel.zero_stage = 2 can't be combined with parallel.pipeline = 2: a pipeline adds "
            "up the gradients of its micro-batches before it reduces them, and DeepSpeed's ZeRO 2 "
            "and 3 cut gradients up in every backward pass; use 1, or parallel.pipeline = 1"
        ),
    ),
    (
        {"parallel__expert": 4, "parallel__zero_stage": 3},
        (
            "parallel.zero_stage = 3 can't be combined with parallel.expert = 4: ZeRO 3 cuts every "
            "parameter over all data-parallel ranks, and those of an expert group hold different "
            "experts; use 2, or parallel.expert = 2"
        ),
    ),
    (
        {"training__precision": "fp64"},
        (
            'parallel.zero_stage = 1 can\'t be combined with training.precision = "fp64": '
            "DeepSpeed's ZeRO keeps its masters in fp32; use 0"
        ),
    ),
    (
        {
            "training__precision": "fp64",
            "training__expert_products": "grouped",
            "parallel__zero_stage": 0,
        },
        (
            'training.expert_products = "grouped" can\'t be combined with training.precision = '
            '"fp64", which has no grouped product; use "loop" or "auto"'
        ),
    ),
    (
        {"parallel__pipeline": 5},
        "parallel.pipeline = 5 is more than model.num_layers = 4; use at most 4",
    ),
    (
        {"training__validate_every": 10},
        (
            "training.validate_every = 10 asks for validation passes, and data.validation is not "
            "given; give data.validation, or use 0"
        ),
    ),
    (
        {"model__num_classes": 3},
        (
            'model.num_classes = 3 means nothing to model.task = "next_token"; leave it out, or '
            'set model.task to "classification"'
        ),
    ),
    *(
        (
            {"model__task": "classification", "model__num_classes": classes},
            (
                f"model.num_classes = {shown} leaves nothing to tell apart, as model.task = "
                '"classification" is to; use the number of classes, 2 or more'
            ),
        )
        for classes, shown in ((None, "null"), (1, "1"))
    ),
    (
        {
            "model__task": "classification",
            "model__num_classes": 2,
            "data__reset_at_documents": True,
        },
        (
            'data.reset_at_documents = true means nothing to model.task = "classification", which '
            "reads one document a sequence; leave it out"
        ),
    ),
    (
        {"routes__replay": "a", "routes__compare": "b"},
        'routes.replay = "a" is given together with routes.compare; keep one of them',
    ),
    (
        {"routes__record": "a", "routes__replay": "b", "routes__compare": "c"},
        (
            'routes.record = "a" is given together with routes.replay and routes.compare; '
            "keep one of them"
        ),
    ),
    (
        {"routes__record": "runs/routes/../checkpoints"},
        (
            'routes.record = "runs/routes/../checkpoints" is the folder of the run\'s checkpoints; '
            'use another folder, such as "runs/routes"'
        ),
    ),
    (
        {"anomalies__spike": "roll_back"},
        (
            'anomalies.spike = "roll_back" goes back to checkpoints, and checkpoint.every = 0 '
            "writes none on the way; give checkpoint.every"
        ),
    ),
    (
        {"anomalies__not_finite": "roll_back", "checkpoint__every": 9, "routes__replay": "a"},
        (
            'anomalies.not_finite = "roll_back" passes over data, and then steps are no longer '
            'those of the record in routes.replay; use "skip", or leave routes.replay out'
        ),
    ),
    (
        {"replicas__on_mismatch": "repair", "checkpoint__every": 9},
        (
            'replicas.on_mismatch = "repair" finds nothing to repair, as replicas.check_every = 0 '
            "never compares; give replicas.check_every, or leave replicas.on_mismatch out"
        ),
    ),
    (
        {"deepspeed__train_batch_size": 3},
        (
            "deepspeed.train_batch_size = 3 contradicts 12, which follows from "
            "training.global_batch_size; remove it and set training.global_batch_size to what you "
            "want"
        ),
    ),
]


@pytest.mark.parametrize(("changes", "expected"), BROKEN)
def test_a_broken_rule_names_field_value_and_mend(changes: dict[str, Any], expected: str) -> None:
    assert expected in [str(fault) for fault in faults(**changes)]


@pytest.mark.parametrize(
    "changes",
    [
        {"feed_forward__top_k": 9, "feed_forward__routed_layers": "none"},
        {"feed_forward__top_k": 9, "feed_forward__routed_layers": []},
        {"attention__top_k": 5},
        {"parallel__expert": 8},
        {"parallel__expert": 8, "attention__spread": "expert"},
        {"parallel__expert": 2, "parallel__zero_stage": 3},
        {"parallel__pipeline": 4, "parallel__zero_stage": 1},
        {"model__sequence_length": 63, "parallel__sequence_parallel": False},
        {"training__min_learning_rate": 0.01, "training__warmup_steps": 100},
        {"training__betas": (0.0, 0.0)},
        {"training__validate_every": 10, "data__validation": "validation"},
        {"model__hidden_size": 24, "model__num_kv_heads": 12},
        {"profile__first_step": 90, "profile__steps": 10},
        {"profile__first_step": 101, "profile__steps": 0},
        {"routes__record": "runs/routes"},
        {"routes__replay": "runs/checkpoints"},
        {"anomalies__spike": "roll_back", "checkpoint__every": 9, "routes__record": "a"},
        {"anomalies__not_finite": "skip", "routes__compare": "a"},
        {"replicas__on_mismatch": "repair", "replicas__check_every": 1, "checkpoint__every": 9},
        {"model__task": "classification", "model__num_classes": 2},
        {"model__task": "masked_token", "data__reset_at_documents": True},
    ],
)
def test_what_just_holds_is_no_fault(changes: dict[str, Any]) -> None:
    assert faults(**changes) == []


def test_broken_rules_are_all_found_at_once() -> None:
    found = faults(model__hidden_size=50, model__vocab_multiple=5, training__warmup_steps=101)
    assert {fault.fields[0] for fault in found} == {
        "model.hidden_size",
        "model.vocab_multiple",
        "training.warmup_steps",
    }


def test_rules_name_fields_that_exist() -> None:
    for changes, _ in BROKEN:
        for fault in faults(**changes):
            for field in fault.fields:
                if field in RunConfig.model_fields:
                    continue
                section, name = field.split(".")
                if section != "deepspeed":
                    inner = RunConfig.model_fields[section].annotation
                    assert name in inner.model_fields  # pyright: ignore
