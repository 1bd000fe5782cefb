"""Whether contenders do comparable work: checked before anything is timed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from uoe_parallel.analysis.flop_counter import flop_counter
from uoe_parallel.benchmark.contenders import Contender
from uoe_parallel.parallel import comm
from uoe_parallel.parallel.purposes import Purpose

TOLERANCE = 1e-5
"""Of an output, relative to the largest one: fp32 against fp64."""
NEAR_TIE = 1e-5
"""Scores this close may be ordered either way."""


class IncomparableError(Exception):
    """The same on all ranks."""


@dataclass(frozen=True)
class Work:
    """Of one run over all ranks."""

    pairs: int
    """(token, expert) pairs whose result is in the output."""
    rows: int
    """Pairs and padding that experts computed."""
    multiply_adds: int
    """Of all matrix products, forward and backward."""


def check_comparable(contenders: Sequence[Contender], group: ProcessGroup) -> list[Work]:
    """Run each contender once and see that it computes what its problem says, no less and no more.

    All of them compute y_t = sum_i g_i E_i(x_t), with the same tokens, weights and choice of
    experts; gates are their own. Raises IncomparableError. Collective over `group`, all ranks.
    """
    faults: list[str] = []
    works: list[Work] = []
    for contender in contenders:
        with flop_counter() as counter:
            y_SBD = contender.run()
        gates_TE, rows = contender.gates(), contender.rows()
        counts = [int((gates_TE != 0).sum()), rows, counter.get_total_flops() // 2]
        work = Work(
            *comm.sum_over(
                torch.tensor(counts).to(y_SBD.device), group, purpose=Purpose.MEASUREMENT
            ).tolist()
        )
        found = [*_own_faults(contender, y_SBD, gates_TE, group), *_count_faults(contender, work)]
        sizes = contender.problem.sizes
        who = f"{contender.name} (n {sizes.experts}, k {sizes.top_k})"
        faults += [f"{who} {fault}" for fault in found]
        works.append(work)
    if faults:
        raise IncomparableError("; ".join(faults))
    return works


def _own_faults(
    contender: Contender, y_SBD: Tensor, gates_TE: Tensor, group: ProcessGroup
) -> list[str]:
    """What is wrong on any rank."""
    problem = contender.problem
    judged = {
        "gives an output of another shape than its input": y_SBD.shape != problem.x_SBD.shape,
        "does not visit the experts of the highest scores": contender.is_routed
        and not _are_best(problem.scores(), gates_TE, problem.sizes.top_k),
        "computes another function of its weights and gates": not _is_close(
            y_SBD, problem.plain(gates_TE)
        ),
    }
    gradients = {"the input": problem.x_SBD, **dict(contender.layer.named_parameters())}
    for name, tensor in gradients.items():
        judged[f"leaves {name} without a finite gradient"] = not _is_finite(tensor.grad)
    wrong = torch.tensor(list(judged.values())).to(y_SBD.device, torch.int64)
    wrong = comm.max_over(wrong, group, purpose=Purpose.MEASUREMENT)
    return [fault for fault, seen in zip(judged, wrong.tolist(), strict=True) if seen]


def _are_best(scores_TE: Tensor, gates_TE: Tensor, count: int) -> bool:
    worst_T1 = scores_TE.topk(count, dim=1).values[:, -1:]
    return bool(((gates_TE == 0) | (scores_TE >= worst_T1 - NEAR_TIE)).all())


def _is_close(y_SBD: Tensor, plain_TD: Tensor) -> bool:
    if y_SBD.numel() != plain_TD.numel():
        return False
    difference = (y_SBD.reshape_as(plain_TD) - plain_TD).abs().max()
    return bool(difference <= TOLERANCE * plain_TD.abs().max())  # false for NaN


def _is_finite(gradient: Tensor | None) -> bool:
    return gradient is not None and bool(gradient.isfinite().all())


def _count_faults(contender: Contender, work: Work) -> Iterator[str]:
    sizes = contender.problem.sizes
    wanted = sizes.tokens * contender.pairs_per_token
    if work.pairs > wanted or (work.pairs < wanted and not contender.drops_pairs):
        yield f"computes {work.pairs} (token, expert) pairs instead of {wanted}"
    if work.rows < work.pairs:
        yield f"computes {work.rows} rows for {work.pairs} pairs"
    router = sizes.tokens * sizes.hidden * sizes.experts if contender.is_routed else 0
    # The products of the backward pass, with both factors, are twice those of the forward pass.
    least = 3 * (work.rows * 2 * sizes.hidden * sizes.expert_ffn + router)
    # Some write sums over gates as products, and this project counts which experts go together.
    bookkeeping = sizes.tokens * sizes.experts * (sizes.experts + 4)
    if not least <= work.multiply_adds <= least + bookkeeping:
        yield f"takes {work.multiply_adds} multiply-adds instead of {least}"
