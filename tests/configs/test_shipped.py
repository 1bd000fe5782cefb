"""The YAML files that come with the package."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.harness import Ranks
from tests.programs import CHECKOUT, Outcome, call_program
from tests.tiny import write_corpus
from uoe_parallel.config.load import load_config
from uoe_parallel.config.schema import RoutedLayers, RunConfig
from uoe_parallel.parallel.layout import layout_faults

SHIPPED = sorted((CHECKOUT / "configs").glob("**/*.yaml"))
MOST_RANKS = 2

every_config = pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)


def test_there_are_configs() -> None:
    assert CHECKOUT / "configs" / "cpu_quickstart.yaml" in SHIPPED


@every_config
def test_config_loads_for_the_ranks_it_needs(path: Path) -> None:
    world_size = load_config(path).parallel.tensor
    load_config(path, checks=[lambda config: layout_faults(config, world_size)])


@every_config
def test_config_trains_when_it_is_shrunk(ranks: Ranks, tmp_path: Path, path: Path) -> None:
    config = load_config(path)
    tensor = min(config.parallel.tensor, MOST_RANKS)
    write_corpus(tmp_path / "corpus", 2000)
    arguments = ["--config", str(path), "--dry-run", *_shrunk(config, tensor, tmp_path / "corpus")]
    outcomes = ranks(tensor).run(call_program, *arguments)

    first, *others = outcomes
    assert (first.code, first.err) == (0, "")
    assert others == [Outcome(0, "", "")] * (tensor - 1)
    assert "nothing written" in first.out


def _shrunk(config: RunConfig, tensor: int, corpus: Path) -> list[str]:
    """Overrides that make the run tiny and leave what it chooses as it is."""
    model = config.model
    layers = 1 + max(
        _last(config.feed_forward.routed_layers), _last(config.attention.routed_layers)
    )
    return [
        f"run_dir={corpus.parent / 'run'}",
        f"parallel.tensor={tensor}",
        f"model.num_layers={min(model.num_layers, layers)}",
        f"model.hidden_size={8 * model.num_heads}",
        f"model.ffn_size={8 * config.feed_forward.num_experts}",
        "model.sequence_length=16",
        f"data.train={corpus}",
        "data.validation=null",
        "data.test=null",
        "training.validate_every=0",
        "training.global_batch_size=4",
        "training.micro_batch_size=2",
    ]


def _last(layers: RoutedLayers) -> int:
    return 1 if isinstance(layers, str) else max(layers, default=1)
