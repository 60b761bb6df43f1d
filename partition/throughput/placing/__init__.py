"""What a device takes, and whether a plan with it is better than one without; see docs/throughput-model.md. Pure."""
