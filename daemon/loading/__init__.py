"""Gets models into memory: plans within the budget, which models are loaded, which one goes to make room."""
