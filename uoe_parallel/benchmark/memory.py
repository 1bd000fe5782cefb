"""Peak activation memory of routed layers, beside what their saved tensors need."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor

from uoe_parallel.benchmark.allocations import kept_for_backward, peak_memory, storage_bytes
from uoe_parallel.benchmark.session import Session
from uoe_parallel.model.block import DenseBlock
from uoe_parallel.model.context import Context


def measure(session: Session) -> list[dict[str, Any]]:
    """An entry for each layer, routed and dense: "layer" and figures in bytes. On one rank.

    "saved_bytes": distinct storages that autograd keeps of the forward pass, without the input and
    the parameters. "forward_peak_bytes" and "peak_bytes": the most that lives at a time in the
    forward pass, and in it and the backward pass, beyond what lived before: input, parameters and
    the gradient that comes in. In these peaks are also the results, as far as they are there by
    then: "output_bytes", "input_gradient_bytes" and "parameter_gradient_bytes". "activation_bytes":
    the larger of the forward peak without the output and of the whole one without all of these,
    and the input, which autograd keeps as well. "ratio": of that to the saved bytes and the input.
    """
    assert session.groups.tensor.size() == 1, "what travels between ranks is not counted here"
    sizes = session.sizes
    half = replace(sizes, top_k=sizes.heads // 2)
    layers = {
        "routed feed-forward": session.feed_forward(sizes, routed=True),
        "dense feed-forward": session.feed_forward(sizes, routed=False),
        "SMHA, half of the tokens": session.attention(half, routed=True),
        "dense attention": session.attention(half, routed=False),
    }
    context = session.context(sizes)
    x_SBD = session.hidden_states(sizes, seed=1).requires_grad_()
    upstream_SBD = session.hidden_states(sizes, seed=2)
    return [
        {"layer": name, **_figures(session, block, x_SBD, upstream_SBD, context)}
        for name, block in layers.items()
    ]


def _figures(
    session: Session, block: DenseBlock, x_SBD: Tensor, upstream_SBD: Tensor, context: Context
) -> dict[str, Any]:
    parameters = list(block.parameters())

    def forward() -> Tensor:
        return block(x_SBD, context)

    def both() -> None:
        forward().backward(upstream_SBD)

    # What is only made the first time, such as indices that the context keeps.
    both()
    for leaf in (x_SBD, *parameters):
        leaf.grad = None
    with kept_for_backward() as kept:
        output_SBD = forward()
    saved = storage_bytes(kept, besides=[x_SBD, *parameters])
    output = storage_bytes([output_SBD])
    del output_SBD, kept
    forward_peak = peak_memory(forward, session.device)
    peak = peak_memory(both, session.device)
    gradients = [leaf.grad for leaf in (x_SBD, *parameters) if leaf.grad is not None]
    input_gradient = storage_bytes(gradients[:1])
    parameter_gradient = storage_bytes(gradients[1:])
    gradient_bytes = input_gradient + parameter_gradient
    kept_input = storage_bytes([x_SBD])
    activation = max(forward_peak, peak - gradient_bytes) - output + kept_input
    for leaf in (x_SBD, *parameters):
        leaf.grad = None
    return {
        "saved_bytes": saved,
        "forward_peak_bytes": forward_peak,
        "peak_bytes": peak,
        "output_bytes": output,
        "input_gradient_bytes": input_gradient,
        "parameter_gradient_bytes": parameter_gradient,
        "activation_bytes": activation,
        "ratio": activation / (saved + kept_input),
    }
