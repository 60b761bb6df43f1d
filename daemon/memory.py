"""This process and memory: how much it may still use (of the machine's or its cgroup's), has, and gives back.

A budget bounds everything that a cgroup would be charged for: private memory, pages of libraries that are in use, and
the page cache of files that were read.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import re
import resource
import sys
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path

from shoal import kernels
from shoal.offload.budget import Budget
from shoal.partition.amounts import format_bytes

from . import cgroup
from .errors import DaemonError

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -3, -8  # of glibc's malloc.h
HEAP_END_BYTES = 256 << 20  # that stay
MOST_FROM_HEAP_BYTES = 32 << 20  # of one array: glibc allows no more
LEFT_ALONE_SHARE = 0.1  # of the free memory, if nobody asked for a budget
LEFT_ALONE_BYTES = 512 << 20  # of the machine's memory at least so much …
MOST_LEFT_ALONE_SHARE = 0.25  # … but no larger share than this
CODE_BYTES = 28 << 20  # libraries' code and constants in use, with what the kernel keeps for them
TORCH_CODE_BYTES = 76 << 20  # … of torch, in which the reference kernels compute
GROWTH_BYTES = 12 << 20  # of Python and its libraries in a long life: stacks, requests, replies
CHILD_BYTES = 12 << 20  # a process that renders chat templates
PROCESS = "this process"  # in the ledger
RUNTIMES = "libraries of devices"

_runtimes: dict[str, tuple[int, int]] = {}  # what each device took when it was opened: private bytes, and all
_opening = threading.Lock()


def pinned_for(device: str) -> str:
    """What page-locked memory is called in the ledger."""
    return f"page-locked memory for {device}"


@contextlib.contextmanager
def opening(device: str) -> Iterator[None]:
    """Within it a device may be opened. The first time, its libraries and its driver take memory of this process, also
    where they find that it cannot be used, and keep it. `take_runtimes` enters that in a ledger."""
    with _opening:
        if device in _runtimes:
            yield
            return
        private, resident = private_bytes(), resident_bytes()
        try:
            yield
        finally:
            more = max(0, private_bytes() - private)
            _runtimes[device] = more, max(more, resident_bytes() - resident)


def take_runtimes(budget: Budget) -> None:
    """Enter what devices have taken until now, whether they were opened before this ledger was made or since."""
    if taken := sum(nbytes for _, nbytes in _runtimes.values()):
        budget.take(RUNTIMES, taken)


def available_bytes() -> int:
    """Bytes that can be allocated without swapping or exceeding a cgroup's limit."""
    free, room = _free_bytes(), cgroup.room_bytes()
    return free if room is None else min(free, room)


def _free_bytes() -> int:
    import psutil  # 15 ms, which clients of a daemon need not spend

    return int(psutil.virtual_memory().available)


def _usable_bytes() -> int:
    """What is available, without what is left to others. A cgroup's limit is meant for us, so less of it is left."""
    free, room = _free_bytes(), cgroup.room_bytes()
    left = min(max(LEFT_ALONE_SHARE * free, LEFT_ALONE_BYTES), MOST_LEFT_ALONE_SHARE * free)
    usable = free - int(left)
    return usable if room is None else min(usable, room - int(LEFT_ALONE_SHARE * room))


def total_bytes() -> int:
    """All memory that this process could ever have: the machine's, or its cgroup's limit."""
    import psutil

    total = int(psutil.virtual_memory().total)
    limit = cgroup.limit_bytes()
    return total if limit is None else min(total, limit)


def bounded(memory_bytes: int | None) -> bool:
    """Whether something but the machine's size bounds this process: a budget asked for, or a cgroup."""
    return memory_bytes is not None or cgroup.room_bytes() is not None


def budget_of(memory_bytes: int | None) -> Budget:
    """The ledger of this process: `memory_bytes` in all, or as much as leaves the machine usable. What the process
    itself takes is entered. Raises DaemonError when the machine has less than that."""
    if memory_bytes is not None and memory_bytes > (total := total_bytes()):
        raise DaemonError(
            "resources",
            f"a budget of {format_bytes(memory_bytes)} was asked for, but there are {format_bytes(total)} of memory",
            "`memory_bytes=None` takes what leaves the machine usable",
        )
    in_torch = kernels.home() == "reference"  # and then torch has been imported
    with _opening:
        own = private_bytes()
        devices = min(own, sum(private for private, _ in _runtimes.values()))
    later = CODE_BYTES + GROWTH_BYTES + CHILD_BYTES + in_torch * TORCH_CODE_BYTES
    if memory_bytes is None:
        memory_bytes = own + max(later, _usable_bytes())
    budget = Budget(memory_bytes)
    budget.take(PROCESS, own - devices + later)
    take_runtimes(budget)
    return budget


def private_bytes() -> int:
    """Memory of this process that no file backs."""
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:  # another system
        return resident_bytes()
    found = re.search(r"^RssAnon:\s+(\d+) kB$", status, re.MULTILINE)
    return 1024 * int(found[1]) if found else resident_bytes()


def resident_bytes() -> int:
    """Resident set of this process now."""
    import psutil

    return int(psutil.Process().memory_info().rss)


def peak_memory_bytes() -> int:
    """The largest resident set this process has had."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def return_freed() -> None:
    """Give memory that nothing refers to back to the system: glibc keeps freed blocks of up to 32 MB."""
    gc.collect()  # a model may hang on the traceback of some error
    trim()


def trim() -> None:
    """Give back freed memory only."""
    with contextlib.suppress(AttributeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


def one_heap() -> None:
    """Let threads that begin later allocate from one heap: `trim` does not give back the end of a thread's own, and no
    such heap holds more than 64 MB."""
    with contextlib.suppress(AttributeError):  # another C library
        ctypes.CDLL(None).mallopt(M_ARENA_MAX, 1)


def keep_freed() -> None:
    """Let what steps free stay with this process until `trim`: they need as much again at once. Else glibc gives it
    back and gets it anew, page by page, if by chance nothing lies behind it (45,000 pages in a prompt of 512 tokens,
    which took 1.1 times as long)."""
    with contextlib.suppress(AttributeError):  # another C library
        library = ctypes.CDLL(None)
        library.mallopt(M_TRIM_THRESHOLD, HEAP_END_BYTES)
        library.mallopt(M_MMAP_THRESHOLD, MOST_FROM_HEAP_BYTES)


_forgotten: set[str] = set()  # modules' files: each is read once, at its import


def forget_files(more: Iterable[Path] = ()) -> None:
    """Drop this process's libraries and modules, and the files `more`, from the page cache, except for pages in use.
    Imports read 50 MB into it."""
    if not hasattr(os, "posix_fadvise"):
        return
    modules = list(sys.modules.values())
    found = [getattr(module, name, None) for module in modules for name in ("__file__", "__cached__")]
    imported = {path for path in found if isinstance(path, str)} - _forgotten
    _forgotten.update(imported)
    for path in imported | set(_mapped_files()) | set(map(str, more)):
        with contextlib.suppress(OSError, ValueError):
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
            try:
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(descriptor)


def _mapped_files() -> list[str]:
    try:
        return re.findall(r" (/\S.*)$", Path("/proc/self/maps").read_text(), re.MULTILINE)
    except OSError:  # another system
        return []
