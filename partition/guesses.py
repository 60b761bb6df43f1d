"""What plans assume before anything has been measured: speeds of hardware, and which shares of memory serve best."""

MEMORY_BYTES_PER_S = 20e9  # weights in memory are read with
DISK_BYTES_PER_S = 1.5e9  # weights on disk are read with

# Shares of memory that a plan which streams gives to what is no weight (1/n):
KV_SHARE = 8  # the KV pool, but one context at least
SCRATCH_SHARE = 12  # long steps
WINDOW_SHARE = 4  # the window, but from the largest block to the two largest neighbours
