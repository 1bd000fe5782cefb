"""Who goes where: selections, gates and balance losses, pure functions of scores.

Shape suffixes: S positions (or a shard of them), B sequences, E all experts of a block.
"""
