"""What a run will take, before it runs: memory, traffic and time, and the best layout of all."""
