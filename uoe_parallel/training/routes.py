"""Recording the routes of training steps, and following or comparing with recorded ones.

The record of a step is a checkpoint of its own in <folder>/step-<step>, steps counted as in the
metrics. It has an entry for each routed block: uint8 [global batch, sequence length, X], `pack`ed
masks in the order of `data.batches.batch_rows`: of a token's experts, after those that its segment
kept where segments choose too. A rank writes and reads the box of its own tokens
in the blocks that it holds, so that any layout reads what any other wrote.

Shape suffixes: R this rank's sequences of a step, S its positions, X bytes of a packed mask.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import JsonValue
from torch import Tensor

from uoe_parallel.checkpoint import CheckpointReader, Piece, open_checkpoint, save_checkpoint
from uoe_parallel.config.faults import show
from uoe_parallel.config.schema import RunConfig
from uoe_parallel.data.batches import batch_rows
from uoe_parallel.errors import UserError
from uoe_parallel.model.block import RoutedBlock
from uoe_parallel.parallel import comm
from uoe_parallel.parallel.agreement import shared_fate
from uoe_parallel.parallel.groups import ParallelGroups
from uoe_parallel.parallel.purposes import Purpose
from uoe_parallel.routing.tape import Player, Recorder, RouteTape, packed_size

_FAULTS_TOLD = 5


class RunRoutes:
    """What the section `routes` of a config asks for, done step by step.

    Built and used by every rank alike; does nothing where the section is empty.
    """

    def __init__(
        self,
        config: RunConfig,
        groups: ParallelGroups,
        blocks: Mapping[str, RoutedBlock],
        device: torch.device,
    ) -> None:
        """`blocks`: the routed blocks that this rank holds, by their names in the whole model."""
        experts, length = config.recorded_choices, config.model.sequence_length
        assert blocks.keys() <= experts.keys(), blocks.keys() - experts.keys()
        self._record = config.routes.record
        self._use = "replay" if config.routes.replay is not None else "compare"
        self._source: str | None = getattr(config.routes, self._use)
        self._groups = groups
        self._blocks = blocks
        self._device = device
        self._micro_batch_size = config.training.micro_batch_size
        self._rows = batch_rows(
            config.training.global_batch_size,
            micro_batch_size=self._micro_batch_size,
            data_rank=groups.data_rank,
            data_size=groups.layout.data,
        )
        self._sharded = groups.layout.sequence_parallel
        self._positions = length // groups.layout.tensor if self._sharded else length
        self._shapes = {
            name: (config.training.global_batch_size, length, packed_size(count))
            for name, count in experts.items()
        }
        self._identity: dict[str, JsonValue] = {
            "seed": config.seed,
            "training.global_batch_size": config.training.global_batch_size,
            "model.sequence_length": length,
            **{f"experts of {name}": count for name, count in experts.items()},
        }
        self._flipped = torch.zeros((), dtype=torch.int64, device=device)
        self._tokens = 0

    @contextmanager
    def step(self, step: int) -> Iterator[None]:
        """Around the forward and backward passes of optimizer step `step` (from 0).

        Collective over all ranks at both ends. Raises UserError on every rank if the step has no
        record to follow or compare with, if that does not fit, or if a record can't be written.
        """
        if self._record is not None:
            tapes = {name: Recorder(len(self._rows)) for name in self._blocks}
            with self._taped(tapes):
                yield
            routes = {name: tape.finish() for name, tape in tapes.items()}
            self._write(Path(self._record), step + 1, routes)
        elif self._source is not None:
            follow = self._use == "replay"
            tapes = {
                name: Player(routes_RSX, self._micro_batch_size, follow=follow)
                for name, routes_RSX in self._read(Path(self._source), step + 1).items()
            }
            with self._taped(tapes):
                yield
            for tape in tapes.values():
                self._flipped += tape.finish()
                self._tokens += self._rows.size * self._positions
        else:
            yield

    def report(self) -> dict[str, float]:
        """How the routes of the steps since the last report differ from the record.

        "routes/flipped_tokens": how many tokens would by themselves have gone elsewhere than in
        the record, of "routes/tokens", both summed over routed blocks. Empty if the run neither
        follows nor compares. Collective over all ranks.
        """
        if self._source is None:
            return {}
        over = [self._groups.data, self._groups.pipe]
        if self._sharded:
            over.append(self._groups.tensor)
        counts = torch.stack((self._flipped, torch.full_like(self._flipped, self._tokens)))
        flipped, tokens = comm.sum_over(counts, *over, purpose=Purpose.REPORT).tolist()
        self.forget()
        return {"routes/flipped_tokens": float(flipped), "routes/tokens": float(tokens)}

    def forget(self) -> None:
        """The steps since the last report."""
        self._flipped, self._tokens = torch.zeros_like(self._flipped), 0

    @contextmanager
    def _taped(self, tapes: Mapping[str, RouteTape]) -> Iterator[None]:
        for name, block in self._blocks.items():
            block.tape = tapes[name]
        try:
            yield
        finally:
            for block in self._blocks.values():
                block.tape = None

    def _write(self, folder: Path, step: int, routes: Mapping[str, Tensor]) -> None:
        writes = self._sharded or self._groups.tensor_rank == 0
        pieces = [
            Piece(name, routes_RSX[rows].cpu().contiguous(), self._shapes[name], offsets)
            for name, routes_RSX in routes.items()
            for rows, offsets in self._runs()
            if writes
        ]
        try:
            save_checkpoint(
                folder, step, pieces, {"routes": self._identity}, self._groups.world, keep=None
            )
        except UserError as error:
            raise UserError(f"routes.record: {error}") from error

    def _read(self, folder: Path, step: int) -> dict[str, Tensor]:
        """The routes that the blocks here have in the record, uint8 [R, S, X]."""
        field, mend = f"routes.{self._use}", f"or leave routes.{self._use} out"
        try:
            reader = open_checkpoint(folder, step, self._groups.world)
        except UserError as error:
            raise UserError(
                f"{field}: {error}. Record this step there with routes.record, {mend}"
            ) from error
        if faults := self._faults(reader.state.get("routes")):
            raise UserError(
                f"{field}: {reader.path} does not fit this run:\n  "
                + "\n  ".join(faults)
                + f"\nRestore what differs, record again with routes.record, {mend}"
            )
        action = f"{field}: {reader.path} cannot be read"
        with shared_fate(action, f"See to the named file, {mend}", self._groups.world):
            return {
                name: torch.cat([self._box(reader, name, *run) for run in self._runs()])
                for name in self._blocks
            }

    def _faults(self, recorded: Any) -> list[str]:
        """Why a record can't be one of this run's routes. The same on every rank."""
        if recorded is None:
            return ["it holds no routes"]
        now = self._identity
        told = [
            f"{field}: recorded {show(recorded.get(field))}, now {show(now.get(field))}"
            for field in {**now, **recorded}
            if recorded.get(field) != now.get(field)
        ]
        more = len(told) - _FAULTS_TOLD
        return [*told[:_FAULTS_TOLD], f"and {more} more"] if more > 0 else told

    def _runs(self) -> Iterator[tuple[slice, tuple[int, int, int]]]:
        """The boxes of this rank's tokens: which of its sequences, and the offsets in an entry."""
        rows = self._rows.flatten()
        position = self._groups.tensor_rank * self._positions if self._sharded else 0
        cuts = (np.flatnonzero(np.diff(rows) != 1) + 1).tolist()
        for start, end in pairwise([0, *cuts, len(rows)]):
            yield slice(start, end), (int(rows[start]), position, 0)

    def _box(
        self, reader: CheckpointReader, name: str, rows: slice, offsets: tuple[int, int, int]
    ) -> Tensor:
        *_, size = self._shapes[name]
        shape = (rows.stop - rows.start, self._positions, size)
        return reader.read(name, offsets, shape).to(self._device)
