"""`shoal cluster launch`: workers on machines that ssh reaches."""
