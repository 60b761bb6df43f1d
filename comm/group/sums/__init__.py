"""Sums of all ranks: how orders, rows and partials travel between the machines of a group."""
