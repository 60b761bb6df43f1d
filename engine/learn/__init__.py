"""What the scheduler learns while it runs: what steps cost, how long answers get, who was given how much."""
