"""Getting models into memory: plans within the budget, what is loaded, what goes for room."""
