"""The memory that is computed for a simulated rank is what a real one allocates."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.analysis.memory import first_stage_memory, kept_bytes, predict, watched_steps
from tests.harness import Ranks
from tests.tiny import GPT_2, tiny_config, write_corpus
from uoe_parallel.config.schema import RunConfig

DENSE: dict[str, Any] = {"routed_layers": "none"}
MODEL: dict[str, Any] = {
    "hidden_size": 128,
    "ffn_size": 512,
    "sequence_length": 256,
    "bias": False,
    "init_std": 0.02,
}
WIDE: dict[str, Any] = {"hidden_size": 256, "ffn_size": 1024, "sequence_length": 32}
"""Of which the states are the most."""
BF16: dict[str, Any] = {"hidden_size": 64, "ffn_size": 256, "sequence_length": 64}
ONCE: dict[str, Any] = {"global_batch_size": 2}
ONE_SEQUENCE: dict[str, Any] = {"micro_batch_size": 1}
QUERIES: dict[str, Any] = {"keys_and_values": "all"}

CASES: dict[str, tuple[int, dict[str, Any]]] = {
    "one": (1, {"parallel": {"zero_stage": 0}}),
    "one once": (1, {"parallel": {"zero_stage": 0}, "training": ONCE}),
    "dense": (
        1,
        {"parallel": {"zero_stage": 1}, "feed_forward": DENSE, "attention": DENSE},
    ),
    "dense gelu": (
        1,
        {
            "parallel": {"zero_stage": 0},
            "feed_forward": DENSE,
            "attention": DENSE,
            "model": {"activation": "gelu"},
        },
    ),
    "dense, GPT-2's parts": (
        1,
        {
            "parallel": {"zero_stage": 0},
            "feed_forward": DENSE,
            "attention": DENSE,
            "model": GPT_2,
        },
    ),
    "GPT-2's parts": (1, {"parallel": {"zero_stage": 1}, "model": GPT_2}),
    "tp2-sp, GPT-2's parts": (2, {"parallel": {"tensor": 2}, "model": GPT_2}),
    "dense selective": (
        1,
        {
            "parallel": {"zero_stage": 0},
            "feed_forward": DENSE,
            "attention": DENSE,
            "training": {"recompute": "selective"},
        },
    ),
    "dense full": (
        1,
        {
            "parallel": {"zero_stage": 0},
            "feed_forward": DENSE,
            "attention": DENSE,
            "training": {"recompute": "full"},
        },
    ),
    "queries": (1, {"parallel": {"zero_stage": 0}, "attention": QUERIES}),
    "attention": (
        1,
        {
            "parallel": {"zero_stage": 0},
            "feed_forward": DENSE,
            "model": {"ffn_size": 128},
            "attention": {"top_k": 3},
        },
    ),
    "bidirectional": (
        1,
        {
            "parallel": {"zero_stage": 0},
            "model": {"task": "masked_token", "ffn_size": 128},
            "attention": {"top_k": 4},
        },
    ),
    "selective": (1, {"parallel": {"zero_stage": 0}, "training": {"recompute": "selective"}}),
    "full": (1, {"parallel": {"zero_stage": 0}, "training": {"recompute": "full"}}),
    "bucket": (
        1,
        {
            "parallel": {"zero_stage": 1},
            "deepspeed": {"zero_optimization": {"reduce_bucket_size": 500_000_000}},
        },
    ),
    **{
        f"bf16 zero{stage}": (
            1,
            {
                "parallel": {"zero_stage": stage},
                "model": BF16,
                "training": ONE_SEQUENCE | {"precision": "bf16"},
            },
        )
        for stage in range(4)
    },
    **{
        f"dp2-zero{stage}": (2, {"parallel": {"zero_stage": stage}, "training": ONE_SEQUENCE})
        for stage in range(4)
    },
    **{
        f"dp2-zero{stage} states": (
            2,
            {"parallel": {"zero_stage": stage}, "training": ONE_SEQUENCE, "model": WIDE},
        )
        for stage in range(4)
    },
    **{
        f"dp2-zero{stage} states once": (
            2,
            {
                "parallel": {"zero_stage": stage},
                "training": ONE_SEQUENCE | ONCE,
                "model": WIDE,
            },
        )
        for stage in (1, 2, 3)
    },
    "tp2-sp": (2, {"parallel": {"tensor": 2}}),
    "tp2": (2, {"parallel": {"tensor": 2, "sequence_parallel": False, "zero_stage": 0}}),
    "tp2-sp dense": (
        2,
        {"parallel": {"tensor": 2, "zero_stage": 0}, "feed_forward": DENSE, "attention": DENSE},
    ),
    "tp2-sp queries": (2, {"parallel": {"tensor": 2, "zero_stage": 0}, "attention": QUERIES}),
    "tp2-sp selective": (2, {"parallel": {"tensor": 2}, "training": {"recompute": "selective"}}),
    "tp2-sp full": (2, {"parallel": {"tensor": 2}, "training": {"recompute": "full"}}),
    "dp2-ep2": (2, {"parallel": {"expert": 2}, "training": {"global_batch_size": 8}}),
    "pp2-zero0": (2, {"parallel": {"pipeline": 2, "zero_stage": 0}, "training": ONE_SEQUENCE}),
    "pp2-zero1": (2, {"parallel": {"pipeline": 2, "zero_stage": 1}, "training": ONE_SEQUENCE}),
    "tp2-sp-dp2-ep4": (
        4,
        {
            "parallel": {"tensor": 2, "expert": 4},
            "attention": {"spread": "expert"},
            "training": {"global_batch_size": 8},
        },
    ),
}


QUICK = (
    *("one once", "dense", "queries", "bf16 zero1", "dp2-zero2", "dp2-zero3 states"),
    *("tp2", "pp2-zero1", "tp2-sp-dp2-ep4"),
)
"""Cases that have something of all the others."""


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow) for name in CASES],
)
def test_peak_is_that_of_a_real_step(ranks: Ranks, tmp_path: Path, name: str) -> None:
    world, sections = CASES[name]
    config = _config(tmp_path, sections)
    watched = ranks(world).run(watched_steps, config)
    works = [[step.work for step in steps] for steps in watched]
    (predicted,) = ranks(1).run(predict, config, works)
    for steps, memories in zip(watched, predicted, strict=True):
        # Frees that nobody saw make one step or another look dearer than it was.
        ratios = [m.peak / step.peak for step, m in zip(steps, memories, strict=True)]
        assert 0.9 < max(ratios) < 1.1


@pytest.mark.parametrize(
    "name", ["dense", "dense gelu", "one", "queries", "bidirectional", "GPT-2's parts"]
)
def test_kept_is_what_autograd_keeps(ranks: Ranks, tmp_path: Path, name: str) -> None:
    _, sections = CASES[name]
    ((saved, computed),) = ranks(1).run(kept_bytes, _config(tmp_path, sections))
    assert abs(computed - saved) < 0.02 * saved


def test_any_rank_of_many(ranks: Ranks) -> None:
    """The first of four stages holds up to four micro-batches, and a GPU less of each."""
    config = tiny_config(
        model=MODEL | {"num_layers": 8, "hidden_size": 1024, "ffn_size": 4096, "num_heads": 16},
        parallel={"tensor": 2, "pipeline": 4, "expert": 4},
        training={"global_batch_size": 512, "micro_batch_size": 16, "precision": "bf16"},
    )
    run = ranks(1).run
    (found,) = run(first_stage_memory, config, 32, (None, 4, 3, 2), on_cuda=True)
    (default, four, three, two), states, kept = found
    assert default == four
    assert (four.weights, four.optimizer) == (states.weights, states.optimizer)
    assert four.moment == three.moment == two.moment == "backward"
    assert four.peak - three.peak == three.peak - two.peak == kept
    ((on_cpu,), _, kept_on_cpu) = run(first_stage_memory, config, 32, (4,), on_cuda=False)[0]
    assert kept < kept_on_cpu and four.peak < on_cpu.peak
    assert 0 < four.dispatch < four.activations


def _config(tmp_path: Path, sections: dict[str, Any]) -> RunConfig:
    corpus = write_corpus(tmp_path / "corpus", 20_000)
    model = MODEL | sections.get("model", {})
    small = {"zero_optimization": {"reduce_bucket_size": 50_000}}
    update = {"model": model, "data": {"train": str(corpus)}, "run_dir": str(tmp_path / "run")}
    return tiny_config(**{"deepspeed": small} | sections | update)
