"""A model for lm-evaluation-harness, https://github.com/EleutherAI/lm-evaluation-harness.

Every rank calls `lm_eval.simple_evaluate` with its own `HarnessModel` and gets all requests; how
they are shared out is this project's to see to. The harness knows of one process alone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from uoe_parallel.errors import UserError

try:
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import TemplateLM
    from lm_eval.models.utils import normalize_gen_kwargs, postprocess_generated_text
    from tqdm import tqdm
except ModuleNotFoundError as error:
    raise UserError(
        f"lm-evaluation-harness is not installed ({error}); install uoe-parallel[evaluation]"
    ) from error

from uoe_parallel.inference.evaluation import Reading, check_predicts_text, read_ids
from uoe_parallel.inference.generation import generate
from uoe_parallel.inference.opening import OpenedModel
from uoe_parallel.inference.sampling import Sampling
from uoe_parallel.inference.scoring import score

_MOST_TOKENS = 256
"""Of a text whose task names no limit, as with the harness's own models."""
_KNOWN = {"do_sample", "max_gen_toks", "temperature", "top_p", "until"}
"""Of a task's generation_kwargs, once the harness has given them one name each."""

Encoded = tuple[tuple[str, str], list[int], list[int]]
"""A context and its continuation, and the ids of both."""


class HarnessModel(TemplateLM):
    """What the harness asks of a model.

    As with its own models, a context is what the model sees first, and an empty one is the end of
    another document. Text beyond the model's sequence length is read in windows.
    """

    def __init__(self, opened: OpenedModel, *, batch_size: int | None = None) -> None:
        """batch_size: windows or texts of a micro-batch, by default training.micro_batch_size.
        Raises UserError for a model that does not predict text."""
        super().__init__()
        check_predicts_text(opened)
        self.opened = opened
        self.batch_size = batch_size or opened.config.training.micro_batch_size

    @property
    def eot_token_id(self) -> int:
        return self.opened.tokenizer.eod

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """Ids of text, which never have special ones among them."""
        return self.opened.tokenizer.encode(string).tolist()

    def loglikelihood(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """Of each continuation after its context, and whether it is the model's own. Collective
        over all ranks."""
        return super().loglikelihood(requests, disable_tqdm=disable_tqdm or self._is_quiet)

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """Of whole documents. Collective over all ranks."""
        texts: list[str] = [request.args[0] for request in requests]
        readings = [self._read([], self.tok_encode(text)) for text in texts]
        found = [likelihood for likelihood, _ in self._score(readings, disable_tqdm)]
        for text, likelihood in zip(texts, found, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), likelihood)
        return found

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Text up to one of the strings that a task names, or the end of the document. What is
        drawn, and not the likeliest, differs between requests that are repeated. Collective over
        all ranks."""
        asked: list[Any] = [request.args for request in requests]
        texts = [""] * len(asked)
        repeats: Counter[str] = Counter()
        alike: dict[str, list[tuple[int, int]]] = {}
        for number, (prompt, options) in enumerate(asked):
            key = repr((prompt, options))
            alike.setdefault(repr(options), []).append((number, repeats[key]))
            repeats[key] += 1
        quiet = disable_tqdm or self._is_quiet
        with tqdm(total=len(asked), desc="Generating", disable=quiet) as bar:
            for group in alike.values():
                _, options = asked[group[0][0]]
                for start in range(0, len(group), self.batch_size):
                    batch = group[start : start + self.batch_size]
                    prompts = [asked[number][0] for number, _ in batch]
                    written = self._write(prompts, options, [repeat for _, repeat in batch])
                    for (number, _), text in zip(batch, written, strict=True):
                        texts[number] = text
                        self.cache_hook.add_partial("generate_until", asked[number], text)
                    bar.update(len(batch))
        return texts

    def _loglikelihood_tokens(
        self, requests: list[Encoded], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        empty = [self.prefix_token_id]
        readings = [
            self._read([] if context == empty else context, continuation)
            for _, context, continuation in requests
        ]
        found = self._score(readings, disable_tqdm)
        for (texts, _, _), answer in zip(requests, found, strict=True):
            self.cache_hook.add_partial("loglikelihood", texts, answer)
        return found

    @property
    def _is_quiet(self) -> bool:
        return not self.opened.groups.is_main

    def _read(self, before: list[int], ids: list[int]) -> Reading:
        window = self.opened.config.model.sequence_length
        return read_ids(
            self.opened, np.array(ids, dtype=np.int64), before, window=window, stride=window
        )

    def _score(self, readings: Sequence[Reading], disable_tqdm: bool) -> list[tuple[float, bool]]:
        windows = [window for reading in readings for window in reading.windows]
        quiet = disable_tqdm or self._is_quiet
        with tqdm(total=len(windows), desc="Reading windows", disable=quiet) as bar:
            scores = score(self.opened, windows, batch_size=self.batch_size, advance=bar.update)
        counts = [len(reading.windows) for reading in readings]
        nats, greedy = scores.nats_W.split(counts), scores.greedy_W.split(counts)
        return [
            (
                -float(nats[number].sum()) - reading.nats_ahead,
                bool(greedy[number].all()) and reading.nats_ahead == 0,
            )
            for number, reading in enumerate(readings)
        ]

    def _write(
        self, prompts: Sequence[str], options: Mapping[str, Any], seeds: Sequence[int]
    ) -> list[str]:
        """Texts with one task's options, of which the harness's own names are understood. Raises
        UserError for others."""
        known: dict[str, Any] = {**normalize_gen_kwargs(dict(options), _MOST_TOKENS)}
        if unknown := known.keys() - _KNOWN:
            raise UserError(
                f"generation_kwargs: {min(unknown)} is not known here; a task may give "
                f"{', '.join(sorted(_KNOWN))}"
            )
        until = [text for text in known["until"] if text]
        sampling = Sampling(
            known["max_gen_toks"],
            known.get("temperature", 1.0) if known["do_sample"] else 0.0,
            known.get("top_p", 1.0),
        )
        texts = generate(
            self.opened,
            prompts,
            sampling=sampling,
            seeds=seeds,
            batch_size=self.batch_size,
            begins=False,
            ends=lambda text: any(stop in text for stop in until),
        )
        return [postprocess_generated_text(text.text, until, None) for text in texts]
