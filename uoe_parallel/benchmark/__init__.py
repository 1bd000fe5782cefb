"""Layers held against each other side by side, in one run on the same ranks.

Shape suffixes: S positions, B sequences, T = S x B tokens of all ranks, D hidden width, F
feed-forward width, n experts, k experts of a token.
"""
