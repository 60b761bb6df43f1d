"""Weights that pass through a device in every step, while the CPU attends."""
