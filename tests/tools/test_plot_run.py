"""Pictures of a run, from its record alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.image import imread

from tools.plot_run import MOST_COLUMNS, Run, columns, draw_load, main, plot
from uoe_parallel.errors import UserError
from uoe_parallel.routing.statistics import GATE_BINS

ROUTED = {"layers.0.attention": 4, "layers.0.feed_forward": 8, "layers.1.feed_forward": 8}
ALL = ["balance.png", "gates.png", "load.png", "loss.png"]


def _values(generator: np.random.Generator, experts: int) -> dict[str, Any]:
    """What a routed block reports."""
    load, gates = generator.dirichlet(np.ones(experts)), generator.dirichlet(np.ones(GATE_BINS))
    return {
        "load": load.tolist(),
        "load_max_over_mean": load.max() * experts,
        "load_entropy": generator.uniform(0.5, 1),
        "gate_histogram": gates.tolist(),
        "dropped_share": 0.1,
        "unrouted_share": 0.0,
    }


def _write(
    folder: Path, reports: int, blocks: dict[str, int] | None = None, **changes: Any
) -> Path:
    """The record of a run with reports at steps 10, 20 and so on, and a validation at each."""
    generator = np.random.default_rng(0)
    folder.mkdir(exist_ok=True)
    lines = [{"step": 0, "kind": "validation", "loss": 8.0, "bits_per_byte": 4.0}]
    for step in range(10, 10 * reports + 1, 10):
        loss = {"loss": 8.0 / step, "bits_per_byte": 4.0 / step}
        routing = {
            f"{name}/{block}": value
            for block, experts in (blocks or {}).items()
            for name, value in _values(generator, experts).items()
        }
        lines += [
            {"step": step, "kind": "train", **loss, "tokens": 640.0 * step, **routing, **changes},
            {"step": step, "kind": "validation", **loss},
        ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def _check_pictures(folder: Path, names: list[str]) -> None:
    assert sorted(path.name for path in folder.iterdir()) == names
    for name in names:
        picture = imread(folder / name)[..., :3]
        assert min(picture.shape[:2]) > 300, name
        assert picture.std() > 0.05, f"{name} is blank"
        # Labels and lines in all parts of it, as far as thirds go.
        for part in (*np.array_split(picture, 3, axis=0), *np.array_split(picture, 3, axis=1)):
            assert part.std() > 0.02, f"a part of {name} is blank"


def test_a_routed_run_has_all_pictures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    drift = {"threshold_drift/layers.0.attention": 0.1, "bias_drift/layers.1.feed_forward": None}
    drift |= {"frozen_drift/layers.0.attention": 0.0}
    _write(tmp_path / "run", 12, ROUTED, **drift)
    assert main([str(tmp_path / "run")]) == 0
    _check_pictures(tmp_path / "run" / "plots", ALL)
    told = capsys.readouterr()
    assert told.err == ""
    assert sorted(Path(line).name for line in told.out.splitlines()) == ALL


def test_pictures_show_what_was_recorded(tmp_path: Path) -> None:
    """Other numbers make other pictures, and the same ones the same."""
    plot(_write(tmp_path / "run", 3, ROUTED), tmp_path / "first")
    plot(tmp_path / "run", tmp_path / "again")
    other = {
        "loss": 7.0,
        "load/layers.1.feed_forward": [1.0] + [0.0] * 7,
        "gate_histogram/layers.0.attention": [0.0] * 29 + [1.0],
        "dropped_share/layers.0.attention": 0.9,
    }
    plot(_write(tmp_path / "run", 3, ROUTED, **other), tmp_path / "other")
    for name in ALL:
        first, again, changed = (
            (tmp_path / folder / name).read_bytes() for folder in ("first", "again", "other")
        )
        assert first == again and first != changed, name


def test_a_dense_run_has_its_loss(tmp_path: Path) -> None:
    written = plot(_write(tmp_path / "run", 3), tmp_path / "out" / "here")
    assert written == [tmp_path / "out" / "here" / "loss.png"]
    _check_pictures(tmp_path / "out" / "here", ["loss.png"])


@pytest.mark.parametrize("reports", [0, 1])
def test_a_run_that_has_just_begun_is_drawn(tmp_path: Path, reports: int) -> None:
    folder = _write(tmp_path / "run", reports, ROUTED)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 20, "kind": "tr')
    plot(folder, tmp_path / "out")
    _check_pictures(tmp_path / "out", ALL if reports else ["loss.png"])


def test_values_that_are_no_numbers_leave_gaps(tmp_path: Path) -> None:
    folder = _write(tmp_path / "run", 3, ROUTED, loss=None, bits_per_byte=None)
    plot(folder, tmp_path / "out")
    _check_pictures(tmp_path / "out", ALL)


def test_many_layers_fit(tmp_path: Path) -> None:
    blocks = {f"layers.{layer}.feed_forward": 64 for layer in range(70)}
    figure = draw_load(Run(_write(tmp_path, 2, blocks)))
    assert max(figure.get_size_inches()) < 25
    labels = figure.subfigs[0].axes[0].get_yticklabels()
    assert [label.get_text() for label in labels] == [str(layer) for layer in range(0, 70, 2)]


def test_many_reports_are_averaged() -> None:
    edges = np.arange(MOST_COLUMNS + 2.0)
    values = np.arange(MOST_COLUMNS + 1.0)[None]
    fewer_edges, fewer = columns(edges, values)
    assert fewer_edges[:3].tolist() == [0, 2, 4] and fewer_edges[-1] == edges[-1]
    assert fewer[0, :2].tolist() == [0.5, 2.5] and fewer[0, -1] == MOST_COLUMNS
    assert fewer.shape == (1, len(fewer_edges) - 1) and fewer.size <= MOST_COLUMNS
    same_edges, same = columns(edges[:-1], values[:, :-1])
    assert np.array_equal(same_edges, edges[:-1]) and np.array_equal(same, values[:, :-1])


def test_steps_of_reports_are_their_columns(tmp_path: Path) -> None:
    run = Run(_write(tmp_path / "run", 3, ROUTED))
    assert run.step_edges.tolist() == [0, 10, 20, 30]
    assert [block.name for block in run.blocks] == list(ROUTED)
    assert run.tokens_per_step == 640
    assert run.over_blocks("dropped_share").shape == (3, 3)
    assert run.over_blocks("nothing").shape == (3, 0)


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (None, "No such file or directory; name the run_dir of a run that has begun"),
        ("", "no loss is recorded yet; try again after the first report"),
        ("no record\n", "no loss is recorded yet; try again after the first report"),
    ],
)
def test_what_cannot_be_drawn_is_told_in_a_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str | None, complaint: str
) -> None:
    if content is not None:
        (tmp_path / "metrics.jsonl").write_text(content)
    assert main([str(tmp_path)]) == 2
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err == f"plot_run: {tmp_path / 'metrics.jsonl'}: {complaint}\n"
    assert not (tmp_path / "plots").exists()


def test_an_output_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    folder = _write(tmp_path / "run", 1)
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match=r"file/loss.png: .*; choose another --output"):
        plot(folder, tmp_path / "file")


def test_help_tells_the_pictures(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    told = capsys.readouterr().out
    assert all(name in told for name in ALL)
