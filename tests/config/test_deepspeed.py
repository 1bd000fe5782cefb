"""DeepSpeed's config says what ours says, and the passthrough cannot say otherwise."""

from __future__ import annotations

import json
from typing import Any

import pytest
from deepspeed.runtime.config import DeepSpeedConfig

from uoe_parallel.config.deepspeed import deepspeed_config, passthrough_faults
from uoe_parallel.config.schema import RunConfig


def run_config(
    precision: str = "fp32",
    zero_stage: int = 1,
    clipping: float = 1.0,
    passthrough: dict[str, Any] | None = None,
) -> RunConfig:
    return RunConfig.model_validate(
        {
            "run_dir": "runs",
            "model": {
                "num_layers": 1,
                "hidden_size": 8,
                "ffn_size": 8,
                "num_heads": 2,
                "sequence_length": 8,
            },
            "data": {"train": "train"},
            "training": {
                "steps": 1,
                "global_batch_size": 24,
                "micro_batch_size": 2,
                "learning_rate": 0.1,
                "precision": precision,
                "gradient_clipping": clipping,
            },
            "parallel": {"zero_stage": zero_stage},
            "deepspeed": passthrough or {},
        }
    )


def faults(config: RunConfig) -> list[str]:
    return [str(fault) for fault in passthrough_faults(config)]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
def test_deepspeed_reads_what_was_meant(precision: str, zero_stage: int) -> None:
    # Outside a process group DeepSpeed takes the number of data-parallel ranks to be 1.
    read = DeepSpeedConfig(deepspeed_config(run_config(precision, zero_stage), 1))
    assert read.train_batch_size == 24
    assert read.train_micro_batch_size_per_gpu == 2
    assert read.gradient_accumulation_steps == 12
    assert read.gradient_clipping == 1.0
    assert read.zero_optimization_stage == zero_stage
    assert read.bfloat16_config.enabled == (precision == "bf16")
    assert not read.float16_config.enabled
    assert read.zero_allow_untested_optimizer
    assert read.zero_force_ds_cpu_optimizer is False
    assert read.steps_per_print is None
    assert not read.wall_clock_breakdown
    # DeepSpeed refuses to accumulate bf16 gradients in fp32 without ZeRO.
    assert read.grad_accum_dtype == ("fp32" if precision == "bf16" and zero_stage else None)


def test_bf16_gradients_are_reduced_in_fp32() -> None:
    assert deepspeed_config(run_config("bf16"), 1)["communication_data_type"] == "fp32"


def test_clipping_is_written_when_off() -> None:
    assert deepspeed_config(run_config(clipping=0.0), 1)["gradient_clipping"] == 0.0


def test_accumulation_follows_from_the_data_parallel_size() -> None:
    derived = deepspeed_config(run_config(), 4)
    assert derived["gradient_accumulation_steps"] == 3
    assert derived["train_batch_size"] == 24


def test_the_config_is_json() -> None:
    derived = deepspeed_config(run_config("bf16"), 1)
    assert json.loads(json.dumps(derived)) == derived


def test_passthrough_adds_beside_and_inside_what_is_derived() -> None:
    config = run_config(
        passthrough={
            "comms_logger": {"enabled": True},
            "zero_optimization": {"stage": 1, "reduce_bucket_size": 1000},
            "steps_per_print": 5,
        }
    )
    assert faults(config) == []
    derived = deepspeed_config(config, 1)
    assert derived["comms_logger"] == {"enabled": True}
    assert derived["zero_optimization"] == {
        "stage": 1,
        "reduce_bucket_size": 1000,
        "ignore_unused_parameters": True,
    }
    assert derived["steps_per_print"] == 5
    assert DeepSpeedConfig(derived).zero_config.reduce_bucket_size == 1000


def test_passthrough_may_choose_how_bf16_gradients_travel() -> None:
    chosen = {"communication_data_type": "bf16", "data_types": {"param_dtype": "bf16"}}
    config = run_config("bf16", passthrough=chosen)
    assert faults(config) == []
    derived = deepspeed_config(config, 1)
    assert derived["communication_data_type"] == "bf16"
    assert derived["data_types"] == {"param_dtype": "bf16", "grad_accum_dtype": "fp32"}


def test_the_config_itself_stays_as_it_was() -> None:
    config = run_config(passthrough={"zero_optimization": {"overlap_comm": True}})
    deepspeed_config(config, 1)
    assert config.deepspeed == {"zero_optimization": {"overlap_comm": True}}


@pytest.mark.parametrize(
    ("key", "value", "derived", "source"),
    [
        ("train_batch_size", 8, "24", "training.global_batch_size"),
        ("train_micro_batch_size_per_gpu", "auto", "2", "training.micro_batch_size"),
        ("gradient_clipping", 0.5, "1.0", "training.gradient_clipping"),
        ("zero_optimization.stage", 2, "1", "parallel.zero_stage"),
        ("bf16.enabled", True, "false", "training.precision"),
        ("fp16.enabled", True, "false", "training.precision"),
    ],
)
def test_contradictions_name_the_derived_value(
    key: str, value: object, derived: str, source: str
) -> None:
    section, _, name = key.rpartition(".")
    config = run_config(passthrough={section: {name: value}} if section else {name: value})
    assert faults(config) == [
        (
            f"deepspeed.{key} = {json.dumps(value)} contradicts {derived}, which follows from "
            f"{source}; remove it and set {source} to what you want"
        )
    ]
    with pytest.raises(AssertionError):
        deepspeed_config(config, 1)


def test_settings_that_hold_for_every_run() -> None:
    config = run_config(passthrough={"zero_allow_untested_optimizer": False})
    assert faults(config) == [
        "deepspeed.zero_allow_untested_optimizer = false has to be true here; remove it"
    ]


@pytest.mark.parametrize("section", ["zero_optimization", "bf16", "data_types"])
def test_a_section_has_to_be_a_mapping(section: str) -> None:
    config = run_config("bf16", passthrough={section: True})
    assert faults(config) == [
        f"deepspeed.{section} = true is not a section; give its keys as a mapping or remove it"
    ]


@pytest.mark.parametrize(
    "key",
    [
        "optimizer",
        "scheduler",
        "gradient_accumulation_steps",
        "torch_autocast",
        "bfloat16",
        "activation_checkpointing",
    ],
)
def test_keys_that_are_never_deepspeeds(key: str) -> None:
    (fault,) = faults(run_config(passthrough={key: {}}))
    assert fault.startswith(f"deepspeed.{key} = {{}} ")
    assert ";" in fault
