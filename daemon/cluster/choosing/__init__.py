"""What decides which machines run a model, beside what they measure of themselves."""
