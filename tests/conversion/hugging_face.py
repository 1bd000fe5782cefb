"""transformers as the tests use it: without the network, and with caches of their own."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


@cache  # importing it takes seconds
def transformers() -> Any:
    import transformers as module

    module.logging.set_verbosity_error()
    module.logging.disable_progress_bar()
    return module


def load(folder: Path, **options: Any) -> Any:
    """A causal language model in evaluation mode, with all of its weights from `folder`."""
    auto = transformers().AutoModelForCausalLM
    model, report = auto.from_pretrained(
        folder, trust_remote_code=True, output_loading_info=True, **options
    )
    assert not any(report.values()), report
    return model.eval()


@torch.no_grad()
def logits(model: Any, tokens_BS: Tensor, **options: Any) -> Tensor:
    """[B, S, V]."""
    return model(tokens_BS, **options).logits
