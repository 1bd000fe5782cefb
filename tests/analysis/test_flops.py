"""What is computed for a rank is what torch's counter sees in its passes."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from tests.analysis.flop_cases import (
    Flops,
    forward_by_module,
    pass_of_a_model,
    step_of_a_trainer,
)
from tests.harness import Ranks
from tests.tiny import tiny_config, write_corpus
from uoe_parallel.analysis.flop_counter import flop_counter
from uoe_parallel.analysis.flops import Computation, attention_scores
from uoe_parallel.experts.backends import LoopBackend
from uoe_parallel.experts.padded import Keys

DENSE: dict[str, Any] = {"routed_layers": "none"}
FIRST: dict[str, Any] = {"routed_layers": [0]}
ALL_KEYS: dict[str, Any] = {"keys_and_values": "all"}
FULL: dict[str, Any] = {"recompute": "full"}
SELECTIVE: dict[str, Any] = {"recompute": "selective"}

CASES: dict[str, tuple[int, dict[str, Any]]] = {
    "one": (1, {}),
    "one full": (1, {"training": FULL}),
    "one selective all keys": (1, {"training": SELECTIVE, "attention": ALL_KEYS}),
    "one dropout": (1, {"model": {"attention_dropout": 0.1}, "attention": FIRST}),
    "long": (
        1,
        {
            "model": {"sequence_length": 1100, "hidden_size": 16, "num_heads": 4},
            "attention": {"top_k": 1, "shared_experts": 1},
            "training": {"micro_batch_size": 1},
        },
    ),
    "bidirectional": (
        1,
        {
            "model": {"task": "masked_token"},
            "attention": FIRST | {"selection": "expert_choice"},
            "feed_forward": {"patch_length": 3},
        },
    ),
    "bidirectional all keys": (
        1,
        {
            "model": {"task": "masked_token", "attention_dropout": 0.1, "tie_embeddings": False},
            "attention": ALL_KEYS,
        },
    ),
    "tp2-sp rules": (
        2,
        {
            "parallel": {"tensor": 2},
            "feed_forward": {"patch_length": 4, "capacity_factor": 1.0, "shared_experts": 1},
            "attention": {
                "segment_length": 4,
                "segment_experts": 3,
                "patch_length": 3,
                "selection": "threshold",
                "threshold_warmup": 0,
            },
            "training": FULL,
        },
    ),
    "tp2-sp": (2, {"parallel": {"tensor": 2}, "model": {"activation": "gelu"}}),
    "tp2": (
        2,
        {
            "parallel": {"tensor": 2, "sequence_parallel": False},
            "feed_forward": FIRST,
            "attention": FIRST | ALL_KEYS,
            "training": SELECTIVE,
        },
    ),
    "tp2-sp dense": (
        2,
        {
            "parallel": {"tensor": 2},
            "feed_forward": DENSE,
            "attention": DENSE,
            "training": SELECTIVE,
        },
    ),
    "dp2-ep2": (
        2,
        {
            "parallel": {"expert": 2},
            "attention": ALL_KEYS | {"spread": "expert"},
            "training": FULL,
        },
    ),
    "tp2-sp-dp2-ep4": (
        4,
        {"parallel": {"tensor": 2, "expert": 4}, "attention": {"spread": "expert"}},
    ),
}


IN_DOCUMENTS: dict[str, tuple[int, dict[str, Any]]] = {
    "tp2-sp dense": (2, {"parallel": {"tensor": 2}, "attention": DENSE, "training": SELECTIVE}),
    "tp2-sp-dp2-ep4": (
        4,
        {"parallel": {"tensor": 2, "expert": 4}, "attention": ALL_KEYS | {"spread": "expert"}},
    ),
    "patches": (1, {"feed_forward": {"patch_length": 3}, "attention": FIRST}),
}


def _summed(computed: list[Computation]) -> Flops:
    sums: Flops = defaultdict(int)
    for c in computed:
        phase = "forward" if c.phase == "forward" else "backward"
        sums[phase, "attention" if c.purpose == "attention" else "products"] += c.flops
    return dict(sums)


@pytest.mark.parametrize("name", CASES)
def test_as_counted(ranks: Ranks, name: str) -> None:
    world, sections = CASES[name]
    for counted, computed in ranks(world).run(pass_of_a_model, tiny_config(**sections)):
        assert _summed(computed) == counted


@pytest.mark.parametrize("name", IN_DOCUMENTS)
def test_documents(ranks: Ranks, name: str) -> None:
    world, sections = IN_DOCUMENTS[name]
    config = tiny_config(**sections, data={"train": "unused", "reset_at_documents": True})
    ids_BS = torch.tensor([[0] * 3 + [1] * 13, [2] * 9 + [3] * 6 + [-1]])
    for counted, computed in ranks(world).run(pass_of_a_model, config, ids_BS):
        assert _summed(computed) == counted


def test_classes(ranks: Ranks) -> None:
    model = {"task": "classification", "num_classes": 3}
    config = tiny_config(model=model, parallel={"tensor": 2})
    ids_BS = torch.tensor([[0] * 16, [0] * 5 + [-1] * 11])
    for counted, computed in ranks(2).run(pass_of_a_model, config, ids_BS):
        assert _summed(computed) == counted
        head = {c.phase: c.flops for c in computed if c.purpose == "head"}
        assert head == {"forward": 2 * 2 * 32 * 3, "backward": 2 * 2 * 2 * 32 * 3}


@pytest.mark.parametrize(
    ("parallel", "recompute"),
    [
        ({"pipeline": 2}, "none"),
        ({"pipeline": 2}, "full"),
        ({"tensor": 2, "expert": 4, "zero_stage": 2}, "selective"),
    ],
    ids=["pp2", "pp2 full", "tp2-sp-dp2-ep4 selective"],
)
def test_steps_of_a_trainer(
    ranks: Ranks, tmp_path: Path, parallel: dict[str, Any], recompute: str
) -> None:
    config = tiny_config(
        run_dir=str(tmp_path / "run"),
        data={"train": str(write_corpus(tmp_path / "corpus")), "reset_at_documents": True},
        parallel=parallel,
        training={"micro_batch_size": 1, "recompute": recompute},
    )
    heads = []
    world = config.parallel.expert or config.parallel.pipeline
    for counted, computed in ranks(world).run(step_of_a_trainer, config):
        assert sum(c.flops for c in computed) == counted
        heads.append(any(c.purpose == "head" for c in computed))
    assert heads == ([False, True] if config.parallel.pipeline == 2 else [True] * 4)


def test_purposes(ranks: Ranks) -> None:
    """By the modules that multiply."""
    config = tiny_config(feed_forward={"routed_layers": [0]}, attention={"routed_layers": [1]})
    [(_, computed)] = ranks(1).run(pass_of_a_model, config)
    [by_module] = ranks(1).run(forward_by_module, config)

    def counted(ending: str, kind: str = "products") -> int:
        ends = (n for name, n in by_module.items() if name.endswith(ending))
        return sum(flops.get(("forward", kind), 0) for flops in ends)

    forward = {c.purpose: c.flops for c in computed if c.phase == "forward"}
    assert forward.pop("head") == counted(".head")
    assert forward.pop("experts") == counted(".feed_forward.experts")
    assert forward.pop("attention projections") == counted(".attention.experts")
    assert forward.pop("attention") == counted(".attention.experts", "attention")
    tokens = 32
    assert forward.pop("routing statistics") == 2 * tokens * (8**2 + 4**2)
    assert forward.pop("routers") == 2 * tokens * 32 * (8 + 4)
    assert forward == {}


LENGTHS = {
    "none": [0, 0, 0],
    "one": [1],
    "classes": [1, 0, 7, 3, 90, 64, 65],
    "stretches": [256, 257, 1023, 0, 600],
}


@pytest.mark.parametrize("dropout", [False, True])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("name", LENGTHS)
def test_scores_of_runs(name: str, causal: bool, dropout: bool) -> None:
    lengths_G = torch.tensor(LENGTHS[name])
    heads, width = 3, 4
    q, k, v = (
        torch.randn(int(lengths_G.sum()), *shape, requires_grad=True)
        for shape in ((heads, width), (width,), (width,))
    )
    for keys_G in (None, lengths_G + 2):
        places = torch.cat([torch.arange(n) for n in lengths_G.tolist()])
        keys = None if keys_G is None else Keys(keys_G, places)
        pad = 0 if keys_G is None else int((keys_G - lengths_G).sum())
        forward, backward = flop_counter(), flop_counter()
        k_Md, v_Md = (F.pad(x, (0, 0, 0, pad)) for x in (k, v))
        with forward:
            y_NHd = LoopBackend().attention(
                q, k_Md, v_Md, lengths_G, causal=causal, keys=keys, dropout=0.1 * dropout
            )
        with backward:
            y_NHd.sum().backward()
        scores = attention_scores(lengths_G, keys_G, causal=causal, dropout=dropout, pads=True)
        product = 2 * scores * heads * width
        assert forward.get_total_flops() == 2 * product
        assert backward.get_total_flops() == (4 if dropout else 5) * product


def test_kernels_without_padding() -> None:
    def scores(keys: list[int] | None, *, causal: bool, dropout: bool = False) -> int:
        keys_G = None if keys is None else torch.tensor(keys)
        lengths_G = torch.tensor([3, 0, 600])
        return attention_scores(lengths_G, keys_G, causal=causal, dropout=dropout, pads=False)

    assert scores(None, causal=True) == scores(None, causal=False) == 9 + 600**2
    assert scores([5, 2, 700], causal=False) == 15 + 600 * 700
    # For which only padded kernels have a mask or dropout.
    assert scores([5, 5, 700], causal=True) == 2 * 3 * 5 + 600 * 700
    assert scores(None, causal=True, dropout=True) == 9 + 1 + 600**2
