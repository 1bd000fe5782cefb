"""A run, its data and its checkpoints are of one tokenizer, which files may move."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from tests.harness import Ranks
from tests.programs import call_program, only_complaint, write_run
from uoe_parallel.data.tokenizer import build_tokenizer
from uoe_parallel.errors import UserError
from uoe_parallel.inference.opening import opened
from uoe_parallel.preprocessing.bpe import train_bpe


def learn(path: Path, text: str) -> Path:
    train_bpe([text] * 3, 280).save(str(path))
    return path


@pytest.fixture(scope="module")
def run(ranks: Ranks, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The YAML of a run of one step. Tests may not write to its folder."""
    folder = tmp_path_factory.mktemp("run")
    name = str(learn(folder / "bpe.json", "the cat sat on the mat"))
    path = write_run(folder, data={"tokenizer": name}, training={"steps": 1})
    [outcome] = ranks(1).run(call_program, "--config", path)
    assert outcome.code == 0, outcome
    return path


def open_with(run_dir: Path, tokenizer: Path) -> str:
    """The fingerprint of an opened model's tokenizer, or what is said against opening it."""
    try:
        with opened(run_dir, [f"data.tokenizer={tokenizer}"]) as model:
            return model.tokenizer.fingerprint
    except UserError as error:
        return str(error)


def test_the_same_tokenizer_elsewhere_is_taken(ranks: Ranks, run: Path, tmp_path: Path) -> None:
    moved = Path(shutil.copy(run.parent / "bpe.json", tmp_path / "moved.json"))
    run_dir = shutil.copytree(run.parent / "run", tmp_path / "run")
    overrides = (f"run_dir={run_dir}", f"data.tokenizer={moved}", "training.steps=2")
    [outcome] = ranks(1).run(call_program, "--config", run, *overrides)
    assert outcome.code == 0 and "resuming" in outcome.out, outcome
    [fingerprint] = ranks(1).run(open_with, run_dir, moved)
    assert fingerprint == build_tokenizer(str(moved)).fingerprint


def test_another_one_is_refused_by_resume_and_opening(
    ranks: Ranks, run: Path, tmp_path: Path
) -> None:
    other = learn(tmp_path / "other.json", "a dog ran to a bog")
    resumed = (f"data.tokenizer={other}", "training.steps=2")
    origin = f"checkpoint.start_from={run.parent / 'run'}"
    begun = (*resumed, f"run_dir={tmp_path / 'run'}", origin)
    messages = [
        only_complaint(ranks(1).run(call_program, "--config", run, *resumed)),
        only_complaint(ranks(1).run(call_program, "--config", run, *begun)),
        *ranks(1).run(open_with, run.parent / "run", other),
    ]
    for message in messages:
        for path in (run.parent / "bpe.json", other):
            assert str(path.name) in message
            assert build_tokenizer(str(path)).fingerprint in message
        assert "step-00000001" in message


def test_data_made_with_another_one_is_refused(ranks: Ranks, tmp_path: Path) -> None:
    path = write_run(tmp_path)
    summary = {"tokenizer": {"name": "bpe.json", "fingerprint": "tokenizers-0"}, "tokens": 400}
    (tmp_path / "test.json").write_text(json.dumps(summary))
    message = only_complaint(ranks(1).run(call_program, "--config", path))
    for word in (str(tmp_path / "test.json"), "bpe.json", "tokenizers-0", "= bytes"):
        assert word in message


def test_tokenizer_that_one_node_lacks_ends_all_ranks(
    ranks: Ranks, run: Path, tmp_path: Path
) -> None:
    nodes = [tmp_path / "first", tmp_path / "second"]
    for node in nodes:
        node.mkdir()
    learn(nodes[0] / "bpe.json", "the cat sat on the mat")
    arguments = ("--config", run, f"run_dir={tmp_path / 'run'}", "data.tokenizer=bpe.json")
    outcomes = ranks(2).run(call_program, *arguments, folders=nodes, timeout=30)
    assert "bpe.json" in only_complaint(outcomes)


def open_on_a_rank(folders: list[Path]) -> str:
    rank = int(os.environ["RANK"])
    with pytest.raises(UserError) as caught, opened(folders[rank]):
        pass
    return str(caught.value)


def test_checkpoint_that_one_node_lacks_ends_all_ranks(
    ranks: Ranks, run: Path, tmp_path: Path
) -> None:
    messages = ranks(2).run(open_on_a_rank, [run.parent / "run", tmp_path / "none"], timeout=30)
    assert len(set(messages)) == 1 and "holds no whole checkpoint" in messages[0]
