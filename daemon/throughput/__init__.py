"""The throughput model's figures: profiles in files, measuring this machine, what models weigh."""
