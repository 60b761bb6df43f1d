"""One model's steps: which tokens are computed next, carrying them through the blocks, choosing what follows."""
