"""What is wrong on one node only is told once, and ends all ranks."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Sequence
from pathlib import Path
from unittest import mock

import pytest

from tests.harness import Ranks
from tests.programs import Outcome, call_program, only_complaint, write_run
from uoe_parallel import pretrain
from uoe_parallel.parallel import sameness
from uoe_parallel.parallel.agreement import first_difference
from uoe_parallel.parallel.groups import distributed

SECONDS = 30
HOST = socket.gethostname()
RULE = """
from uoe_parallel.routing.gates.sigmoid import SigmoidGate

class Gate(SigmoidGate):
    pass
"""


def _call(arguments: Sequence[Sequence[str | Path]], paths: Sequence[Path] = ()) -> Outcome:
    """Call the program with rank r's `arguments`[r], and modules in `paths`[r]."""
    rank = int(os.environ["RANK"])
    more = [str(paths[rank])] if paths else []
    with mock.patch.object(sys, "path", [*more, *sys.path]):
        return call_program(*arguments[rank])


@pytest.mark.parametrize("lacking", [0, 1])
def test_config_that_one_node_lacks(ranks: Ranks, tmp_path: Path, lacking: int) -> None:
    arguments = [["--config", write_run(tmp_path)]] * 2
    arguments[lacking] = ["--config", tmp_path / "missing.yaml"]
    message = only_complaint(ranks(2).run(_call, arguments, timeout=SECONDS))
    assert f"{tmp_path / 'missing.yaml'}: no such file" in message
    assert (f"(seen by rank 1 on {HOST})" in message) == (lacking == 1)
    assert not (tmp_path / "run").exists()


def test_module_that_one_node_lacks(ranks: Ranks, tmp_path: Path) -> None:
    (tmp_path / "own_gate.py").write_text(RULE)
    arguments = ["--config", write_run(tmp_path), "feed_forward.gate=own_gate:Gate"]
    nodes = [tmp_path, tmp_path / "bare"]
    message = only_complaint(ranks(2).run(_call, [arguments] * 2, nodes, timeout=SECONDS))
    for word in ("feed_forward.gate", "No module named 'own_gate'", f"rank 1 on {HOST}"):
        assert word in message


def test_configs_that_differ(ranks: Ranks, tmp_path: Path) -> None:
    """In a field that would have the ranks build other groups."""
    arguments = ["--config", write_run(tmp_path, parallel={"tensor": 2})]
    others = [*arguments, "parallel.tensor=1", "seed=8"]
    outcomes = ranks(2).run(_call, [arguments, others], timeout=SECONDS)
    assert (
        "ranks have different configs: seed is 7 on rank 0 "
        f"({HOST}), 8 on rank 1 ({HOST}). Start all"
    ) in only_complaint(outcomes)


def _call_with_other_code(config: Path) -> Outcome:
    digests = sameness.source_digests()
    assert "uoe_parallel/training/trainer.py" in digests
    if os.environ["RANK"] == "2":
        digests["uoe_parallel/training/trainer.py"] = "0123"
    with mock.patch.object(sameness, "source_digests", return_value=digests):
        return call_program("--config", config)


def test_code_that_differs(ranks: Ranks, tmp_path: Path) -> None:
    config = write_run(tmp_path, training={"global_batch_size": 6})
    message = only_complaint(ranks(3).run(_call_with_other_code, config, timeout=SECONDS))
    for word in ("different code: the checksum of uoe_parallel/training/trainer.py", "ranks 0, 1"):
        assert word in message
    assert f'"0123" on rank 2 ({HOST})' in message


def test_rank_that_nobody_hears_tells_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def nobody(timeout: object) -> None:
        raise RuntimeError(f"nobody came in {timeout}")

    monkeypatch.setattr(pretrain, "distributed", nobody)
    monkeypatch.setenv("WORLD_SIZE", "2")
    told = []
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        assert pretrain.main(["--config", str(tmp_path / "missing.yaml")]) == 2
        told.append(capsys.readouterr().err)
    assert told[1] == told[0].rstrip() + f" (seen by rank 1 on {HOST})\n"


def _difference() -> str | None:
    rank = int(os.environ["RANK"])
    with distributed():
        import torch.distributed as dist

        assert first_difference({"a": 1, "b": [2]}, dist.group.WORLD) is None
        values = {"a": 1} | ({"b": {"c": rank // 2}} if rank else {})
        found = first_difference(values, dist.group.WORLD)
        assert found is not None
        assert [list(ranks) for _, ranks in found.holders] == [[0], [1], [2]]
        return str(found)


def test_differences_name_values_and_ranks(ranks: Ranks) -> None:
    here = f"({HOST})"
    told = f'b is null on rank 0 {here}, {{"c": 0}} on rank 1 {here}, {{"c": 1}} on rank 2 {here}'
    assert ranks(3).run(_difference) == [told] * 3
