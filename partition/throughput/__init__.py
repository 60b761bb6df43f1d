"""The throughput model: what machines can do, what plans take, which one is best (docs/throughput-model.md)."""
