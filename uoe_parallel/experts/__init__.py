"""What an expert is: slices of Megatron's parallel linears and the arithmetic over sorted rows.

Shape suffixes: T tokens of a rank, R rows (tokens present on a rank), N (row, expert) pairs,
E experts on this rank, B sequences, S positions, D hidden width, F feed-forward width,
H query heads per expert, d head width, M rows of keys where they are not those of queries,
C documents, G runs ((expert, document) pairs, or (expert, sequence) in a cache).
"""
