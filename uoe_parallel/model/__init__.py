"""The language model: embedding, residual blocks of routed or dense layers, head.

Hidden states are [S, B, D], or [S/P, B, D] with sequence parallelism, S first as in Megatron.
"""
