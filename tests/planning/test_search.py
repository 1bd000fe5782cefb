"""A search judges every layout, and finds what planning each of them would."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.harness import Ranks
from tests.planning.cases import machine, plan_alone, search_alone, search_by_force
from tests.tiny import tiny_config
from uoe_parallel.config import yaml_text
from uoe_parallel.config.load import load_config, save_config
from uoe_parallel.parallel.layout import candidate_layouts
from uoe_parallel.planning.search import SHORTLIST, Search

CONFIG = tiny_config(
    training={"global_batch_size": 8, "micro_batch_size": 4},
    deepspeed={"zero_optimization": {"reduce_bucket_size": 1000}},
)
# Memory that some layouts fit in as they are, some with recomputation, and some not at all; links
# that make none of the axes best by itself.
TIGHT = machine(devices_per_node=2, memory=340_000, flops={"fp32": 1e10}, memory_bandwidth=1e10)


def _judged(search: Search) -> int:
    return len(search.found) + sum(entry.count for entry in search.refused.values())


def test_agrees_with_planning_everything(ranks: Ranks) -> None:
    ((search, fastest),) = ranks(1).run(search_by_force, CONFIG, 4, TIGHT)
    assert {str(f.layout): f.time.seconds for f in search.found} == pytest.approx(fastest)
    assert search.best is not None
    assert search.best.time.seconds == pytest.approx(min(fastest.values()))
    seconds = [found.time.seconds for found in search.found]
    assert seconds == sorted(seconds)
    assert all(found.needed <= TIGHT.memory for found in search.found)
    assert _judged(search) == len(list(candidate_layouts(4)))
    # The case is one in which everything happens.
    assert {"none", "full"} <= {found.choice.recompute for found in search.found}
    assert any("too much memory" in reason for reason in search.refused)


def test_the_best_as_yaml_is_planned_as_it_was_found(ranks: Ranks, tmp_path: Path) -> None:
    search = ranks(1).run(search_alone, CONFIG, 4, TIGHT)[0]
    assert search.best is not None
    path = tmp_path / "run.yaml"
    save_config(CONFIG, path)
    tree = yaml_text.parse(path.read_bytes())
    for section, fields in yaml_text.parse(search.best.choice.as_yaml()).items():
        tree[section] |= fields
    path.write_text(yaml_text.dump(tree))
    config = load_config(path)
    assert config == search.best.choice.of(CONFIG)
    # And those whose ranks hold unequal parts.
    staged = [found for found in search.found if found.layout.pipeline > 1]
    assert staged
    for found in (search.best, *staged):
        planned = ranks(1).run(plan_alone, found.choice.of(CONFIG), 4, TIGHT)[0]
        assert planned.layout == found.layout
        peak = max(stage.worst_memory.peak for stage in planned.stages)
        if found in search.found[:SHORTLIST]:
            assert search.worst[search.found.index(found)] == TIGHT.needed(peak)
        assert planned.time == found.time
        assert planned.needed == found.needed


def test_reasons(ranks: Ranks) -> None:
    search = ranks(1).run(search_alone, CONFIG, 4, machine(devices_per_node=2, memory=1000))[0]
    assert search.best is None
    assert _judged(search) == len(list(candidate_layouts(4)))
    assert search.refused["tensor groups reach beyond a node of 2 devices"].count == 8
    zero = search.refused["the rules of parallel.zero_stage"]
    assert "parallel.zero_stage = " in zero.example
    memory = [entry for reason, entry in search.refused.items() if "too much memory" in reason]
    assert memory
    for entry in memory:
        assert entry.least is not None and entry.least > 1000
        assert "rank" in entry.example


def test_thousands_of_devices(ranks: Ranks) -> None:
    config = tiny_config(training={"global_batch_size": 1024}, feed_forward={"num_experts": 16})
    search = ranks(1).run(search_alone, config, 1024, machine())[0]
    assert search.found
    assert _judged(search) == len(list(candidate_layouts(1024)))
