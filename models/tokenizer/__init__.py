"""Text to token ids and back, whatever files the model came in."""
