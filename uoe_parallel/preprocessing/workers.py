"""Parts made by several processes at a time, and handed on in the order of their pieces."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Generator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import Connection
from pathlib import Path

from uoe_parallel.errors import UserError
from uoe_parallel.preprocessing.parts import Part, PartMaker, Recipe
from uoe_parallel.preprocessing.spans import Piece

_maker: PartMaker
"""A worker's own."""


def make_parts(
    recipe: Recipe, folder: Path, pieces: Sequence[Piece], workers: int
) -> Generator[Part, None, None]:
    """The parts of `pieces`, in their order. With one worker, it is this process.

    Workers end when it is closed, and with this process, however that ends. Raises what
    `PartMaker.make` does, for the first piece that gives reason to, and UserError when a worker is
    killed.
    """
    if workers == 1:
        yield from map(PartMaker(recipe, folder).make, pieces)
        return
    # Not forked: threads of the tokenizer's library would be missing in the copy.
    context = multiprocessing.get_context("spawn")
    reader, writer = context.Pipe(duplex=False)
    pool = ProcessPoolExecutor(workers, context, _begin, (recipe, folder, reader))
    # The pipe is closed before the pool waits for its workers: there may be hours left to read of
    # what they have in hand when something ends the run.
    with reader, pool, writer:
        # Not `pool.map`, which cancels what is left: a pool that loses its workers trips over that.
        futures = [pool.submit(_make, piece) for piece in pieces]
        try:
            for future in futures:
                yield future.result()
        except BrokenProcessPool as error:
            raise UserError(
                "a worker was killed, as the system does where memory runs out; repeat the command "
                "to go on, with fewer --workers"
            ) from error


def _begin(recipe: Recipe, folder: Path, pipe: Connection) -> None:
    # Ctrl-C reaches all processes of a terminal, and the first one has a message for it.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    threading.Thread(target=_end_with, args=(pipe,), daemon=True).start()
    global _maker
    _maker = PartMaker(recipe, folder)


def _end_with(pipe: Connection) -> None:
    """End this process when the other end of `pipe` is closed, or its process is no more."""
    pipe.poll(None)
    os._exit(0)


def _make(piece: Piece) -> Part:
    return _maker.make(piece)
