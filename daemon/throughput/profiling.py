"""Measures this machine for the throughput model, and keeps what it found.

Takes less than a minute of all processors, so nothing else should compute then. What was measured holds until hardware,
kernels, threads or the disk change, or if others computed, until they do not; how much memory is free is asked each
time.
"""

from __future__ import annotations

import logging
import os
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import numpy as np

from shoal import kernels
from shoal.daemon.cluster.speed import files_below
from shoal.daemon.errors import DaemonError
from shoal.daemon.memory import available_bytes, budget_of, keep_freed
from shoal.daemon.progress import Progress, no_progress
from shoal.kernels import WEIGHT_TYPES, Linears
from shoal.offload.errors import OffloadError
from shoal.partition.memory_layout import KV_FORMATS
from shoal.partition.throughput.profile import Contention, Device, Profile, ReadLaw

from .attention_laws import CONTEXTS, HEAD_DIMS, QUERIES, attention_laws
from .cache_laws import COMPUTED_ROWS, PARTS, cache_law
from .disk_laws import READS, RINGS, DiskFile, contention, read_law, written
from .fixed_costs import overheads, turns
from .kept_profile import Kept, profile_key, read_kept, write_kept
from .kernel_laws import (
    ROUNDS,
    Pool,
    flops_of,
    kernel_repeats,
    laid_out_bytes_per_s,
    memory_bytes_per_s,
    middle,
    table_points,
    table_rounds,
)

log = logging.getLogger(__name__)

FIRST = ("Q4_K", "Q6_K", "Q8_0", "Q4_0", "BF16", "F16", "F32")  # of the types, as models come
LIMIT_S = 45.0  # then no further type is begun …
CACHES_LIMITS_S = 50.0, 55.0  # … nor then a further round of what caches keep, nor then a type's tables of it
LEAST_FILE_BYTES = 64 << 20  # a file to read from


def machine_profile(
    threads: int,
    place: Path,
    kept: Path | None = None,
    *,
    memory_bytes: int | None = None,
    anew: bool = False,
    only_kept: bool = False,
    progress: Progress = no_progress,
) -> Profile | None:
    """The profile of this machine on so many threads, with the disk that `place` lies on: measured, or from the file
    `kept` if it is still true. `anew`: measured in any case; `only_kept`: None if it would have to be measured.
    memory_bytes: what Shoal may use; None is what leaves the machine usable. Raises DaemonError."""
    key, disturbed = profile_key(threads, place), others_compute(threads)
    known = None if anew or kept is None else read_kept(kept, key)
    if known is not None and (known.settled or only_kept or (disturbed and not known.brief)):
        found = known.profile
    elif only_kept:
        return None
    else:
        found = measure(threads, place, progress)
        if kept is not None:
            write_kept(kept, key, Kept(found, disturbed, looked_s=time.time()))
    memory = memory_bytes if memory_bytes is not None else budget_of(None).limit_bytes
    head = replace(found.head, memory_bytes=float(memory))
    return replace(found, devices=(head, *found.devices[1:]))


def measure(threads: int, place: Path, progress: Progress = no_progress) -> Profile:
    """Everything, anew. Raises DaemonError `resources` where memory is too short to measure."""
    if available_bytes() < 1 << 30:
        raise DaemonError(
            "resources", "measuring takes up to 1 GB of memory, and less is free", "end something else"
        )
    began_s = time.monotonic()
    steps = (
        rounds_of_tables()[-1].stop + table_points(WEIGHT_TYPES, COMPUTED_ROWS) + ROUNDS * (len(PARTS) + 1)
    )
    at, told_s = 0, 0.0

    def done(what: str) -> None:
        nonlocal at, told_s
        log.debug("measuring %s", what)
        telling_s = time.monotonic()
        progress("measuring", at, steps)
        told_s += time.monotonic() - telling_s
        at += 1

    def late(limit_s: float) -> bool:
        return time.monotonic() - told_s > began_s + limit_s

    keep_freed()  # as steps do
    kernels.set_threads(threads)
    home = kernels.home_of("cpu")
    pool = Pool()
    fixed = overheads(pool, done)
    attention = tuple(attention_laws(home, pool, done))
    disk = _disk(place, pool, home, done)
    kinds = sorted(
        WEIGHT_TYPES, key=lambda kind: FIRST.index(kind.name) if kind.name in FIRST else len(FIRST)
    )
    rounds = table_rounds(home, pool, kinds, done, partial(late, LIMIT_S))
    laws = middle(rounds)
    tabled = {law.kind for law in laws}
    of_caches = [kind for kind in kinds if kind.name in tabled]
    caches = cache_law(home, pool, of_caches, laws, done, *(partial(late, it) for it in CACHES_LIMITS_S))
    q4_k = next(kind for kind in WEIGHT_TYPES if kind.name == "Q4_K")
    flops = max(flops_of(law) for law in laws if law.kind == q4_k.name)
    device = Device(
        name=platform.node() or "this machine",
        memory_bytes=float(available_bytes()),
        memory_bytes_per_s=memory_bytes_per_s(laws),
        flops=flops,
        disk_bytes_per_s=max(disk.reads.bytes_per_s) if disk.reads else 0.0,
        threads=threads,
        products=laws,
        attention=attention,
        reads=disk.reads,
        caches=caches,
        overheads=fixed,
        contention=disk.both,
        repeats=replace(kernel_repeats(rounds), disk_apart=disk.apart),
        touch_bytes_per_s=pool.touch_bytes_per_s,
        write_bytes_per_s=disk.write,
        band_bytes_per_s=laid_out_bytes_per_s(q4_k),
        measured=True,
    )
    progress("measuring", steps, steps)
    return Profile((device,))


def rounds_of_tables() -> list[range]:
    """Which of the steps that `measure` tells are those of each round of tables, if none is cut short."""
    attended = 2 * len(HEAD_DIMS) * len(QUERIES) * len(KV_FORMATS) * len(CONTEXTS)
    first = turns() + attended + ROUNDS * (len(READS) + len(RINGS)) + 1
    points = table_points(WEIGHT_TYPES)
    return [range(first + number * points, first + (number + 1) * points) for number in range(ROUNDS)]


class _Disk(NamedTuple):
    """`apart`: how far its reads lay from their middle. `write`: bytes per second, 0 if that is not known."""

    reads: ReadLaw | None = None
    apart: float = 0.0
    write: float = 0.0
    both: Contention = Contention()


def _disk(place: Path, pool: Pool, home: kernels.ComputeHome, done: Callable[[str], None]) -> _Disk:
    """The disk of a directory."""
    kind = WEIGHT_TYPES[0]
    x = home.place(np.ones((1, 4096), np.float32))

    def compute() -> object:
        return home.linears(x, Linears((pool.matrix(kind, 128, 4096),)))

    try:
        with _file_on(place) as file:
            reads, apart = read_law(file.path, done)
            done("disk and processor together")
            return _Disk(reads, apart, file.write_bytes_per_s, contention(file.path, compute))
    except (OSError, OffloadError) as error:
        log.warning("the speed of the disk of %s is not known: %s", place, error)
        return _Disk()


@contextmanager
def _file_on(place: Path) -> Iterator[DiskFile]:
    """The largest file on that disk, or one that is written for a moment."""
    place.mkdir(parents=True, exist_ok=True)
    largest = max(files_below(place), default=(0, place))
    if largest[0] >= LEAST_FILE_BYTES:
        yield DiskFile(largest[1])
        return
    with TemporaryDirectory(dir=place, prefix=".speed-") as directory:
        yield written(Path(directory) / "read")


def others_compute(threads: int) -> bool:
    """Whether other programs have lately computed so much that measuring would say too little."""
    return hasattr(os, "getloadavg") and os.getloadavg()[0] > threads / 2
