"""What transformers makes of exported checkpoints is what this package computes."""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from tests.conversion.hugging_face import load, logits
from tests.conversion.saved_models import save_and_run
from tests.harness import Ranks
from tests.model.cases import random_tokens
from tests.model.rules import CAUSAL_RULES
from tests.tiny import tiny_config
from uoe_parallel.config.schema import RunConfig
from uoe_parallel.conversion import export_folder
from uoe_parallel.conversion.export_uoe import _rounded_down, export
from uoe_parallel.errors import UserError

pytestmark = pytest.mark.usefixtures("own_caches")

GPT_2 = {"norm": "layer_norm", "positions": "learned", "activation": "gelu_tanh"}
MODES: list[dict[str, Any]] = [{}, {"keys_and_values": "all"}, {"routed_layers": [1]}]
CASES: dict[str, dict[str, Any]] = {
    **{
        rule: {"feed_forward": fields, "attention": fields | MODES[number % 3]}
        for number, (rule, fields) in enumerate(CAUSAL_RULES.items())
    },
    "GPT-2's parts": {"model": GPT_2, "attention": {"keys_and_values": "all"}},
    "no biases, untied": {"model": {"bias": False, "tie_embeddings": False, "activation": "gelu"}},
    "dense": {"attention": {"routed_layers": "none"}, "feed_forward": {"routed_layers": []}},
    "warm-up": {"feed_forward": {"selection": "threshold"}},
    "ties": {"model": {"router_init_std": 1e-320}},
}
FEW = (
    "patches with capacity",
    "segments, then patches",
    "segments, then thresholds",
    "shared with capacity",
    "bias",
    "softmax of chosen",
    "GPT-2's parts",
    "no biases, untied",
    "ties",
)
STEPWISE = ("patches with capacity", "segments, then patches", "GPT-2's parts")
PADDING = [0, 3, 7, 12]
"""Of the texts of a batch, before them."""


class Saved(NamedTuple):
    config: RunConfig
    logits_BSV: Tensor
    """fp64, on two ranks, which saved the model."""

    @property
    def run(self) -> Path:
        return Path(self.config.run_dir)


def config_of(run: Path, **sections: Any) -> RunConfig:
    layout = {"parallel": {"zero_stage": 0, "tensor": 2}, "training": {"precision": "fp64"}}
    return tiny_config(run_dir=str(run), **layout | sections)


def save_cases(ranks: Ranks, folder: Path, cases: Collection[str]) -> dict[str, Saved]:
    configs = [config_of(folder / f"{n}", **CASES[case]) for n, case in enumerate(cases)]
    found, _ = ranks(2).run(save_and_run, configs)
    return dict(zip(cases, map(Saved, configs, found), strict=True))


@pytest.fixture(scope="module")
def saved(ranks: Ranks, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Saved]:
    return save_cases(ranks, tmp_path_factory.mktemp("saved"), FEW)


@pytest.mark.parametrize("case", FEW)
def test_logits(saved: dict[str, Saved], tmp_path: Path, case: str) -> None:
    check_logits(saved[case], tmp_path / "out")


@pytest.mark.slow
def test_logits_under_all_rules(ranks: Ranks, tmp_path: Path) -> None:
    for case, model in save_cases(ranks, tmp_path, CASES.keys() - FEW).items():
        check_logits(model, tmp_path / case.replace(" ", "_"))


def check_logits(saved: Saved, out: Path) -> None:
    export(saved.run, out)
    found = logits(load(out), random_tokens(saved.config))
    torch.testing.assert_close(found, saved.logits_BSV, rtol=0, atol=1e-10)


@pytest.mark.parametrize("case", STEPWISE)
def test_texts_of_a_batch_that_grow_by_tokens(
    saved: dict[str, Saved], tmp_path: Path, case: str
) -> None:
    """With the cache, and padding before the texts or behind them, each has its own logits."""
    config, expected = saved[case]
    export(saved[case].run, tmp_path / "out")
    model = load(tmp_path / "out")
    tokens, length = random_tokens(config), config.model.sequence_length
    padding = torch.tensor(PADDING)
    place = torch.arange(length)
    before = place >= padding.unsqueeze(1)
    shifted = torch.stack([row.roll(n) for row, n in zip(tokens, PADDING, strict=True)])
    cache, parts = None, []
    for part in (slice(0, 13), *(slice(n, n + 1) for n in range(13, length))):
        mask = before[:, : part.stop]
        output = model(shifted[:, part], attention_mask=mask, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        parts.append(output.logits)
    found = torch.cat(parts, 1)
    behind = logits(model, tokens, attention_mask=place < length - padding.unsqueeze(1))
    for row, n in enumerate(PADDING):
        wanted = expected[row, : length - n]
        torch.testing.assert_close(found[row, n:], wanted, rtol=0, atol=1e-10)
        torch.testing.assert_close(behind[row, : length - n], wanted, rtol=0, atol=1e-10)


def test_generation(saved: dict[str, Saved], tmp_path: Path) -> None:
    """The likeliest tokens, with the cache, without it, and in beams."""
    config, _ = saved["segments, then patches"]
    export(saved["segments, then patches"].run, tmp_path / "out")
    model = load(tmp_path / "out")
    ids = random_tokens(config)[:2, :6]
    wanted = ids
    for _ in range(8):
        wanted = torch.cat((wanted, logits(model, wanted)[:, -1:].argmax(-1)), 1)
    rules = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    mask = torch.ones_like(ids)
    for use_cache in (True, False):
        found = model.generate(ids, attention_mask=mask, use_cache=use_cache, **rules)
        assert torch.equal(found, wanted)
    beams = [
        model.generate(ids, attention_mask=mask, use_cache=use_cache, num_beams=3, **rules)
        for use_cache in (True, False)
    ]
    assert torch.equal(*beams)


def test_loss_is_the_mean_cross_entropy_of_next_tokens(
    saved: dict[str, Saved], tmp_path: Path
) -> None:
    config, expected = saved["bias"]
    export(saved["bias"].run, tmp_path / "out")
    model, tokens = load(tmp_path / "out"), random_tokens(config)
    loss = model(tokens, labels=tokens).loss
    loss.backward()
    wanted = torch.nn.functional.cross_entropy(
        expected[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()
    )
    torch.testing.assert_close(loss.double(), wanted, rtol=1e-5, atol=0)
    assert all(param.grad.count_nonzero() for param in model.parameters())


def test_halved_precision_keeps_routers_whole(saved: dict[str, Saved], tmp_path: Path) -> None:
    run = saved["segments, then thresholds"].run
    written = export(run, tmp_path / "out", "bf16")
    assert written.bytes < 1.1 * 2 * written.elements
    model = load(tmp_path / "out")
    dtypes = {name: value.dtype for name, value in model.state_dict().items()}
    whole = {name for name, dtype in dtypes.items() if dtype is torch.float32}
    assert whole == {name for name in dtypes if ".routers." in name}
    assert set(dtypes.values()) == {torch.float32, torch.bfloat16}
    found = logits(model, random_tokens(saved["bias"].config))
    assert found.dtype is torch.bfloat16 and found.isfinite().all()


def test_files_of_a_bounded_size(
    saved: dict[str, Saved], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, expected = saved["no biases, untied"]
    monkeypatch.setattr(export_folder, "SHARD_BYTES", 100_000)
    written = export(Path(config.run_dir), tmp_path / "out")
    files = sorted((tmp_path / "out").glob("model-*.safetensors"))
    assert len(files) == written.files > 2
    assert all(file.stat().st_size < 110_000 for file in files)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == written.bytes
    found = logits(load(tmp_path / "out"), random_tokens(config))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)


def test_thresholds_let_the_same_scores_pass_when_they_are_rounded() -> None:
    generator = torch.Generator().manual_seed(0)
    threshold = torch.randn(1000, dtype=torch.float64, generator=generator)
    threshold[:10] = threshold[:10].float().double()
    threshold[-1] = -torch.inf
    near = threshold.float()
    infinity = torch.full_like(near, torch.inf)
    scores = torch.stack((near.nextafter(-infinity), near, near.nextafter(infinity)))
    rounded = _rounded_down(threshold, torch.float32)
    assert rounded.dtype is torch.float32
    assert torch.equal(scores > rounded, scores > threshold)
    assert not torch.equal(scores > near, scores > threshold)


def test_what_is_there_already_stays(saved: dict[str, Saved], tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    with pytest.raises(UserError, match="is there already; name a new folder"):
        export(saved["bias"].run, tmp_path / "out")
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["mine"]
