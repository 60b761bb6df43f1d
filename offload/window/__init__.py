"""Weights that stream: what is read next, into which memory, by which threads."""
