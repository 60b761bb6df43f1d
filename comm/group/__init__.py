"""Bytes between the machines of a group: who they are, how they came to trust each other, and their channels."""
