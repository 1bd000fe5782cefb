"""The YAML files that come with the package."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.harness import Ranks
from tests.planning.cases import plan_alone
from tests.programs import CHECKOUT, Outcome, call_program
from tests.tiny import write_corpus
from uoe_parallel.config.load import load_config
from uoe_parallel.config.schema import RoutedLayers, RunConfig
from uoe_parallel.parallel.layout import layout_faults
from uoe_parallel.planning.hardware import load_hardware

SHIPPED = sorted((CHECKOUT / "configs").glob("*.yaml"))
CLUSTER = [path for path in SHIPPED if not path.stem.startswith("cpu_")]
MOST_RANKS = 2

every_config = pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)


def test_there_are_configs() -> None:
    assert CHECKOUT / "configs" / "cpu_quickstart.yaml" in SHIPPED


@every_config
def test_config_loads_for_the_ranks_it_needs(path: Path) -> None:
    world_size = _machines(path)[0] if path in CLUSTER else load_config(path).parallel.tensor
    load_config(path, checks=[lambda config: layout_faults(config, world_size)])


@pytest.mark.parametrize("path", CLUSTER, ids=lambda path: path.stem)
def test_cluster_config_is_planned_as_it_says(ranks: Ranks, path: Path) -> None:
    world_size, machine = _machines(path)
    config, hardware = load_config(path), load_hardware(machine)
    (plan,) = ranks(1).run(plan_alone, config, world_size, hardware)
    assert plan.fits
    # Routes that nobody wants must not end the run either.
    worst = hardware.needed(plan.fullest.worst_memory.peak)
    assert worst <= hardware.memory
    comment = " ".join(re.findall(r"^# ?(.*)$", path.read_text(), re.MULTILINE))
    even, skewed = (f"{size / 2**30:.2f} GiB" for size in (plan.needed, worst))
    routes = "any routing" if skewed == even else f"even routes and {skewed} at the worst"
    says = f"needs {even} of a device at {routes}"
    says += f", {plan.time.seconds:.2f} s a step, {plan.utilisation:.1%} of the peak."
    assert says in comment
    named = float(path.stem.partition("b_")[0])
    assert plan.parameters.total / 1e9 == pytest.approx(named, rel=0.05)


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


def _machines(path: Path) -> tuple[int, str]:
    """How many devices a config for a cluster is for, and which, by its name."""
    found = re.search(r"_(\d+)x(\w+)$", path.stem)
    assert found is not None, path
    return int(found[1]), found[2]


def _shrunk(config: RunConfig, tensor: int, corpus: Path) -> list[str]:
    """Overrides that make the run tiny and leave what it chooses as it is."""
    model = config.model
    layers = 1 + max(
        _last(config.feed_forward.routed_layers), _last(config.attention.routed_layers)
    )
    return [
        f"run_dir={corpus.parent / 'run'}",
        f"parallel.tensor={tensor}",
        "parallel.pipeline=1",
        "training.precision=fp32",
        f"model.num_layers={min(model.num_layers, layers)}",
        f"model.hidden_size={8 * model.num_heads}",
        f"model.ffn_size={8 * config.feed_forward.num_experts}",
        "model.sequence_length=16",
        f"data.train={corpus}",
        "data.tokenizer=bytes",
        "data.validation=null",
        "data.test=null",
        "training.validate_every=0",
        "training.global_batch_size=4",
        "training.micro_batch_size=2",
    ]


def _last(layers: RoutedLayers) -> int:
    return 1 if isinstance(layers, str) else max(layers, default=1)
