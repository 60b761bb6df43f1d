"""What plans assume before anything has been measured: the speed of hardware, and good shares of memory."""

MEMORY_BYTES_PER_S = 20e9  # at which weights in memory are read
DISK_BYTES_PER_S = 1.5e9  # at which weights on disk are read

# A plan that streams gives 1/n of memory to each of these:
KV_SHARE = 8  # the KV pool, which gets at least one context
SCRATCH_SHARE = 12  # scratch for long steps
WINDOW_SHARE = 4  # the window, which gets at least the largest block and at most the two largest neighbours
