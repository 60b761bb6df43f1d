"""Measures what a daemon needs most to predict, in some ten seconds between requests: fixed costs, kernels with the
types of what is loaded, the disk if there is something large to read on it. `profiling` measures everything.
"""

from __future__ import annotations

import logging
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from shoal import kernels
from shoal.daemon.cluster.speed import files_below
from shoal.daemon.memory import available_bytes
from shoal.kernels import WEIGHT_TYPES
from shoal.offload.errors import OffloadError
from shoal.partition.hardware_guesses import DISK_BYTES_PER_S
from shoal.partition.throughput.profile import CacheLaw, Device, ReadLaw

from .attention_laws import attention_laws
from .cache_laws import cache_law
from .disk_laws import brief_read_law
from .fixed_costs import overheads
from .kernel_laws import (
    Pool,
    flops_of,
    kernel_repeats,
    laid_out_bytes_per_s,
    memory_bytes_per_s,
    middle,
    pool_bytes,
    table_rounds,
)
from .profiling import LEAST_FILE_BYTES, others_compute

log = logging.getLogger(__name__)

NEEDED_TIMES = 4  # as much memory as measuring takes has to be free

BRIEF_READ_S = 0.3


class Interrupted(Exception):
    """Something is to be done."""


def enough_is_free() -> bool:
    """Whether there is memory to measure with."""
    return available_bytes() >= NEEDED_TIMES * pool_bytes()


def measure_briefly(
    threads: int, place: Path, kinds: Sequence[str], before: Device | None, idle: Callable[[], bool]
) -> Device | None:
    """This machine, with tables for some stored types besides those of `before`. None where memory is short, where
    others compute, and when something is to be done, which is asked for between any two calls of kernels' cells."""
    if not enough_is_free() or others_compute(threads):
        return None
    began_s = time.monotonic()
    try:
        found = _measured(threads, place, kinds, before, idle)
    except Interrupted:
        return None
    log.info(
        "measured this machine in %.1f s with %s; shoal profile measures all of it",
        time.monotonic() - began_s,
        ", ".join(kinds),
    )
    return found


def _measured(
    threads: int, place: Path, kinds: Sequence[str], before: Device | None, idle: Callable[[], bool]
) -> Device:
    def going(_: str) -> None:
        if not idle():
            raise Interrupted

    kernels.set_threads(threads)  # the last step may have had fewer
    home = kernels.home_of("cpu")
    types = [kind for kind in WEIGHT_TYPES if kind.name in kinds]
    pool = Pool()
    going("")
    rounds = table_rounds(home, pool, types, going)
    laws = middle(rounds)
    going("")
    caches = cache_law(home, pool, types, laws, going)
    if before is not None:
        return replace(before, products=(*before.products, *laws), caches=_with(before.caches, caches))
    fixed = overheads(pool, going)
    attention = tuple(attention_laws(home, pool, going, ("f16",)))
    reads = _reads(place)
    going("")
    return Device(
        name=platform.node() or "this machine",
        memory_bytes=float(available_bytes()),
        memory_bytes_per_s=memory_bytes_per_s(laws),
        flops=max(map(flops_of, laws)),
        disk_bytes_per_s=max(reads.bytes_per_s) if reads else DISK_BYTES_PER_S,
        threads=threads,
        products=laws,
        attention=attention,
        reads=reads,
        caches=caches,
        overheads=fixed,
        repeats=kernel_repeats(rounds),
        touch_bytes_per_s=pool.touch_bytes_per_s,
        band_bytes_per_s=laid_out_bytes_per_s(types[0]),
        measured=True,
    )


def _with(before: CacheLaw | None, now: CacheLaw | None) -> CacheLaw | None:
    """What caches keep as it is now, with the tables of both."""
    if before is None or now is None:
        return now
    return replace(now, products=(*before.products, *now.products))


def _reads(place: Path) -> ReadLaw | None:
    """None where there is no large file: nothing is written for that."""
    largest = max(files_below(place), default=(0, place))
    if largest[0] < LEAST_FILE_BYTES:
        return None
    try:
        return brief_read_law(largest[1], BRIEF_READ_S)
    except (OSError, OffloadError):
        return None
