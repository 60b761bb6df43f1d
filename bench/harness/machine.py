"""The machine that figures come from: what it is, how busy it is, and how fast it reads memory at the moment.

Knows /proc where there is one. Does not know what is measured.
"""

from __future__ import annotations

import functools
import mmap
import os
import platform
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil

import shoal.daemon

BUFFER_BYTES = 1 << 30  # read at once: more than any cache holds
READS = 3
_FLAGS = (
    "avx2",
    "avx512f",
    "avx512_vnni",
    "avx_vnni",
    "avx512_bf16",
    "amx_int8",
    "asimddp",
    "i8mm",
    "bf16",
    "sve",
)


def describe() -> dict[str, Any]:
    """Facts that do not change between runs on one machine."""
    facts = _cpu_facts()
    flags = set(facts.get("flags", facts.get("Features", "")).split())
    kernels = os.environ.get("SHOAL_KERNELS")
    return {
        "cpu": facts.get("model name", platform.processor() or platform.machine()),
        "flags": [flag for flag in _FLAGS if flag in flags],
        "virtual": "hypervisor" in flags,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        **({"kernels": kernels} if kernels else {}),  # chosen by hand
    }


def versions() -> dict[str, str]:
    """Facts that may change: the measured commit, Python and NumPy, and how this process is scheduled."""
    return {
        "commit": _commit(),
        "python": platform.python_version(),
        "numpy": np.__version__,
        "scheduling": _scheduling(),
    }


def busy() -> float:
    """The load average of the last minute, which includes what is being measured."""
    return round(os.getloadavg()[0], 1)


def waited_s(kind: str) -> float:
    """Seconds since the start in which somebody waited for a processor ("cpu") or the disk ("io"); 0 if not known."""
    file = Path("/proc/pressure") / kind
    return int(file.read_text().split()[4].partition("=")[2]) / 1e6 if file.exists() else 0.0


def dram_read_gb_per_s(threads: int) -> float:
    """GB/s of the best of a few reads of a large buffer, of which each thread reads a part; 0 if there is no room."""
    if psutil.virtual_memory().available < 4 * BUFFER_BYTES:
        return 0.0
    parts = [part.max for part in np.array_split(_buffer(), threads)]
    return max(BUFFER_BYTES / _seconds(parts) / 1e9 for _ in range(READS))


def memory_of(pid: int) -> dict[str, int]:
    """Bytes of a process: the largest resident set so far, and how much of the present one is anonymous or of files."""
    names = {"VmHWM": "peak", "VmRSS": "resident", "RssAnon": "anonymous", "RssFile": "file"}
    lines = (line.split() for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return {names[key]: 1024 * int(rest[0]) for head, *rest in lines if (key := head.rstrip(":")) in names}


def _cpu_facts() -> dict[str, str]:
    try:
        first = Path("/proc/cpuinfo").read_text().split("\n\n")[0]
    except OSError:
        return {}
    return {
        key.strip(): value.strip() for key, _, value in (line.partition(":") for line in first.splitlines())
    }


def _commit() -> str:
    tree = Path(shoal.daemon.__file__).parent
    done = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=tree, capture_output=True, text=True, check=False
    )
    return done.stdout.strip() or "unknown"


def _scheduling() -> str:
    """Policy and niceness. If shells are scheduled as groups, the niceness of the group is what counts."""
    policies = {getattr(os, f"SCHED_{name}", None): name.lower() for name in ("FIFO", "RR", "OTHER")}
    policy = policies.get(os.sched_getscheduler(0), "other") if hasattr(os, "sched_getscheduler") else "other"
    group = Path("/proc/self/autogroup")
    nice = group.read_text().split()[-1] if group.exists() else os.nice(0)
    return "default" if (policy, str(nice)) == ("other", "0") else f"{policy}, nice {nice}"


@functools.cache
def _buffer() -> np.ndarray[Any, Any]:
    pages = mmap.mmap(-1, BUFFER_BYTES)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        pages.madvise(mmap.MADV_HUGEPAGE)
    buffer = np.frombuffer(pages, np.float32)
    buffer[:] = 1
    return buffer


def _seconds(parts: Sequence[Callable[[], object]]) -> float:
    threads = [threading.Thread(target=part) for part in parts]
    started_s = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return time.perf_counter() - started_s
