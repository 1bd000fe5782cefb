"""The tool from its command line to its verdict."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from tests.harness import Ranks
from tests.programs import CHECKOUT, write_run
from uoe_parallel.verification.program import main
from uoe_parallel.verification.ranks import Failure, LocalRanks

LAYOUTS = [
    *("dp2-zero2", "pp2-zero1", "tp2-sp-zero3", "tp2-zero0"),
    *("tp2-sp-dp2-ep4-zero1", "tp2-sp-pp2-zero1"),
]
"""Every axis, every ZeRO stage, at most four ranks; in the order in which they run."""
QUANTITIES = ("loss", "gradient_norm", "gradients", "weights")


@dataclass(frozen=True)
class Verified:
    """What a call of the tool came to."""

    code: int
    out: str
    err: str
    results: dict[str, Any]

    @property
    def rows(self) -> dict[str, dict[str, Any]]:
        return {row["layout"]: row for row in self.results["layouts"]}


@pytest.fixture
def tool(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> Any:
    """Calls the tool on a config in `tmp_path`, or on no config."""

    def call(*arguments: str | Path, config: Path | None = None) -> Verified:
        results = tmp_path / "results" / "verified.json"
        given = [*arguments, *(["--config", config] if config else []), "--json", results]
        code = main([str(argument) for argument in given])
        captured = capfd.readouterr()
        found = json.loads(results.read_text()) if results.exists() else {}
        return Verified(code, captured.out, captured.err, found)

    return call


@pytest.fixture
def config(tmp_path: Path) -> Path:
    return write_run(tmp_path)


def test_layouts_pass(tool: Any, config: Path, tmp_path: Path) -> None:
    before = sorted(tmp_path.iterdir())
    verified = tool("--ranks", "4", "--steps", "2", "--layouts", *LAYOUTS, config=config)

    assert verified.code == 0, verified
    assert sorted(tmp_path.iterdir()) == sorted([*before, tmp_path / "results"])
    lines = verified.out.splitlines()
    table = [line.split() for line in lines[lines.index("") + 1 : lines.index("", 3)]]
    assert table[0] == [
        "layout",
        "loss",
        "grad",
        "norm",
        "gradients",
        "weights",
        "routes",
        "seconds",
    ]
    assert [row[0] for row in table[2:]] == ["one-zero0", *LAYOUTS]
    assert [row[-1] for row in table[2:]] == ["reference", *["pass"] * len(LAYOUTS)]
    assert f"all {len(LAYOUTS)} layouts pass" in lines[-1]
    assert "[2/6] pp2-zero1" in verified.err

    results = verified.results
    assert results["passed"] and results["finished"]
    assert (results["reference"], results["steps"], results["precision"]) == (
        "one-zero0",
        2,
        "fp32",
    )
    assert list(verified.rows) == LAYOUTS
    for line, row in zip(table[3:], verified.rows.values(), strict=True):
        largest = [row["largest"][quantity]["value"] for quantity in QUANTITIES]
        assert [f"{value:.1e}" for value in largest] == line[1:5]
        assert max(largest[:3]) < 1e-4 and 0 < largest[3] < 1e-3
        assert row["passed"] and row["first"] is None and row["failure"] is None
        # 2 steps of 4 x 16 tokens meet 4 routed blocks.
        assert row["routes"] == {"flipped_tokens": 0, "tokens": 512, "replayed": False}
        assert len(row["initial_weights"]) == 26 and not any(row["initial_weights"].values())
        assert [step["step"] for step in row["steps"]] == [1, 2]
        for step in row["steps"]:
            assert len(step["gradients"]) == len(step["weights"]) == 26
    worst = verified.rows["pp2-zero1"]["largest"]["gradients"]
    [step] = [s for s in verified.rows["pp2-zero1"]["steps"] if s["step"] == worst["step"]]
    assert (
        step["gradients"][worst["parameter"]] == max(step["gradients"].values()) == worst["value"]
    )


@pytest.mark.parametrize(
    ("fault", "seed"),
    [
        pytest.param("scale-gradient", 0, marks=pytest.mark.slow),
        ("skip-reduction", 0),
        pytest.param("skip-reduction", 1, marks=pytest.mark.slow),
    ],
)
def test_planted_faults_are_caught_and_named(
    tool: Any, config: Path, fault: str, seed: int
) -> None:
    layouts = ["dp2-zero2", "pp2-zero1", "tp2-sp-zero3", "tp2-zero0", "tp2-sp-dp2-ep4-zero1"]
    planted = ("--fault", fault, "--fault-seed", str(seed))
    verified = tool("--ranks", "4", "--steps", "1", "--layouts", *layouts, *planted, config=config)

    assert verified.code == 1
    assert "5 of 5 layouts FAIL" in verified.out
    assert verified.results["fault"] == {"kind": fault, "seed": seed}
    for row in verified.rows.values():
        first, name = row["first"]["difference"], row["planted_fault"]["parameter"]
        told = (first["step"], first["quantity"], first["parameter"])
        assert told == (1, "gradients", name), row["planted_fault"]
        assert row["first_parameter"] == row["first"] and not row["passed"]
        if fault == "scale-gradient":
            assert first["value"] == pytest.approx(0.01, rel=1e-3)
            assert row["first"]["count"] == 1
        assert f"planted: {row['planted_fault']['what']}\n" in verified.out
        assert f"first: the gradient of {name} in step 1 differs by" in verified.out


def test_seeds_plant_different_faults(tool: Any, config: Path) -> None:
    names = set()
    for seed in range(2):
        planted = ("--fault", "scale-gradient", "--fault-seed", str(seed))
        layouts = ("--layouts", "one-zero1")
        verified = tool("--ranks", "1", "--steps", "1", *layouts, *planted, config=config)
        names.add(verified.rows["one-zero1"]["planted_fault"]["parameter"])
    assert len(names) > 1


def test_a_layout_without_reductions_has_none_to_skip(tool: Any, tmp_path: Path) -> None:
    config = write_run(tmp_path, model={"tie_embeddings": False})
    planted = ("--fault", "skip-reduction")
    verified = tool("--ranks", "2", "--steps", "1", "--layouts", "pp2-*", *planted, config=config)
    assert verified.code == 0
    assert verified.out.count("planted: nothing, this layout has no such reduction") == 2


@pytest.mark.slow
def test_bf16_replays_routes(tool: Any, config: Path) -> None:
    layouts = ("--layouts", "one-zero0", "tp2-sp-zero1")
    arguments = ("--ranks", "2", "--steps", "2", "--precision", "bf16", *layouts)
    verified = tool(*arguments, config=config)
    assert verified.code == 0, verified.out
    assert verified.results["reference"] == "one-zero1"
    for row in verified.rows.values():
        assert row["routes"]["replayed"]
        assert not any(row["initial_weights"].values())
        assert row["largest"]["gradients"]["value"] > 1e-3


def test_fp64_is_sharper_and_leaves_zero_out(tool: Any, config: Path) -> None:
    layouts = ("--layouts", "dp2-zero*", "tp2-sp-*")
    arguments = ("--ranks", "2", "--steps", "2", "--precision", "fp64", *layouts)
    verified = tool(*arguments, config=config)
    assert verified.code == 0, verified.out
    assert list(verified.rows) == ["dp2-zero0", "tp2-sp-zero0"]
    for row in verified.rows.values():
        assert 0 < row["largest"]["weights"]["value"] < 1e-12
    told = verified.out.split("Can't run here:")[1]
    assert "dp2-zero1, dp2-zero2" in told and "DeepSpeed's ZeRO keeps its masters in fp32" in told
    assert "dp2-zero1" in verified.results["left_out"][0]["layouts"]


def test_what_is_changed_is_told(tool: Any, tmp_path: Path) -> None:
    config = write_run(
        tmp_path,
        model={"num_layers": 6, "sequence_length": 64, "dropout": 0.5},
        attention={"routed_layers": [1, 3, 5]},
        training={"global_batch_size": 16},
    )
    arguments = ("--ranks", "2", "--steps", "1", "--layouts", "pp2-zero0", "tp2-sp-zero1")
    verified = tool(*arguments, "--shrink", "seed=3", config=config)
    assert verified.code == 0, verified.out
    assert verified.results["shrunk"] == [
        "model.num_layers 6 -> 2",
        "model.sequence_length 64 -> 32",
        "attention.routed_layers [1, 3, 5] -> [1]",
        "training.global_batch_size 16 -> 8",
    ]
    assert f"shrunk: {', '.join(verified.results['shrunk'])}\n" in verified.out
    assert "changed: model.dropout 0.5 -> 0.0\n" in verified.out


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run folders: a reference, two good ones and one with a fault. Not to be written to."""
    folder = tmp_path_factory.mktemp("kept")
    config = write_run(folder)
    common = ["--config", config, "--ranks", "2", "--steps", "2", "--json", folder / "results.json"]
    good = [*common, "--layouts", "tp2-sp-zero1", "--keep", folder / "good"]
    bad = [*common, "--layouts", "dp2-zero0", "--fault", "scale-gradient", "--keep", folder / "bad"]
    assert main(list(map(str, good))) == 0
    assert main(list(map(str, bad))) == 1
    return folder


def test_folders_of_two_runs_are_compared(tool: Any, kept: Path, tmp_path: Path) -> None:
    first, second = kept / "good" / "reference", kept / "good" / "tp2-sp-zero1"
    verified = tool("--compare", first, second)
    assert verified.code == 0, verified
    assert verified.results["passed"]
    [row] = verified.results["layouts"]
    assert row["layout"] == str(second) and row["seconds"] is None
    # Two equal references.
    bits = tool("--compare", first, kept / "bad" / "reference").results["layouts"][0]["largest"]
    assert [bits[quantity]["value"] for quantity in QUANTITIES] == [0.0] * 4
    # A run that somebody else launched keeps no initial weights.
    launched = shutil.copytree(second, tmp_path / "launched")
    shutil.rmtree(launched / "initial")
    assert tool("--compare", first, launched).code == 0


def test_folders_of_two_runs_that_differ(tool: Any, kept: Path) -> None:
    verified = tool("--compare", kept / "bad" / "reference", kept / "bad" / "dp2-zero0")
    assert verified.code == 1
    [row] = verified.results["layouts"]
    name = row["first"]["difference"]["parameter"]
    assert f"first: the gradient of {name} in step 1 differs by 1.0e-02" in verified.out


def test_folders_of_other_runs_are_refused(tool: Any, kept: Path, tmp_path: Path) -> None:
    other = shutil.copytree(kept / "good" / "tp2-sp-zero1", tmp_path / "other")
    text = (other / "config.yaml").read_text()
    (other / "config.yaml").write_text(text.replace("seed: 7", "seed: 8"))
    verified = tool("--compare", kept / "good" / "reference", other)
    assert verified.code == 2
    assert "don't train the same model on the same data:\n  seed: 7 and 8" in verified.err
    assert tool("--compare", other, tmp_path / "nowhere").code == 2


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--layouts", "tp5-zero0"], "--layouts: tp5-zero0 matches no layout"),
        (["--layouts", "pp2-zero2"], "--layouts: pp2-zero2 can't run:"),
        (["--tolerance", "gradient=1"], "--tolerance gradient=1: write NAME=VALUE with one of"),
        (["--tolerance", "loss=much"], "--tolerance loss=much: write"),
        (["--keep", "."], "--keep: .: File exists; name a new folder"),
        (["model.hidden_size=33"], "model.hidden_size = 33 is not a multiple of"),
        (["data.train=nowhere"], "nowhere.idx: no such file"),
        (["training.learning_rate=1e30", "training.gradient_clipping=0"], "training stopped"),
        (["--precision", "fp64", "deepspeed={bf16: {enabled: true}}"], "deepspeed.bf16.enabled"),
    ],
)
def test_mistakes_are_told_once(
    tool: Any, config: Path, arguments: list[str], complaint: str
) -> None:
    verified = tool("--ranks", "2", *arguments, config=config)
    assert verified.code == 2, verified
    assert verified.err.count("verify_layouts.py: ") == 1 and complaint in verified.err
    assert "Traceback" not in verified.err + verified.out


def test_a_results_file_that_can_not_be_written_is_told(tmp_path: Path, config: Path) -> None:
    (tmp_path / "file").touch()
    given = ["--config", config, "--ranks", "2", "--json", tmp_path / "file" / "results.json"]
    assert main(list(map(str, given))) == 2


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["--config", "x"],
        ["--config", "x", "--ranks", "0"],
        ["--config", "x", "--ranks", "2", "--eps", "nan"],
        ["--config", "x", "--compare", "a", "b"],
        ["--compare", "a"],
        ["--compare", "a", "b", "--layouts", "dp2-zero0"],
    ],
)
def test_command_lines_that_mean_nothing(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2


@pytest.fixture
def break_ranks(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Makes runs on that many ranks fail."""
    failure = Failure("rank 1: RuntimeError: broken", "----- rank 1 of 2\nTraceback ...")
    really = LocalRanks.run

    def break_ranks(broken: int) -> None:
        def run(self: LocalRanks, world_size: int, *arguments: Any, **given: Any) -> Any:
            if world_size == broken:
                return failure
            return really(self, world_size, *arguments, **given)

        monkeypatch.setattr(LocalRanks, "run", run)

    return break_ranks


def test_a_reference_that_breaks_is_a_failure(
    tool: Any, config: Path, break_ranks: Callable[[int], None]
) -> None:
    break_ranks(1)
    verified = tool("--ranks", "2", config=config)
    assert verified.code == 1
    assert "one-zero0, the reference, failed: rank 1: RuntimeError: broken\n---" in verified.err
    assert verified.results["passed"] is verified.results["finished"] is False


def test_a_layout_that_breaks_is_a_failure(
    tool: Any, config: Path, break_ranks: Callable[[int], None]
) -> None:
    break_ranks(2)
    layouts = ("--layouts", "one-zero1", "dp2-zero0")
    verified = tool("--ranks", "2", "--steps", "1", *layouts, config=config)
    assert verified.code == 1
    assert "FAIL\n  rank 1: RuntimeError: broken\n  ----- rank 1 of 2\n" in verified.out
    assert "1 of 2 layouts FAIL" in verified.out
    good, bad = verified.rows["one-zero1"], verified.rows["dp2-zero0"]
    assert (good["passed"], bad["passed"]) == (True, False)
    assert bad["failure"]["summary"] == "rank 1: RuntimeError: broken"


@pytest.mark.slow
def test_the_script_runs_from_a_shell(config: Path, tmp_path: Path) -> None:
    """With a server of its own to fork ranks from."""
    script = [sys.executable, CHECKOUT / "tools" / "verify_layouts.py"]
    arguments = ["--config", config, "--ranks", "2", "--layouts", "dp2-zero1"]
    arguments += ["--steps", "1"]
    ended = subprocess.run(
        [*map(str, [*script, *arguments]), "--json", str(tmp_path / "results.json")],
        env=os.environ | {"PYTHONPATH": str(CHECKOUT)},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert ended.returncode == 0, ended
    # No library had anything to say before.
    assert ended.stdout.startswith(f"{config}: 1 layouts of up to 2 ranks against one-zero0")
    assert "all 1 layouts pass" in ended.stdout
    assert ended.stderr.splitlines() == [
        "starting",
        "one-zero0, the reference",
        "[1/1] dp2-zero1",
    ]


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_every_layout_of_up_to_eight_ranks_passes(tool: Any, tmp_path: Path) -> None:
    config = write_run(
        tmp_path, model={"num_layers": 8, "num_kv_heads": 8}, training={"global_batch_size": 8}
    )
    verified = tool("--ranks", "8", "--steps", "2", config=config)
    assert verified.code == 0, verified.out
    assert {"dp8-ep8-zero2", "pp8-zero1", "tp8-sp-zero3", "tp2-sp-pp2-dp2-ep4-zero1"} <= set(
        verified.rows
    )


def _simulated(config: Path, results: Path) -> tuple[int, str]:
    dist.destroy_process_group()  # the harness's: a simulation starts one of its own
    out = io.StringIO()
    arguments = ["--config", config, "--simulate-world", 1024, "--simulate-rank", 3]
    with redirect_stdout(out):
        code = main([*map(str, arguments), "parallel.tensor=2", "--json", str(results)])
    return code, out.getvalue()


def test_a_rank_of_a_large_world_is_shown(ranks: Ranks, tmp_path: Path) -> None:
    config = write_run(tmp_path, training={"global_batch_size": 512, "micro_batch_size": 1})
    results = tmp_path / "simulated.json"
    [(code, out)] = ranks(1).run(_simulated, config, results)
    assert code == 0
    assert "Rank 3 of 1024, tp2-sp-dp512-zero1" in out
    content = json.loads(results.read_text())
    assert content["groups"]["tensor"] == [2, 3]
