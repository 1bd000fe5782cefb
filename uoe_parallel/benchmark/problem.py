"""What all contenders are given alike, and what it comes to by the definition."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from uoe_parallel.benchmark.session import DTYPE, Session
from uoe_parallel.benchmark.sizes import Sizes, check_sizes

WEIGHT_STD = 0.02
"""Of the router too, so that experts are used about evenly."""


@dataclass(frozen=True)
class Problem:
    """This rank's tokens, the gradient of the output, and the whole weights on every rank."""

    sizes: Sizes
    x_SBD: Tensor
    """[S/P, B, D], a leaf that requires a gradient."""
    upstream_SBD: Tensor
    router_ED: Tensor
    up_EFD: Tensor
    """[n, width of an expert, D]"""
    down_EDF: Tensor

    @classmethod
    def draw(cls, session: Session, sizes: Sizes) -> Problem:
        """Random tokens and weights; the same tokens whatever the experts are. Raises UserError for
        sizes that can't be cut over the session's ranks."""
        check_sizes(sizes, session.groups.tensor.size())
        generator = torch.Generator().manual_seed(1)

        def weight(*shape: int) -> Tensor:
            drawn = torch.randn(shape, generator=generator, dtype=DTYPE) * WEIGHT_STD
            return drawn.to(session.device.torch_device)

        n, width, hidden = sizes.experts, sizes.expert_ffn, sizes.hidden
        return cls(
            sizes,
            session.hidden_states(sizes, seed=2).requires_grad_(),
            session.hidden_states(sizes, seed=3),
            router_ED=weight(n, hidden),
            up_EFD=weight(n, width, hidden),
            down_EDF=weight(n, hidden, width),
        )

    @property
    def x_TD(self) -> Tensor:
        """This rank's tokens, outside of any graph."""
        return self.x_SBD.detach().flatten(0, 1)

    def scores(self) -> Tensor:
        """[T, n] in fp64."""
        return self.x_TD.double() @ self.router_ED.double().T

    def plain(self, gates_TE: Tensor) -> Tensor:
        """y_t = sum_i g_i E_i(x_t) in fp64, [T, D], experts with a gate of zero left out."""
        x_TD = self.x_TD.double()
        y_TD = torch.zeros_like(x_TD)
        for gate_T, up_FD, down_DF in zip(gates_TE.T, self.up_EFD, self.down_EDF, strict=True):
            [row_N] = gate_T.nonzero(as_tuple=True)
            hidden_NF = F.gelu(x_TD[row_N] @ up_FD.double().T)
            gate_N1 = gate_T[row_N].double().unsqueeze(1)
            y_TD.index_add_(0, row_N, gate_N1 * (hidden_NF @ down_DF.double().T))
        return y_TD
