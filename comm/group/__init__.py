"""Bytes between the machines of a group: who they are, how they are connected, and what they compute together."""
