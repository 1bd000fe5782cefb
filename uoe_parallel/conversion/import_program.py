"""The subcommand that brings a dense model into the project."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from uoe_parallel.conversion.importing import Imported


def add_arguments(commands: Any) -> None:
    """Add `import` to argparse's subparsers; see `program`."""
    parser = commands.add_parser(
        "import",
        help="a dense GPT-2, Llama or Mistral model to a checkpoint of experts, for any layout",
        description="Cuts the blocks of a dense model into experts, which all together are the "
        "dense model. How many there are and how many a token visits is said by overrides, such as "
        "feed_forward.num_experts=16 feed_forward.top_k=8 attention.routed_layers=all.",
    )
    parser.add_argument(
        "source",
        type=Path,
        metavar="SOURCE",
        help="a folder with config.json, model.safetensors (or its index) and tokenizer.json",
    )
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR", help="a new run folder")
    parser.add_argument(
        "overrides", nargs="*", metavar="section.field=value", help="of the config that is made"
    )
    parser.add_argument(
        "--slices",
        choices=("contiguous", "clusters"),
        default="contiguous",
        help="neurons of an expert: neighbours, or such as are active together on --text (default: "
        "%(default)s)",
    )
    parser.add_argument(
        "--routers",
        choices=("random", "activation"),
        default="random",
        help="small random numbers, or fitted to choose the experts that add most on --text "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--text",
        type=Path,
        action="append",
        default=[],
        metavar="FILE",
        help="plain UTF-8 text like that the model was trained on; several times for several files",
    )
    parser.add_argument(
        "--tokens", type=_count, default=32768, help="of the text (default: %(default)s)"
    )
    parser.set_defaults(run=run_import)


def run_import(options: argparse.Namespace) -> None:
    """Raises UserError."""
    from uoe_parallel.conversion.importing import ImportRequest, import_model

    names = ("source", "run_dir", "overrides", "slices", "routers", "text", "tokens")
    request = ImportRequest(**{name: getattr(options, name) for name in names})
    _tell(import_model(request, _bar))


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive whole number")
    return int(text)


@contextmanager
def _bar(layers: int) -> Iterator[Callable[[], object]]:
    """A progress bar on a terminal, nothing elsewhere."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (
        TextColumn("layers"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    console = Console()
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("layers", total=layers)
        yield lambda: bar.advance(task)


def _tell(imported: Imported) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(overflow="fold")
    table.add_column(overflow="fold")
    for name, value in _rows(imported):
        table.add_row(name, value)
    console = Console(highlight=False)
    # A log file has room for whole paths.
    console.print(table, width=None if console.is_terminal else 200)


def _rows(imported: Imported) -> Iterator[tuple[str, str]]:
    config, losses = imported.config, imported.losses
    model = config.model
    yield "checkpoint", str(imported.checkpoint)
    yield "model", f"{model.num_layers} layers of width {model.hidden_size} and {model.ffn_size}"
    for kind, count in (
        ("attention", model.kv_heads),
        ("feed_forward", config.feed_forward.num_experts),
    ):
        routing = config.attention if kind == "attention" else config.feed_forward
        routed = sum(map(routing.routes, range(model.num_layers)))
        active = routing.chosen_experts + routing.shared_experts
        text = f"{active} of {count} experts a token in {routed} of {model.num_layers} layers"
        yield kind.replace("_", "-"), text if routed else "dense"
    if imported.used_ids > imported.source_ids:
        added = imported.used_ids - imported.source_ids
        yield "vocabulary", f"{added} ids of the tokenizer are new to the model, and got mean rows"
    elif imported.used_ids < imported.source_ids:
        spare = imported.source_ids - imported.used_ids
        yield "vocabulary", f"{spare} of the model's rows are of no id of the tokenizer"
    if losses is not None:
        yield "sample text", f"{imported.sample_tokens:,} tokens, one window in eight held out"
        yield "loss held out", f"{losses.dense:.4f} nats/token with all experts on"
        yield "", f"{losses.routed:.4f} as it is routed"
