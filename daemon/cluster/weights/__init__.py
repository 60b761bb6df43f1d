"""Weights on their way from the head to workers, and what workers keep of them."""
