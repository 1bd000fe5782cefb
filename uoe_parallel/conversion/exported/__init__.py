"""What is copied beside exported weights: a model's code for transformers, which needs nothing of
this package."""
