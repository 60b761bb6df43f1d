"""Guessing tokens ahead: from the text itself, by a draft model, and how many of them pay."""
