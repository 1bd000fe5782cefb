"""The program, on the ranks of a launch and alone."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Mapping
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
import torch.distributed as dist

from tests.harness import Ranks
from tests.programs import Outcome, launch, script
from tests.tiny import tiny_config
from uoe_parallel.config.load import save_config
from uoe_parallel.doctor.program import main, parse_arguments


def call_doctor(
    arguments: list[str], changes: Mapping[int, Mapping[str, str | None]] | None = None
) -> Outcome:
    """On a rank, with another environment where `changes` has some for it; None unsets."""
    rank = dist.get_rank()
    dist.destroy_process_group()
    for name, value in (changes or {}).get(rank, {}).items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        code = main([argument.format(rank=rank) for argument in arguments])
    return Outcome(code, out.getvalue(), err.getvalue())


def _config(path: Path, **training: object) -> str:
    save_config(tiny_config(training=training, parallel={"tensor": 2}), path)
    return str(path)


def test_a_healthy_launch(ranks: Ranks, tmp_path: Path) -> None:
    config = _config(tmp_path / "run.yaml")
    file = tmp_path / "doctor.json"
    first, second = ranks(2).run(call_doctor, ["--config", config, "--json", str(file)])
    assert (first.code, second.code) == (0, 0), first
    assert (second.out, first.err, second.err) == ("", "", "")
    assert "2 ranks as tp2-sp-zero" in first.out and "No fault found" in first.out
    for words in (("torch", "2."), ("lo", "127.0.0.1", "gloo"), ("tensor", "all_to_all", "MB/s")):
        assert any(all(word in line for word in words) for line in first.out.splitlines()), words
    assert "ertified" in first.out.splitlines()[-1] or "still holds" in first.out
    found = json.loads(file.read_text())
    assert found["healthy"] and found["faults"] == []
    assert [rank["rank"] for rank in found["ranks"]] == [0, 1]
    assert {one["axis"] for one in found["collectives"]} == {"world", "tensor"}


def test_what_differs_is_found_and_every_rank_says_so(ranks: Ranks, tmp_path: Path) -> None:
    for rank, rate in enumerate((1e-3, 2e-3)):
        _config(tmp_path / f"{rank}.yaml", learning_rate=rate)
    changes = {1: {"NCCL_ALGO": "Ring"}}
    arguments = ["--config", str(tmp_path / "{rank}.yaml")]
    first, second = ranks(2).run(call_doctor, arguments, changes)
    assert (first.code, second.code, second.out) == (1, 1, "")
    assert "2 faults" in first.out
    assert (
        "the config's training.learning_rate differs between ranks: 0.001 on rank 0; 0.002 on "
        "rank 1" in first.out
    )
    assert "NCCL_ALGO differs between ranks: unset on rank 0; Ring on rank 1" in first.out
    assert "tensor  all_reduce" in first.out  # and the groups are tried all the same


def test_a_config_that_all_have_wrong_is_a_mistake(ranks: Ranks, tmp_path: Path) -> None:
    missing = str(tmp_path / "missing.yaml")
    first, second = ranks(2).run(call_doctor, ["--config", missing])
    assert (first.code, second.code) == (2, 2)
    assert first.err.startswith("uoe-doctor: cannot read the config") and second.err == ""


def test_a_config_that_one_has_not_is_a_fault(ranks: Ranks, tmp_path: Path) -> None:
    _config(tmp_path / "1.yaml")
    first, second = ranks(2).run(call_doctor, ["--config", str(tmp_path / "{rank}.yaml")])
    assert (first.code, second.code) == (1, 1)
    assert "the config's file differs between ranks: cannot read" in first.out


def test_a_file_that_cannot_be_written_is_a_mistake(ranks: Ranks, tmp_path: Path) -> None:
    outcomes = ranks(2).run(call_doctor, ["--json", str(tmp_path / "no" / "doctor.json")])
    assert [one.code for one in outcomes] == [2, 2]
    assert "doctor.json cannot be written" in outcomes[0].err and outcomes[1].err == ""


def test_ranks_that_stay_away_are_told_soon(ranks: Ranks) -> None:
    waits_alone: dict[str, str | None] = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    [outcome] = ranks(1).run(call_doctor, ["--wait", "1"], {0: waits_alone})
    assert outcome.code == 1
    assert "not all ranks met at 127.0.0.1 port" in outcome.err and "1/2 clients" in outcome.err


def test_a_rendezvous_out_of_reach_is_told_with_its_place(ranks: Ranks) -> None:
    elsewhere: dict[str, str | None] = dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE"), "2")
    elsewhere |= {"RANK": "1", "GLOO_SOCKET_IFNAME": "no0"}
    [outcome] = ranks(1).run(call_doctor, ["--wait", "0.5"], {0: elsewhere})
    assert outcome.code == 1
    assert "2 faults" in outcome.err
    assert "rank 1: the rendezvous at 127.0.0.1 port " in outcome.err
    assert "GLOO_SOCKET_IFNAME=no0 names no interface of this node" in outcome.err


def test_alone_it_looks_at_the_node(ranks: Ranks, tmp_path: Path) -> None:
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    alone = {0: dict.fromkeys(names)}
    config = _config(tmp_path / "run.yaml")  # for two ranks, and there need not be any
    [outcome] = ranks(1).run(call_doctor, ["--config", config], alone)
    assert (outcome.code, outcome.err) == (0, "")
    assert "1 rank, seen from rank 0" in outcome.out and "No fault found" in outcome.out
    [outcome] = ranks(1).run(call_doctor, ["--rendezvous", "localhost:1", "--wait", "0"], alone)
    assert (outcome.code, outcome.out) == (1, "")
    assert "localhost" in outcome.err


def test_a_place_to_meet_may_be_ipv6() -> None:
    assert parse_arguments(["--rendezvous", "[fd00::2]:29500"]).rendezvous == ("fd00::2", 29500)


@pytest.mark.parametrize("place", ["node0", "node0:", ":29500", "node0:a"])
def test_a_place_to_meet_has_a_port(place: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        parse_arguments(["--rendezvous", place])
    assert f"{place!r} is not HOST:PORT, such as node0:29400" in capsys.readouterr().err


@pytest.mark.slow
def test_under_torchrun() -> None:
    torchrun = [script("torchrun"), "--standalone", "--nproc-per-node", "2"]
    config = ["--config", "configs/cpu_quickstart.yaml"]
    ended = launch([*torchrun, "-m", "uoe_parallel.doctor", *config])
    assert ended.code == 0, ended
    assert "2 ranks as tp2-sp-zero1" in ended.out and "tensor  all_reduce" in ended.out
    assert "Setting accelerator" not in ended.err
