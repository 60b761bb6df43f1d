"""What a graphics card computes in Triton's language."""
