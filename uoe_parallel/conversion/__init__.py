"""Between Hugging Face checkpoints and ours: dense models sliced into experts, and back."""
