"""Packs: a model's blocks as kernels want them, in one file."""
