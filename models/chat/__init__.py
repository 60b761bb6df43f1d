"""Conversations to text, by the model's own template."""
