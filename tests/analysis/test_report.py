"""A simulated rank for people and for programs."""

from __future__ import annotations

import io
import json

import pytest

from tests.analysis.cases import simulate
from tests.harness import Ranks
from tests.tiny import tiny_config
from uoe_parallel.analysis.report import in_bytes, print_simulation, simulation_as_json
from uoe_parallel.analysis.simulate import Simulation


@pytest.fixture(scope="module")
def simulation(ranks: Ranks) -> Simulation:
    config = tiny_config(
        parallel={"tensor": 2, "pipeline": 2, "expert": 4, "zero_stage": 1},
        training={"global_batch_size": 32},
    )
    return ranks(1).run(simulate, config, 64, [37])[0][0]


def test_json_has_everything(simulation: Simulation) -> None:
    tree = json.loads(json.dumps(simulation_as_json(simulation)))
    assert tree["layout"]["name"] == "tp2-sp-pp2-dp16-ep4-zero1"
    assert tree["layout"]["world_size"] == 64
    assert tree["rank"] == 37
    assert tree["groups"]["tensor"] == [36, 37]
    assert tree["layers"] == [1]
    assert tree["states"]["weights"] == simulation.states.weights
    (norm,) = (p for p in tree["parameters"] if p["name"] == "final_norm.weight")
    assert norm["shard"] == {"shape": [32], "global_shape": [32], "offsets": [0]}
    assert sum(t["payload"] for t in tree["traffic"]) == sum(t.payload for t in simulation.traffic)


def test_tables_are_plain_text_in_a_file(simulation: Simulation) -> None:
    stream = io.StringIO()
    print_simulation(simulation, stream)
    text = stream.getvalue()
    assert "\x1b" not in text
    assert "Rank 37 of 64, tp2-sp-pp2-dp16-ep4-zero1: layers 1 to 1" in text
    for expected in (
        ["tensor", "2", "1", "36,", "37"],
        ["layers.1.feed_forward.experts.fc2.weight", "32", "x", "16", "32", "x", "64"],
        ["loss", "and", "gradient", "norm", "step", "world", "all_reduce", "1", "16", "B"],
    ):
        assert any(line.split()[: len(expected)] == expected for line in text.splitlines()), (
            expected
        )


@pytest.mark.parametrize(
    ("size", "shown"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1536, "1.50 KiB"),
        (3 * 2**30, "3.00 GiB"),
        (2**51, "2,048.00 TiB"),
    ],
)
def test_sizes_have_binary_prefixes(size: int, shown: str) -> None:
    assert in_bytes(size) == shown
