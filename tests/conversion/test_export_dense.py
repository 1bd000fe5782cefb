"""A merged checkpoint is the dense model of transformers that computes what all experts do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, models

from tests.conversion import dense_models
from tests.conversion.hugging_face import load, logits, transformers
from tests.conversion.saved_models import save_and_run
from tests.harness import Ranks
from tests.model.cases import random_tokens
from tests.tiny import USED_VOCAB_SIZE, tiny_config
from uoe_parallel.config.schema import RunConfig
from uoe_parallel.conversion.export_dense import merge
from uoe_parallel.conversion.program import main
from uoe_parallel.errors import UserError

GPT_2 = {"norm": "layer_norm", "positions": "learned", "num_kv_heads": 8, "norm_eps": 1e-6}
ROTARY = {"rope_type": "default", "rope_theta": 500.0}
NAME = "model.safetensors"
CASES: dict[str, dict[str, Any]] = {
    "LlamaForCausalLM": {"bias": False, "rope_base": 500.0, "norm_eps": 1e-3},
    "LlamaForCausalLM, biases, untied": {"tie_embeddings": False, "num_kv_heads": 8},
    "GPT2LMHeadModel": GPT_2 | {"activation": "gelu_tanh"},
    "GPT2LMHeadModel, plain gelu, untied": GPT_2 | {"activation": "gelu", "tie_embeddings": False},
}


def config_of(run: Path, **model: Any) -> RunConfig:
    return tiny_config(
        run_dir=str(run),
        model=model,
        parallel={"tensor": 2, "zero_stage": 0},
        training={"precision": "fp64"},
    )


def test_logits(ranks: Ranks, tmp_path: Path) -> None:
    configs = [config_of(tmp_path / f"{n}", **model) for n, model in enumerate(CASES.values())]
    expected, _ = ranks(2).run(save_and_run, configs, all_experts=True)
    for case, config, wanted in zip(CASES, configs, expected, strict=True):
        run = Path(config.run_dir)
        written = merge(run, run / "dense")
        model = load(run / "dense")
        assert type(model).__name__ == case.split(",")[0]
        assert model.config.vocab_size == USED_VOCAB_SIZE
        assert written.elements == sum(value.numel() for value in model.parameters())
        found = logits(model, random_tokens(config))
        # Llama takes means of squares in fp32 whatever the weights are.
        tolerance = 1e-5 if case.startswith("Llama") else 1e-10
        torch.testing.assert_close(found, wanted, rtol=0, atol=tolerance, msg=case)


IMPORTED: dict[str, dict[str, Any]] = {
    "gpt2": {"activation_function": "gelu"},
    "llama": {"attention_bias": True, "mlp_bias": True, "rope_parameters": ROTARY},
}


@pytest.mark.parametrize("kind", IMPORTED)
def test_there_and_back(ranks: Ranks, tmp_path: Path, kind: str) -> None:
    """What transformers saved, sliced into experts, merged and saved by transformers again is the
    same in every bit, and of the same config."""
    source, run = tmp_path / "source", tmp_path / "run"
    dense_models.save(dense_models.dense_model(kind, **IMPORTED[kind]), source)
    own_tokenizer().save(str(source / "tokenizer.json"))
    experts = ["feed_forward.num_experts=8", "attention.routed_layers=all", "attention.top_k=1"]
    assert ranks(1).run(main, ["import", str(source), str(run), *experts]) == [0]
    merge(run, tmp_path / "merged")
    load(tmp_path / "merged").save_pretrained(tmp_path / "again")
    before, after = load_file(source / NAME), load_file(tmp_path / "again" / NAME)
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    configs = [
        json.loads((tmp_path / folder / "config.json").read_text())
        for folder in ("source", "again")
    ]
    ends = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    assert configs[0] | ends == configs[1] | ends
    text, tokenizers = "bees and beads", transformers().AutoTokenizer
    merged = tokenizers.from_pretrained(tmp_path / "merged")
    assert merged(text).input_ids == own_tokenizer().encode(text).ids
    assert merged.eos_token == "</s>"


def own_tokenizer() -> Tokenizer:
    """Of as many ids as the dense models have."""
    letters = [chr(0x20 + n) for n in range(dense_models.VOCABULARY - 2)]
    tokenizer = Tokenizer(
        models.BPE(vocab={c: n for n, c in enumerate([*letters, "be"])}, merges=[("b", "e")])
    )
    tokenizer.add_special_tokens(["</s>"])
    return tokenizer


def test_precision_of_choice(ranks: Ranks, tmp_path: Path) -> None:
    config = config_of(tmp_path, bias=False)
    ranks(2).run(save_and_run, [config])
    written = merge(tmp_path, tmp_path / "out", "bf16")
    assert written.bytes == 2 * written.elements
    model = load(tmp_path / "out")
    assert {value.dtype for value in model.parameters()} == {torch.bfloat16}
    tokenizer = transformers().AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer("a").input_ids == [97]
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id == 256


def test_what_no_dense_model_computes(ranks: Ranks, tmp_path: Path) -> None:
    config = config_of(tmp_path, norm="layer_norm", num_kv_heads=4)
    ranks(2).run(save_and_run, [config])
    with pytest.raises(UserError) as told:
        merge(tmp_path, tmp_path / "out")
    assert "Llama has model.norm = rms_norm; GPT-2 has model.positions = learned, " in str(
        told.value
    )
    assert "as many key/value heads as heads. Use the subcommand export" in str(told.value)
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()
