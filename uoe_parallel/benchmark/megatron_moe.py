"""megatron-core's MoE layer: all-to-all dispatcher, an MLP for each expert, one after the other.

Without a GPU its dispatcher still works with CUDA streams and events, and its router asks for a
function of Transformer Engine's that is not there. Both are answered while the layer is built and
run, and only then: others must find torch as it is.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from uoe_parallel.benchmark.contenders import BALANCE_LOSS, Z_LOSS, Contender, Foreign
from uoe_parallel.benchmark.problem import Problem
from uoe_parallel.benchmark.session import DTYPE, Session

NAME = "megatron-core MoE"
_ABSENT = object()


class MegatronContender(Contender):
    """Experts are spread over all ranks, each of which has tokens of its own."""

    def __init__(self, session: Session, problem: Problem) -> None:
        with _stand_ins():
            layer = _build(session, problem)
        super().__init__(NAME, problem, layer)
        self._rows = 0
        layer.experts.register_forward_pre_hook(self._count)
        self.router = layer.router

    def environment(self) -> AbstractContextManager[object]:
        return _stand_ins()

    def forward(self) -> tuple[Tensor, ...]:
        y_SBD, _ = self.layer(self.problem.x_SBD)
        return (y_SBD,)

    @torch.no_grad()
    def gates(self) -> Tensor:
        with self.environment():
            gates_TE, mask_TE = self.router(self.problem.x_SBD)
        return gates_TE * mask_TE

    def rows(self) -> int:
        return self._rows

    def _count(self, experts: object, arguments: tuple[Any, ...]) -> None:
        self._rows = len(arguments[0])


def _build(session: Session, problem: Problem) -> Any:
    from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec
    from megatron.core.transformer.spec_utils import build_module
    from megatron.core.transformer.transformer_config import TransformerConfig

    sizes, group = problem.sizes, session.groups.tensor
    config = TransformerConfig(
        num_layers=1,
        hidden_size=sizes.hidden,
        num_attention_heads=sizes.heads,
        ffn_hidden_size=sizes.ffn,
        activation_func=F.gelu,
        add_bias_linear=False,
        num_moe_experts=sizes.experts,
        moe_ffn_hidden_size=sizes.expert_ffn,
        moe_router_topk=sizes.top_k,
        moe_router_dtype="fp32",
        # A softmax over the chosen ones alone would be 1 for one expert, and without a slope.
        moe_router_pre_softmax=sizes.top_k == 1,
        moe_router_load_balancing_type="seq_aux_loss",
        moe_aux_loss_coeff=BALANCE_LOSS,
        moe_z_loss_coeff=Z_LOSS,
        moe_token_dispatcher_type="alltoall",
        tensor_model_parallel_size=group.size(),
        sequence_parallel=group.size() > 1,
        expert_model_parallel_size=group.size(),
        expert_tensor_parallel_size=1,
        params_dtype=DTYPE,
        use_cpu_initialization=not session.device.is_cuda,
    )
    spec = get_moe_module_spec(use_te=False, num_experts=sizes.experts)
    layer: Any = build_module(spec, config=config)
    layer = layer.to(session.device.torch_device)
    with torch.no_grad():
        layer.router.weight.copy_(problem.router_ED)
        local = zip(layer.local_expert_indices, layer.experts.local_experts, strict=True)
        for number, expert in local:
            expert.linear_fc1.weight.copy_(problem.up_EFD[number])
            expert.linear_fc2.weight.copy_(problem.down_EDF[number])
    return layer


class _HostStream:
    """In place of a CUDA stream and its events: what was queued is done."""

    def wait_stream(self, other: object) -> None: ...

    def record_event(self) -> _HostStream:
        return self

    def synchronize(self) -> None: ...


_STREAM = _HostStream()


def _on_host(tensor: Any, as_numpy: bool = False, **_: object) -> Any:
    """As what copies from a GPU, which leaves sizes of exchanges as tensors if they are on the host
    already, and so of no use."""
    return tensor.numpy() if as_numpy and isinstance(tensor, Tensor) else tensor


@contextmanager
def _stand_ins() -> Iterator[None]:
    """Nothing is replaced on CUDA."""
    if torch.cuda.is_available():
        yield
        return
    from megatron.core.transformer.moe import moe_utils, token_dispatcher

    dispatcher = token_dispatcher.MoEAlltoAllTokenDispatcher
    with ExitStack() as stack:
        for owner, attributes in (
            (
                torch.cuda,
                {
                    "Stream": lambda *_, **__: _STREAM,
                    "current_stream": lambda *_: _STREAM,
                    "stream": lambda _: nullcontext(),
                },
            ),
            (dispatcher, {"cuda_dtoh_stream": _STREAM}),
            (token_dispatcher, {"maybe_move_tensor_to_cpu": _on_host}),
            (moe_utils, {"te_general_gemm": None}),
        ):
            for name, value in attributes.items():
                stack.enter_context(_replaced(owner, name, value))
        yield


@contextmanager
def _replaced(owner: Any, name: str, value: object) -> Iterator[None]:
    before = vars(owner).get(name, _ABSENT)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if before is _ABSENT:
            delattr(owner, name)
        else:
            setattr(owner, name, before)


MEGATRON = Foreign(NAME, "megatron-core", MegatronContender)
