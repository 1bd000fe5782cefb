"""Trained models without a trainer: opened from a checkpoint on any layout, judged, sampled."""
