"""The learning rate as a fraction of its peak, step by step."""

from __future__ import annotations

import math


def learning_rate_factor(step: int, *, warmup_steps: int, steps: int, min_factor: float) -> float:
    """Factor on the peak learning rate for optimizer step `step`, counted from 0.

    Linear warm-up over the first `warmup_steps` steps, then a cosine down to `min_factor`:

    - step s < warmup_steps has (s + 1) / (warmup_steps + 1): never 0, since such a step would
      be wasted, and never 1. The warm-up starts near 0 whatever `min_factor` is, so that
      min_factor = 1 means "warm up, then constant".
    - step warmup_steps is the first, and with min_factor < 1 the only one, at the peak.
    - `min_factor` is reached at step `steps`, one past the last, so that min_factor = 0 wastes
      no step either; later steps (a run continued beyond its schedule) keep `min_factor`.
    - with warmup_steps >= steps the run ends inside the warm-up.

    Args:
        step: the optimizer step about to be taken, from 0.
        warmup_steps: steps below the peak at the start; 0 starts at the peak.
        steps: optimizer steps of the whole run.
        min_factor: floor after the warm-up, in [0, 1].
    """
    assert step >= 0 and warmup_steps >= 0 and 0.0 <= min_factor <= 1.0
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    if step >= steps:
        return min_factor
    progress = (step - warmup_steps) / (steps - warmup_steps)
    return min_factor + (1.0 - min_factor) * 0.5 * (1.0 + math.cos(math.pi * progress))
