"""Accelerators: their memory, copies to and from it, and the home that computes there."""
