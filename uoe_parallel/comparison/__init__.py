"""Does it help? Union-of-Experts models beside others, under one budget and equal tuning."""
