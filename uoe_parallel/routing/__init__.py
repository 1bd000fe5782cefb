"""Who goes where: units, their scores, selections, gates and balance rules. No groups, no experts.

All of it is said token by token: a token has the scores, the choice and the gates of its unit.
Shape suffixes: S positions (or a shard of them), B sequences, E experts that are routed.
"""
