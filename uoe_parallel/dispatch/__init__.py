"""Moving tokens to the ranks of their experts and results back.

Shape suffixes: S positions of this rank (a shard of the sequence, or all of it), B sequences,
T = S x B tokens of this rank, E experts of the block, P ranks of the expert group, R rows present
on a rank, N (row, expert) pairs of a rank's experts, D hidden width.
"""
