"""Models larger than memory: Shoal and its peers in memory cgroups with a cold page cache, in turn on one machine.

    sudo python bench/offload.py --peer-python PATH [--rows dense,gguf] [--rounds 3] [--json OUT.json] [--engines …]

PATH is a python that has llama-cpp-python and Accelerate. Every engine is a fresh process in a cgroup of its own, told
a budget that the group's limit exceeds by 5%, after the page cache was emptied; how fast the disk gives the model's
file to direct reads is measured just before. `--engines llama.cpp` measures some of a row's engines. Models are written
once, with random weights, into --models: llama-70b takes 42 GB there, qwen3-30b-a3b 19 GB, llama-3b 6 GB, mistral-7b
4 GB.
"""

from __future__ import annotations

import sys

import compare
from harness.cgroup import CgroupError, limited
from harness.rows import OFFLOAD_ROWS

PROBE_BYTES = 64 << 20


def main() -> int:
    try:
        with limited(PROBE_BYTES):
            pass
    except CgroupError as error:
        print(error, file=sys.stderr)
        return 2
    return compare.main(OFFLOAD_ROWS, "models larger than memory: Shoal against its peers")


if __name__ == "__main__":
    sys.exit(main())
