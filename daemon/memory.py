"""This process and memory: how much it may still use (the machine's, or its cgroup's if less), has, and gives back."""

from __future__ import annotations

import contextlib
import ctypes
import resource
import sys
from pathlib import Path

import psutil

_CGROUP_FILES = (  # (limit, usage) of v2 and v1, as a container sees its own group
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
)


def _read(path: str) -> int | None:
    try:
        return int(Path(path).read_text())
    except (OSError, ValueError):  # no such controller, or "max"
        return None


def available_bytes() -> int:
    """Bytes that can be allocated without swapping or exceeding the cgroup's limit."""
    free = int(psutil.virtual_memory().available)
    for limit_file, usage_file in _CGROUP_FILES:
        limit, usage = _read(limit_file), _read(usage_file)
        if limit is not None and usage is not None:
            free = min(free, max(0, limit - usage))
    return free


def resident_bytes() -> int:
    """Resident set of this process now."""
    return int(psutil.Process().memory_info().rss)


def peak_memory_bytes() -> int:
    """The largest resident set this process has had."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def return_freed() -> None:
    """Give freed memory back to the system. glibc keeps blocks of up to 32 MB otherwise, which weights often are."""
    with contextlib.suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)
