"""The program behind tools/generate.py."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from uoe_parallel.config.json_text import write_json
from uoe_parallel.errors import UserError
from uoe_parallel.inference.program import STDIN, add_model_arguments, read_texts, run_program
from uoe_parallel.inference.sampling import Sampling
from uoe_parallel.inference.terminal import harmless
from uoe_parallel.parallel.agreement import shared_fate

if TYPE_CHECKING:
    from uoe_parallel.inference.generation import Continuation
    from uoe_parallel.inference.opening import OpenedModel

_DESCRIPTION = """\
Texts that a model writes after prompts. A text depends on the run, its prompt and its seed alone,
but for rounding: on no layout and no other prompt.
"""
_EPILOG = """\
examples:
  python tools/generate.py runs/mine --prompt "Once upon" --stream
  python tools/generate.py runs/mine --prompts file.txt --temperature 0 --json texts.json
  torchrun --standalone --nproc-per-node 2 tools/generate.py runs/mine --prompt "Once upon" \\
    parallel.tensor=2

Exit codes: 0; 2 a mistake in the command, the run or a file.
"""


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="generate.py",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_model_arguments(parser)
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="section.field=value",
        help="replaces a field of the run's config, such as parallel.tensor=2",
    )
    parser.add_argument(
        "--prompt", action="append", default=[], metavar="TEXT", help="may be given several times"
    )
    parser.add_argument(
        "--prompts", metavar="FILE", help="a prompt on each line, UTF-8; - for standard input"
    )
    parser.add_argument(
        "--tokens", type=_count, default=200, metavar="N", help="at most (default: %(default)s)"
    )
    parser.add_argument(
        "--temperature",
        type=_temperature,
        default=1.0,
        metavar="T",
        help="divides logits; 0 takes the likeliest token (default: 1)",
    )
    parser.add_argument(
        "--top-p",
        type=_share,
        default=1.0,
        metavar="P",
        help="draw among the likeliest tokens that have this probability together (default: 1)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of every text (default: %(default)s)")
    parser.add_argument(
        "--samples",
        type=_count,
        default=1,
        metavar="N",
        help="texts of each prompt, with seeds that follow each other (default: %(default)s)",
    )
    parser.add_argument(
        "--batch", type=_count, default=8, metavar="N", help="texts at once (default: %(default)s)"
    )
    parser.add_argument(
        "--stream", action="store_true", help="show tokens as they come, one text after the other"
    )
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="write the texts there as well, as they are"
    )
    options = parser.parse_intermixed_args(arguments)
    if not options.prompt and options.prompts is None:
        parser.error("give a --prompt or --prompts")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program; returns its exit code."""
    options = parse_arguments(arguments)
    return run_program("generate.py", lambda: _generate(options))


def _generate(options: argparse.Namespace) -> None:
    from uoe_parallel.inference.generation import generate
    from uoe_parallel.inference.opening import opened

    with opened(options.run, options.overrides) as model:
        prompts = _prompts(options, model)
        seeds = [options.seed + number for number in range(options.samples)] * len(prompts)
        prompts = [prompt for prompt in prompts for _ in range(options.samples)]
        teller = _Teller(prompts) if model.groups.is_main else None
        hear = teller.tell if teller is not None and options.stream else _no_one
        texts = generate(
            model,
            prompts,
            sampling=Sampling(options.tokens, options.temperature, options.top_p),
            seeds=seeds,
            batch_size=1 if options.stream else options.batch,
            all_experts=options.all_experts,
            hear=hear,
        )
        if teller is not None:
            teller.finish([] if options.stream else texts)
        with shared_fate("the texts cannot be written", "See to --json", model.groups.world):
            if options.json is not None and model.groups.is_main:
                write_json(options.json, _as_json(options, model, prompts, seeds, texts))


def _prompts(options: argparse.Namespace, model: OpenedModel) -> list[str]:
    """Those of the command and then those of the file. Raises UserError if there are none."""
    files = [] if options.prompts is None else [options.prompts]
    lines = [
        line for text in read_texts(files, model.groups.world).values() for line in text.split("\n")
    ]
    prompts = [*options.prompt, *(line.removesuffix("\r") for line in lines if line.strip())]
    if not prompts:
        source = "standard input" if options.prompts == STDIN else options.prompts
        raise UserError(f"--prompts: {source} has no prompt; write one on each line")
    return prompts


class _Teller:
    """Shows texts behind their prompts on standard output, and nothing that a terminal obeys."""

    def __init__(self, prompts: Sequence[str]) -> None:
        self._prompts = prompts
        self._shown = -1

    def tell(self, number: int, piece: str) -> None:
        """A piece of a text; pieces come one text after the other."""
        while self._shown < number:
            self._begin_next()
        print(harmless(piece), end="", flush=True)

    def finish(self, texts: Sequence[Continuation]) -> None:
        """With whole texts, if none was told in pieces."""
        for number, text in enumerate(texts):
            self.tell(number, text.text)
        while self._shown < len(self._prompts) - 1:  # of which there was nothing to tell
            self._begin_next()
        print(flush=True)

    def _begin_next(self) -> None:
        self._shown += 1
        if self._shown > 0:
            print("\n")
        if len(self._prompts) > 1:
            print(f"--- {self._shown + 1} of {len(self._prompts)}")
        print(harmless(self._prompts[self._shown]), end="", flush=True)


def _no_one(number: int, piece: str) -> None:
    """Hears."""


def _as_json(
    options: argparse.Namespace,
    model: OpenedModel,
    prompts: Sequence[str],
    seeds: Sequence[int],
    texts: Sequence[Continuation],
) -> dict[str, object]:
    return {
        "run": str(options.run),
        "step": model.step,
        "tokens": options.tokens,
        "temperature": options.temperature,
        "top_p": options.top_p,
        "all_experts": options.all_experts,
        "texts": [
            {
                "prompt": prompt,
                "seed": seed,
                "text": text.text,
                "tokens": text.tokens,
                "ended": text.ended,
            }
            for prompt, seed, text in zip(prompts, seeds, texts, strict=True)
        ],
    }


def _count(text: str) -> int:
    """A type for argparse."""
    value = int(text)
    if value < 1:
        raise ValueError
    return value


def _temperature(text: str) -> float:
    """A type for argparse."""
    value = float(text)
    if not 0 <= value < float("inf"):
        raise ValueError
    return value


def _share(text: str) -> float:
    """A type for argparse."""
    value = float(text)
    if not 0 < value <= 1:
        raise ValueError
    return value


_count.__name__ = "positive int"
_temperature.__name__ = "temperature, at least 0"
_share.__name__ = "share, above 0 and at most 1"
