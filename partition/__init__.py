"""Who holds what: spec and plan. Pure: no I/O, no arrays."""
