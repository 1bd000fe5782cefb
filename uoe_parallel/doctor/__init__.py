"""Looks at a node and at a launch before a run does: `python -m uoe_parallel.doctor`."""
