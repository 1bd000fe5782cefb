"""Text sampled from the model at the end of a run."""

from __future__ import annotations

from torch import Tensor

from uoe_parallel.data.tokenizer import Tokenizer
from uoe_parallel.inference.sampling import Sampling, sample
from uoe_parallel.inference.terminal import harmless
from uoe_parallel.model.decoding import DecodingMemory
from uoe_parallel.training.engine import TrainingEngine

_SAMPLING = Sampling(num_tokens=200, temperature=0.7)


def sample_text(engine: TrainingEngine, tokenizer: Tokenizer) -> str:
    """A continuation of the config's prompt. Every rank takes part and gets the same text."""
    model, config = engine.model, engine.config
    prompt = config.logging.prompt
    resets = config.data.reset_at_documents
    # The end of another document comes before the text, unless documents don't see each other.
    before = [] if resets else [tokenizer.eod]

    def next_logits(
        tokens_BS: Tensor, documents_BS: Tensor | None, memory: DecodingMemory
    ) -> Tensor:
        assert documents_BS is None, "one text has no padding"
        return engine.logits(tokens_BS, memory)[:, -1]

    engine.deepspeed.eval()
    with model.replicated_tokens():
        [ids] = sample(
            next_logits,
            [[*before, *tokenizer.encode(prompt).tolist()]],
            sampling=_SAMPLING,
            seeds=[config.seed],
            context=config.model.sequence_length,
            by_token=model.decodes_by_token,
            device=engine.device,
            # What another document begins with, nothing has been trained to say.
            ends=lambda _, token: resets and token == tokenizer.eod,
        )
    engine.deepspeed.train()
    # A terminal must not obey what a young model says.
    return harmless(prompt + tokenizer.decode(ids))
