"""The engine and the loop around it."""
