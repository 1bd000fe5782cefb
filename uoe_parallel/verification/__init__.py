"""Proof that layouts compute the same numbers: one run on one rank, one on each other layout.

Every run is the trainer's own, with a checkpoint after every step. Whatever layout wrote them, run
folders hold full tensors by name, and only they are compared: `record` reads what a run left,
`compare` measures two of them, and the rest decides what runs and starts it.
"""
