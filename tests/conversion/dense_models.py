"""Small dense models, made by transformers and saved as it saves them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.conversion.hugging_face import transformers

VOCABULARY = 257
"""Of bytes."""
CONTEXT = 32


def dense_model(kind: str, **fields: Any) -> Any:
    """A causal model of transformers with random weights, biases and norms too. Raises KeyError for
    an unknown kind."""
    library = transformers()
    ends = {"bos_token_id": None, "eos_token_id": None}
    fields = {"vocab_size": VOCABULARY, **fields}
    if kind == "gpt2":
        small = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_inner": 96, "n_positions": CONTEXT}
        config = library.GPT2Config(**{**small, **ends, **fields})
        model = library.GPT2LMHeadModel(config)
    else:
        configs = {"llama": library.LlamaConfig, "mistral": library.MistralConfig}
        classes = {
            "llama": library.LlamaForCausalLM,
            "mistral": library.MistralForCausalLM,
        }
        small = {
            "hidden_size": 32,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": CONTEXT,
        }
        config = configs[kind](**{**small, **ends, **fields})
        model = classes[kind](config)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        is_norm = "norm" in name or ".ln_" in name
        mean = 1.0 if is_norm and name.endswith("weight") else 0.0
        torch.nn.init.normal_(parameter, mean, 0.3, generator=generator)
    return model.eval()


@contextmanager
def _one_thread() -> Iterator[None]:
    """So small a model only waits for more of them."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@_one_thread()
def train(model: Any, text: str, steps: int) -> None:
    """On the bytes of `text`."""
    ids = torch.tensor(list(text.encode()))
    generator = torch.Generator().manual_seed(3)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(steps):
        first_B1 = torch.randint(len(ids) - CONTEXT, (16, 1), generator=generator)
        tokens_BS = ids[first_B1 + torch.arange(CONTEXT)]
        optimizer.zero_grad()
        model(tokens_BS, labels=tokens_BS).loss.backward()
        optimizer.step()


def save(model: Any, folder: Path, *, shard_size: str = "1GB") -> Path:
    model.save_pretrained(folder, max_shard_size=shard_size)
    return folder


@_one_thread()
@torch.no_grad()
def logits(model: Any, tokens_BS: Tensor) -> Tensor:
    """fp64 as far as transformers goes, whose norms and angles are fp32: [B, S, V]."""
    return model.double()(tokens_BS).logits


def random_tokens(batch: int = 3, length: int = CONTEXT) -> Tensor:
    return torch.randint(VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(2))
