"""The table of docs/parallelism.md: which axes and ZeRO stages go together, from the rules.

python tools/supported_mixes.py          prints it
python tools/supported_mixes.py --write  puts it into the page
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Iterator
from pathlib import Path

from uoe_parallel.config.schema import ParallelConfig, RunConfig
from uoe_parallel.parallel.layout import ZERO_STAGES, ParallelLayout, why_not, with_parallel

PAGE = Path(__file__).parent.parent / "docs" / "parallelism.md"
BEGIN, END = "<!-- supported mixes: begin -->\n", "<!-- supported mixes: end -->\n"

_SUITS_EVERY_SIZE = RunConfig.model_validate(
    {
        "run_dir": "",
        "model": dict.fromkeys(
            ("num_layers", "hidden_size", "ffn_size", "num_heads", "sequence_length"), 8
        ),
        "data": {"train": ""},
        "training": {
            "steps": 1,
            "global_batch_size": 8,
            "micro_batch_size": 1,
            "learning_rate": 1.0,
        },
    }
)


def mixes() -> Iterator[tuple[int, ParallelConfig]]:
    """Every mix of axes, those that are used of two ranks, with its number of ranks."""
    for tensor, pipeline, data, wide, sequence in itertools.product(
        (1, 2), (1, 2), (1, 2), (False, True), (False, True)
    ):
        if (data == 1 and wide) or (tensor == 1 and sequence):
            continue
        yield (
            tensor * pipeline * data,
            ParallelConfig(
                tensor=tensor,
                pipeline=pipeline,
                expert=tensor * data if wide else None,
                sequence_parallel=sequence,
            ),
        )


def table() -> str:
    """The table in Markdown, with its reasons below it."""
    reasons: dict[str, int] = {}
    rows = []
    for world_size, mix in mixes():
        cells = []
        for stage in ZERO_STAGES:
            parallel = mix.model_copy(update={"zero_stage": stage})
            fault = why_not(with_parallel(_SUITS_EVERY_SIZE, parallel), world_size)
            reason = "" if fault is None else fault.problem.rpartition(": ")[2]
            number = reasons.setdefault(reason, len(reasons) + 1) if reason else 0
            cells.append(f"no ({number})" if reason else "yes")
        name = str(ParallelLayout.from_config(mix, world_size)).rsplit("-", 1)[0]
        rows.append(f"| {name} | {world_size} | {' | '.join(cells)} |")
    head = "| axes | ranks | " + " | ".join(f"ZeRO {stage}" for stage in ZERO_STAGES) + " |"
    lines = [head, "| --- | --- |" + " --- |" * len(ZERO_STAGES), *rows, ""]
    return "\n".join(lines + [f"{number}. {text}." for text, number in reasons.items()]) + "\n"


def page_with(table: str) -> str:
    """The page with `table` between its marks."""
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{table}\n{END}{after}"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--write", action="store_true", help="put it into docs/parallelism.md")
    if parser.parse_args().write:
        PAGE.write_text(page_with(table()), encoding="utf-8")
    else:
        print(table())
    return 0


if __name__ == "__main__":
    sys.exit(main())
