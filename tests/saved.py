"""What a forward pass keeps for the backward pass, counted."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor


class Saved(torch.autograd.graph.saved_tensors_hooks):
    """Notes what autograd is given to keep inside the block."""

    def __init__(self) -> None:
        self.tensors: list[Tensor] = []
        super().__init__(self._note, lambda saved: saved)

    def _note(self, saved: Tensor) -> Tensor:
        self.tensors.append(saved)
        return saved

    def bytes(self, result: Tensor, beside: Iterable[Tensor] = ()) -> int:
        """What is there now of all that was kept for `result`, storages counted once, and of it
        nothing that is `beside` anyway. Floating point alone: not indices and masks."""
        kept = (*self.tensors, *_checkpointed(result))
        storages = {_key(x): x.untyped_storage() for x in kept if x.is_floating_point()}
        for tensor in beside:
            storages.pop(_key(tensor), None)
        return sum(storage.nbytes() for storage in storages.values())


def _key(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _checkpointed(result: Tensor) -> Iterator[Tensor]:
    """What DeepSpeed's checkpoint keeps by itself, out of autograd's sight."""
    nodes, seen = [result.grad_fn], set()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        yield from getattr(node, "deepspeed_saved_tensors", ())
        nodes += [following for following, _ in node.next_functions]
