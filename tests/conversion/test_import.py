"""Dense models of transformers become unions of experts that compute the same."""

from __future__ import annotations

import io
import re
import shutil
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import ByteLevelBPETokenizer
from torch import Tensor

from tests.conversion import dense_models
from tests.conversion.hugging_face import load
from tests.harness import Ranks
from tests.programs import Outcome
from uoe_parallel.checkpoint import locate_checkpoint
from uoe_parallel.conversion.export_dense import merge
from uoe_parallel.conversion.program import main
from uoe_parallel.data.tokenizer import build_tokenizer
from uoe_parallel.inference.opening import opened, saved_config

ROUTED = ("feed_forward.num_experts=8", "attention.routed_layers=all", "attention.top_k=1")
TEXT = "".join(f"{n} men walked {n * n} miles; {n % 7} of them came back. " for n in range(200))

CASES: dict[str, tuple[str, dict[str, Any], bool]] = {
    "llama, grouped queries, own head": ("llama", {}, False),
    "llama, biases in attention, tied head": (
        "llama",
        {
            "attention_bias": True,
            "tie_word_embeddings": True,
            "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
        },
        True,
    ),
    "gpt2": ("gpt2", {}, False),
    "gpt2, gelu, own head": (
        "gpt2",
        {"activation_function": "gelu", "tie_word_embeddings": False},
        True,
    ),
    "mistral": ("mistral", {"sliding_window": None}, True),
}
"""Which model, what of it, and whether neurons move and routers are fitted."""


def call(*arguments: str) -> Outcome:
    """The program, on a rank."""
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        code = main(arguments)
    return Outcome(code, out.getvalue(), err.getvalue())


def all_on(run: str, tokens_BS: Tensor, overrides: list[str]) -> Tensor:
    """Logits with all experts on, of the layout that the overrides say."""
    with opened(Path(run), overrides) as model, torch.no_grad(), model.model.all_experts():
        return model.logits(tokens_BS)


@pytest.mark.parametrize(
    "case",
    [
        *list(CASES)[:3],
        *(pytest.param(case, marks=pytest.mark.slow) for case in list(CASES)[3:]),
    ],
)
def test_all_experts_compute_the_dense_model(ranks: Ranks, tmp_path: Path, case: str) -> None:
    kind, fields, studies = CASES[case]
    model = dense_models.dense_model(kind, **fields)
    source = dense_models.save(model, tmp_path / "source", shard_size="30KB")
    assert (source / "model.safetensors.index.json").exists()
    run, text = tmp_path / "run", tmp_path / "text"
    text.write_text(TEXT)
    how = ["--slices", "clusters", "--routers", "activation", "--text", str(text)]
    arguments = ["import", str(source), str(run), "data.tokenizer=bytes", *ROUTED]
    [outcome] = ranks(1).run(call, *arguments, *(how if studies else ()))
    assert (outcome.code, outcome.err) == (0, "")
    assert ("loss held out" in outcome.out) == studies
    tokens_BS = dense_models.random_tokens()
    expected = dense_models.logits(model, tokens_BS)
    layouts = [[], ["parallel.tensor=2"]]
    if kind == "gpt2":
        layouts.append(["parallel.pipeline=2"])
    for layout in layouts:
        for found in ranks(2 if layout else 1).run(all_on, str(run), tokens_BS, layout):
            difference = (found - expected).abs().max() / expected.abs().max()
            assert difference < 1e-5, (layout, difference)
    if not studies:
        merge(run, tmp_path / "merged", None)
        back = load(tmp_path / "merged").state_dict()
        original = load(source).state_dict()
        assert back.keys() == original.keys()
        assert all(torch.equal(back[name], value) for name, value in original.items())


def test_text_chooses_better_experts_than_chance(ranks: Ranks, tmp_path: Path) -> None:
    """On a model that has learned something, with a quarter of each block active."""
    source, text = tmp_path / "source", tmp_path / "text"
    text.write_text(TEXT)
    model = dense_models.dense_model("llama", hidden_size=48, intermediate_size=192)
    dense_models.train(model, TEXT, steps=60)
    dense_models.save(model, source)
    losses: dict[str, tuple[float, float]] = {}
    for slices, routers in (("contiguous", "random"), ("clusters", "activation")):
        arguments = ["data.tokenizer=bytes", "feed_forward.num_experts=16"]
        arguments += ["feed_forward.top_k=4", "--text", str(text), "--tokens", "6000"]
        arguments += ["--slices", slices, "--routers", routers]
        [outcome] = ranks(1).run(call, "import", str(source), str(tmp_path / slices), *arguments)
        assert outcome.code == 0, outcome.err
        dense, routed = re.findall(r"(\d+\.\d+) (?:nats/token|as it is)", outcome.out)
        losses[slices] = float(dense), float(routed)
    (dense, by_chance), (same, by_text) = losses.values()
    assert dense == pytest.approx(same, abs=2e-4)  # of the same function, rounded
    assert dense < by_text
    assert by_text - dense < (by_chance - dense) / 2


def test_gates_begin_near_one(ranks: Ranks, tmp_path: Path) -> None:
    """Of all levels, with shared experts left out of their routers."""
    source = dense_models.save(dense_models.dense_model("gpt2"), tmp_path / "source")
    text = tmp_path / "text"
    text.write_text(TEXT)
    levels = ["feed_forward.segment_length=8", "feed_forward.segment_experts=4"]
    how = ["--routers", "activation", "--text", str(text), "feed_forward.shared_experts=2"]
    arguments = [str(source), str(tmp_path / "run"), "data.tokenizer=bytes", *levels, *how]
    [outcome] = ranks(1).run(call, "import", *arguments)
    assert outcome.code == 0, outcome.err
    reader = locate_checkpoint(tmp_path / "run", None)
    patches, segments = (
        reader.read(f"layers.0.feed_forward.{level}/weight")
        for level in ("router_weight", "segment_router_weight")
    )
    assert patches.shape == (6, 32)
    assert torch.equal(patches, segments)
    [(lowest, highest)] = ranks(1).run(range_of_gates, str(tmp_path / "run"))
    assert 0.7 < lowest < 0.99
    assert 1.01 < highest < 1.3


def range_of_gates(run: str) -> tuple[float, float]:
    """Of the experts that tokens of the sample visit in the first layer."""
    seen: list[Tensor] = []
    with opened(Path(run)) as model, torch.no_grad():
        [block] = [
            b for name, b in model.model.routed_blocks().items() if name.startswith("layers.0")
        ]
        level = block.router.levels["router_weight"]
        gate = level.gate

        def watched(scores_SBE: Tensor, mask_SBE: Tensor) -> Tensor:
            gates_SBE = gate(scores_SBE, mask_SBE)
            seen.append(gates_SBE[mask_SBE])
            return gates_SBE

        level.gate = watched
        ids = torch.from_numpy(model.tokenizer.encode(TEXT)[:1024])
        model.logits(ids.view(-1, dense_models.CONTEXT))
    gates = torch.cat(seen)
    return float(gates.min()), float(gates.max())


def test_a_tokenizer_of_another_size(ranks: Ranks, tmp_path: Path) -> None:
    """A new id gets the mean of all rows, and padding has no part in any softmax."""
    model = dense_models.dense_model("gpt2", vocab_size=250)
    source = dense_models.save(model, tmp_path / "source")
    run = tmp_path / "run"
    [outcome] = ranks(1).run(call, "import", str(source), str(run), "data.tokenizer=bytes")
    assert outcome.code == 0, outcome.err
    assert "7 ids of the tokenizer are new" in outcome.out
    rows = locate_checkpoint(run, None).read("embedding.tokens.weight/weight")
    original = model.transformer.wte.weight.detach()
    assert rows.shape == (264, 32)
    assert torch.equal(rows[:250], original)
    torch.testing.assert_close(rows[250:257], original.mean(0).expand(7, -1))
    assert not rows[257:].any()


def test_a_half_precision_model_stays_one(ranks: Ranks, tmp_path: Path) -> None:
    model = dense_models.dense_model("llama").bfloat16()
    source = dense_models.save(model, tmp_path / "source")
    run = tmp_path / "run"
    [outcome] = ranks(1).run(call, "import", str(source), str(run), "data.tokenizer=bytes")
    assert outcome.code == 0, outcome.err
    reader = locate_checkpoint(run, None)
    assert saved_config(run).training.precision == "bf16"
    weight = reader.read("layers.1.attention.experts.output.weight/weight")
    assert torch.equal(weight, model.model.layers[1].self_attn.o_proj.weight.detach())
    assert reader.dtype("layers.1.feed_forward.router_weight/weight") is torch.float32


def test_the_tokenizer_comes_along(ranks: Ranks, tmp_path: Path) -> None:
    trained = ByteLevelBPETokenizer()
    trained.train_from_iterator([TEXT], vocab_size=280, special_tokens=["<|endoftext|>"])
    model = dense_models.dense_model("llama", vocab_size=trained.get_vocab_size())
    source = dense_models.save(model, tmp_path / "source")
    trained.save(str(source / "tokenizer.json"))
    run = tmp_path / "run"
    [outcome] = ranks(1).run(call, "import", str(source), str(run))
    assert outcome.code == 0, outcome.err
    assert "vocabulary" not in outcome.out
    # Which the model is from now on opened with, wherever the source is.
    shutil.rmtree(source)
    tokenizer = build_tokenizer(saved_config(run).data.tokenizer)
    reader = locate_checkpoint(run, None)
    assert reader.state["tokenizer"] == tokenizer.fingerprint
    assert reader.shape("embedding.tokens.weight/weight") == (280, 32)
    assert tokenizer.decode(tokenizer.encode(TEXT)) == TEXT


def test_a_run_folder_is_not_written_over(ranks: Ranks, tmp_path: Path) -> None:
    (tmp_path / "checkpoints" / "step-00000003").mkdir(parents=True)
    [outcome] = ranks(1).run(call, "import", "anywhere", str(tmp_path))
    assert outcome.code == 2
    assert f"{tmp_path} already has checkpoints" in outcome.err


def test_studies_need_text(ranks: Ranks, tmp_path: Path) -> None:
    arguments = ("import", "anywhere", str(tmp_path), "--slices", "clusters")
    [outcome] = ranks(1).run(call, *arguments)
    assert outcome.code == 2
    assert "--text FILE" in outcome.err


def test_an_import_is_one_process(ranks: Ranks, tmp_path: Path) -> None:
    for outcome in ranks(2).run(call, "import", "anywhere", str(tmp_path)):
        assert (outcome.code, outcome.out) == (2, "")
        assert "start it without a launcher" in outcome.err
