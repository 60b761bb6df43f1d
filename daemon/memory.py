"""This process and memory: how much it may still use (the machine's, or its cgroup's if less), has, and gives back."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import re
import resource
import sys
from collections.abc import Iterator
from pathlib import Path

_CGROUP_FILES = (  # (limit, usage) of v2 and v1, as a container sees its own group
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
)
# a private mapping of a file in smaps that may be executed, not written, and has no page of its own
_CODE = re.compile(
    r"^(?P<start>[0-9a-f]+)-(?P<end>[0-9a-f]+) r-xp [0-9a-f]+ \S+ [1-9]\d* +/.*\n(?:[A-Z].*\n)*?Anonymous: +0 kB$",
    re.MULTILINE,
)


def _read(path: str) -> int | None:
    try:
        return int(Path(path).read_text())
    except (OSError, ValueError):  # no such controller, or "max"
        return None


def available_bytes() -> int:
    """Bytes that can be allocated without swapping or exceeding the cgroup's limit."""
    import psutil  # 15 ms, which clients of a daemon need not spend

    free = int(psutil.virtual_memory().available)
    for limit_file, usage_file in _CGROUP_FILES:
        limit, usage = _read(limit_file), _read(usage_file)
        if limit is not None and usage is not None:
            free = min(free, max(0, limit - usage))
    return free


def resident_bytes() -> int:
    """Resident set of this process now."""
    import psutil

    return int(psutil.Process().memory_info().rss)


def peak_memory_bytes() -> int:
    """The largest resident set this process has had."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def return_freed() -> None:
    """Give back to the system what this process does not need: freed memory, and code that may not run again.

    glibc keeps freed blocks of up to 32 MB, which weights often are; importing torch leaves 70 MB of code that only
    imports run.
    """
    library = ctypes.CDLL(None)
    with contextlib.suppress(AttributeError):  # another C library
        library.malloc_trim(0)
    with contextlib.suppress(AttributeError, OSError):  # another system
        for start, size in _code_mappings():
            library.madvise(ctypes.c_void_p(start), ctypes.c_size_t(size), mmap.MADV_DONTNEED)


def _code_mappings() -> Iterator[tuple[int, int]]:
    """(address, bytes) of the mapped code whose pages are all as in its file, so that they come back when they run."""
    for mapping in re.finditer(_CODE, Path("/proc/self/smaps").read_text()):
        start, end = int(mapping["start"], 16), int(mapping["end"], 16)
        yield start, end - start
