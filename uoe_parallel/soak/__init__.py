"""A real job that gets hurt, again and again, and whose curve must not show it."""
