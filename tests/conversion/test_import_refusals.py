"""What cannot be imported is named, with what to do, before anything is written."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from uoe_parallel.config.schema import RunConfig
from uoe_parallel.conversion.import_architectures import architecture_of
from uoe_parallel.conversion.import_config import imported_config
from uoe_parallel.conversion.import_sample import read_sample
from uoe_parallel.conversion.import_source import DenseSource
from uoe_parallel.data.tokenizer import ByteTokenizer
from uoe_parallel.errors import UserError

CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 257,
    "hidden_size": 8,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 16,
    "tie_word_embeddings": True,
}
BYTES = "data.tokenizer=bytes"


def tensors() -> dict[str, torch.Tensor]:
    layer = "model.layers.0"
    square = [f"{layer}.self_attn.{name}_proj" for name in "qkvo"]
    shapes = {
        "model.embed_tokens": (257, 8),
        "model.norm": (8,),
        f"{layer}.input_layernorm": (8,),
        f"{layer}.post_attention_layernorm": (8,),
        f"{layer}.mlp.gate_proj": (16, 8),
        f"{layer}.mlp.up_proj": (16, 8),
        f"{layer}.mlp.down_proj": (8, 16),
        **dict.fromkeys(square, (8, 8)),
    }
    return {f"{name}.weight": torch.zeros(shape) for name, shape in shapes.items()}


def write(folder: Path, config: dict[str, Any], **changed: torch.Tensor | None) -> Path:
    """A source with changed tensors, None for one that is missing."""
    kept = {name: value for name, value in (tensors() | changed).items() if value is not None}
    (folder / "config.json").write_text(json.dumps(CONFIG | config))
    save_file(kept, folder / "model.safetensors")
    return folder


def plan(folder: Path, *overrides: str) -> RunConfig:
    """What an import does before it reads weights."""
    source = DenseSource(folder)
    return imported_config(source, architecture_of(source), folder / "run", overrides)


def test_the_config_is_that_of_the_source(tmp_path: Path) -> None:
    config = plan(write(tmp_path, {}), BYTES, "model.sequence_length=8", "model.dropout=0.1")
    assert (config.model.hidden_size, config.model.ffn_size, config.model.kv_heads) == (8, 16, 2)
    assert (config.model.sequence_length, config.model.dropout) == (8, 0.1)
    assert config.model.norm_eps == 1e-6


@pytest.mark.parametrize(
    ("fields", "told"),
    {
        "type": ({"model_type": "bert"}, "model_type bert cannot be imported; it has to be one of"),
        "scaled": (
            {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}},
            "rope_scaling = .* scales rotary positions",
        ),
        "scaled, as transformers 5 says it": (
            {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}},
            "rope_parameters = .* scales rotary positions",
        ),
        "partly turned": ({"partial_rotary_factor": 0.5}, "turns a part of each head"),
        "wide heads": ({"head_dim": 8}, "head_dim = 8 is not hidden_size / num_attention_heads"),
        "activation": ({"hidden_act": "relu"}, "hidden_act = 'relu' is not one of silu"),
        "window": (
            {"model_type": "mistral", "sliding_window": 8},
            "sliding_window = 8 is shorter .* give model.sequence_length=8",
        ),
        "size": ({"num_hidden_layers": 0}, "num_hidden_layers = 0 is not a positive whole number"),
        "two at once": ({"hidden_act": "relu", "head_dim": 8}, "hidden_act .*\n.*head_dim"),
        "shapes": ({"intermediate_size": 24}, r"gate_proj.weight \[16, 8\] instead of \[24, 8\]"),
        "more layers": ({"num_hidden_layers": 2}, "is missing model.layers.1.input_layernorm"),
    }.values(),
)
def test_a_config_that_is_not_ours(tmp_path: Path, fields: dict[str, Any], told: str) -> None:
    with pytest.raises(UserError, match=f"(?s){told}"):
        plan(write(tmp_path, fields), BYTES)


def test_a_window_as_long_as_the_context_is_none(tmp_path: Path) -> None:
    write(tmp_path, {"model_type": "mistral", "sliding_window": 8})
    assert plan(tmp_path, BYTES, "model.sequence_length=8").model.sequence_length == 8


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"model.norm.weight": None}, "is missing model.norm.weight"),
        ({"adapter.weight": torch.zeros(1)}, "has no place for: adapter.weight"),
        ({"model.norm.weight": torch.zeros(8, dtype=torch.int8)}, "not a plain floating-point"),
    ],
)
def test_other_weights(tmp_path: Path, changed: dict[str, torch.Tensor | None], told: str) -> None:
    with pytest.raises(UserError, match=told):
        plan(write(tmp_path, {}, **changed), BYTES)


def truncate(folder: Path) -> None:
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[:-10])


def other_format(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def lost_shard(folder: Path) -> None:
    index = {"weight_map": {"model.norm.weight": "model-1.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def leads_away(folder: Path) -> None:
    index = {"weight_map": {"model.norm.weight": "../model.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def not_json(folder: Path) -> None:
    (folder / "config.json").write_text("{")


def no_config(folder: Path) -> None:
    (folder / "config.json").unlink()


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (truncate, "model.safetensors cannot be read: .*; download or save the model again"),
        (other_format, "has neither model.safetensors nor .*; save the model as safetensors"),
        (lost_shard, "model-1.safetensors cannot be read"),
        (leads_away, "names '../model.safetensors', which is not a file beside it"),
        (not_json, "config.json is not JSON"),
        (no_config, "config.json cannot be read: No such file"),
    ],
)
def test_damaged_folders(tmp_path: Path, damage: Callable[[Path], None], told: str) -> None:
    damage(write(tmp_path, {}))
    with pytest.raises(UserError, match=told):
        plan(tmp_path, BYTES)


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("model.hidden_size=16", "are those of model.hidden_size=8; leave the override out"),
        ("model.sequence_length=32", "are those of model.sequence_length=16"),
        ("run_dir=elsewhere", "run_dir=elsewhere: the run folder is"),
        ("feed_forward.num_experts=5", "is not a multiple of feed_forward.num_experts = 5"),
    ],
)
def test_overrides_that_do_not_fit(tmp_path: Path, override: str, told: str) -> None:
    with pytest.raises(UserError, match=told):
        plan(write(tmp_path, {}), BYTES, override)


def test_a_model_without_a_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has no tokenizer.json or tokenizer.model: save it there"):
        plan(write(tmp_path, {}))


def test_the_tokenizer_goes_with_the_run(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").touch()
    config = plan(write(tmp_path, {}))
    assert config.data.tokenizer == str(tmp_path / "run" / "tokenizer.json")


def test_a_sample_is_cut_into_windows_of_all_files(tmp_path: Path) -> None:
    files = [tmp_path / "a", tmp_path / "b"]
    files[0].write_text("a" * 5000)
    files[1].write_text("é" * 5000)
    sample = read_sample(files, ByteTokenizer(), 512, 32)
    # 256 bytes and an end of a document of each.
    windows = [*sample.studied, *sample.held_out]
    assert {tokens.shape[1] for tokens in windows} == {32}
    assert sample.num_tokens == 512
    ids = torch.cat([tokens.flatten() for tokens in windows])
    assert (ids == ord("a")).sum() == 256
    assert (ids == ByteTokenizer.eod).sum() == 1  # the other one is behind the last whole window
    assert len(sample.held_out[0]) == 2


def test_too_little_text(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("short")
    with pytest.raises(UserError, match="6 tokens are too few, at least 64 are needed"):
        read_sample([tmp_path / "a"], ByteTokenizer(), 512, 32)
    with pytest.raises(UserError, match=r"--text .*/b: No such file"):
        read_sample([tmp_path / "b"], ByteTokenizer(), 512, 32)
