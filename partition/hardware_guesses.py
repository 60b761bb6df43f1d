"""What is assumed before anything has been measured: speeds of hardware, fixed costs, and good shares of memory.

The only place for such figures. `throughput.profile` makes its defaults of them, and the machine that nobody measured.
"""

MEMORY_BYTES_PER_S = 20e9  # at which weights in memory are read
DISK_BYTES_PER_S = 1.5e9  # at which weights on disk are read
FLOPS = 100e9  # of attention, and of whatever has no table
# One more row, as a share of a product with one: about what reading weights from memory leaves.
ROW_SHARE = 0.15

# What a processor is taken for where a slower one would gain, but a faster one lose.
FAST_MEMORY_BYTES_PER_S = 200e9
FAST_FLOPS = 3e12

# A plan that streams gives 1/n of memory to each of these. More for KV and long steps is better for many and long texts
# and worse for a short one, so no prediction can decide it; the window's share is where choosing begins.
KV_SHARE = 8  # the KV pool, which gets at least one context
SCRATCH_SHARE = 12  # scratch for long steps
WINDOW_SHARE = 4  # the window, which gets at least the largest block and at most the two largest neighbours

# Steps of so many rows are computed in halves by the ranks of a group, if nobody predicted which are worth it.
OVERLAP_ROWS = 32

# A device that nobody has measured: what its calls for a layer take, and a small copy to or from it.
DEVICE_LAYER_S = 300e-6
COPY_S = 30e-6
DEVICE_SCRATCH_BYTES = 100 << 20  # of its kernels
DEVICE_HOST_BYTES = 512 << 20  # of this machine's memory, that a card's libraries and its driver take

# What ranks do for each other besides computing, in an interpreter on a machine of 2026:
STEP_S = 0.5e-3  # a step begins and ends: order, sampling, bookkeeping
LAYER_S = 60e-6  # the calls of one layer begin and end
MIXTURE_S = 200e-6  # … and of one with experts besides: routing, gathering
LOGIT_S = 0.4e-9  # a number of logits is looked at
MESSAGE_S = 20e-6  # a message is sent or received, and encrypted
HANDED_S = 50e-6  # a sum is handed to a thread, and its result back
BYTE_S = 2e-9  # one byte is encrypted, sent, received and decrypted
ADD_S = 0.15e-9  # a number of a partial is added
ENCODE_S = {"f32": 0.2e-9, "bf16": 2e-9, "int8": 4e-9}  # a number is made ready for the wire …
DECODE_S = {"f32": 0.2e-9, "bf16": 0.6e-9, "int8": 1.1e-9}  # … and read from it
