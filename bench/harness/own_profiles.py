"""Profiles of this machine for the throughput model's test, with what it was like meanwhile; and what they say of
ranks that share it.
"""

from __future__ import annotations

import functools
import os
import random
import time
from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations
from math import log
from pathlib import Path
from statistics import median
from typing import NamedTuple

import disk
import numpy as np
from cluster import attached

from shoal import kernels
from shoal.comm.home import Home
from shoal.daemon.throughput.fixed_costs import turns
from shoal.daemon.throughput.own_machine import profile_file
from shoal.daemon.throughput.profiling import machine_profile, rounds_of_tables
from shoal.kernels import Linears
from shoal.partition.throughput.profile import (
    Corrections,
    Device,
    Overheads,
    Profile,
    ProfileLink,
    RowsLaw,
)

from .cells import Cell, Floors
from .weights import COLUMNS, FEW_COLUMNS, few_weights, weights

RANKS = "one", "two", "three", "four"
PORT = 27651
MATRIX_BYTES = 8 << 20
LEAST_READ_BYTES, PROBES = 512 << 20, 12
SAMPLES, SHORTER = 3, 4  # of floors in each round of a profile's tables, with so many times fewer probes
COMPUTED_ROWS, COMPUTED, STRETCHES = 64, 32, 8  # rows, products in a stretch: a second in all
CALLS, SWEPT_TIMES = 10, 200  # of a layer, about, behind so many sweeps: a tenth of a second …
CALLS_EVERY = 8  # … at one in so many of the steps with which a profile begins, that measure fixed costs
SAMPLE_BYTES, SWEEPS = 512 << 20, 3  # of a file
ROUND_BYTES = tuple(it << 20 for it in (64, 96, 128, 192, 256, 384, 512, 1024))  # with which memory is probed


def floors(threads: int, file: Path, round_bytes: int) -> Floors:
    """Of memory, of the disk, of computing and of calls, now."""
    memory = weights_gb_per_s(threads, round_bytes)
    return Floors(memory, disk_gb_per_s(file), compute_gflops(threads), calls_per_s(threads))


def disk_gb_per_s(file: Path) -> float:
    """The median of some sweeps: one in ten or so meets a disk that others use."""
    return median(disk.read_gb_per_s(file, sample_bytes=SAMPLE_BYTES) for _ in range(SWEEPS))


def weights_gb_per_s(threads: int, nbytes: int, probes: int = PROBES) -> float:
    """GB/s of weights of one type that one row is multiplied by, of which so many bytes come round in any order; the
    median of some rounds. Nothing that reads with one thread in NumPy is as quick as kernels are, and from one process
    to the next it differs by a sixth."""
    kernels.set_threads(threads)
    home = kernels.home_of("cpu")
    x = home.place(np.ones((1, COLUMNS), np.float32))
    each = _weights()[: max(1, nbytes // MATRIX_BYTES)]
    order = random.Random(0)
    took = []
    for _ in range(1 + probes):
        numbers: list[int] = []
        while len(numbers) * MATRIX_BYTES < LEAST_READ_BYTES:
            numbers += order.sample(range(len(each)), len(each))
        began_s = time.perf_counter()
        for number in numbers:
            home.linears(x, each[number])
        read_bytes = sum(each[number].matrices[0].nbytes for number in numbers)
        took.append(read_bytes / (time.perf_counter() - began_s) / 1e9)
    return median(took[1:])


def compute_gflops(threads: int, stretches: int = STRETCHES) -> float:
    """GFLOP/s of many rows multiplied by weights of one type as they come from memory, in any order; the median of some
    stretches, each about as long as a prompt and with all that holds it up. The processor's cores are two halves of one
    each, of which somebody else may have the other, and change their clock: the same product took 1.3 times as long
    within minutes."""
    kernels.set_threads(threads)
    home = kernels.home_of("cpu")
    x = home.place(np.ones((COMPUTED_ROWS, COLUMNS), np.float32))
    each, source = _weights(), random.Random(0)
    took = []
    for _ in range(1 + stretches):  # the first is slower by a fiftieth
        numbers = source.sample(range(len(each)), COMPUTED)
        began_s = time.perf_counter()
        for number in numbers:
            home.linears(x, each[number])
        took.append(time.perf_counter() - began_s)
    return 2 * COMPUTED * COMPUTED_ROWS * each[0].matrices[0].rows * COLUMNS / median(took[1:]) / 1e9


def calls_per_s(threads: int) -> float:
    """Of kernels that have next to nothing to multiply, some in a row, behind weights from memory that swept the
    interpreter out of the caches, as in a layer; the median of many such rows."""
    kernels.set_threads(threads)
    home = kernels.home_of("cpu")
    wide, narrow = (home.place(np.ones((1, cols), np.float32)) for cols in (COLUMNS, FEW_COLUMNS))
    each, few = _weights(), few_weights()
    took = []
    for number in random.Random(0).choices(range(len(each)), k=SWEPT_TIMES):
        home.linears(wide, each[number])
        began_s = time.perf_counter()
        for _ in range(CALLS):
            home.linears(narrow, few)
        took.append(time.perf_counter() - began_s)
    return CALLS / median(took)


@functools.cache
def _weights() -> list[Linears]:
    return weights(max(ROUND_BYTES), MATRIX_BYTES)


def nearest_round(nbytes: float) -> int:
    """Of `ROUND_BYTES`."""
    return min(ROUND_BYTES, key=lambda it: abs(log(it / max(1.0, nbytes))))


class Known(NamedTuple):
    """A profile, and floors while it was measured (of the disk before and after), by the bytes that come round."""

    profile: Profile
    floors: dict[int, Floors]


def profile_of(threads: int, file: Path) -> Known:
    """This machine on so many threads, measured by itself, and its floors meanwhile. What tables say was true of the
    moments in which they were made: floors of just before and afterwards were off by a twentieth, and those of all of
    the profile by a tenth where the machine was slower in two rounds of three. So floors are probed in the rounds, and
    the middle round counts, as it does for tables; those of calls while fixed costs are measured."""
    disk = [disk_gb_per_s(file)]
    rounds = rounds_of_tables()
    samples: list[list[dict[int, Floors]]] = [[] for _ in rounds]
    calls: list[float] = []

    def sampled(_: str, at: int, steps: int) -> None:
        if at < turns() and not at % CALLS_EVERY:
            calls.append(calls_per_s(threads))
        for its, probed in zip(rounds, samples, strict=True):
            if at in its and (at - its.start) * SAMPLES >= len(its) * len(probed):
                computed = compute_gflops(threads, STRETCHES // SHORTER)
                read = {it: weights_gb_per_s(threads, it, PROBES // SHORTER) for it in ROUND_BYTES}
                probed.append({it: Floors(speed, 0, computed) for it, speed in read.items()})

    _weights()  # now: using new memory takes time
    kept = profile_file(Home.from_env(), threads)
    # With the disk as this file lies on it.
    found = machine_profile(threads, file.parent, kept, anew=True, progress=sampled)
    assert found is not None
    disk.append(disk_gb_per_s(file))
    profile = Profile((replace(found.head, corrections=Corrections()),))
    if not all(samples[:2]):
        raise SystemExit("no floors were probed in the first two rounds of tables: something else computes")
    found_floors = {}
    for nbytes in ROUND_BYTES:
        each = [_middle([its[nbytes] for its in probed]) for probed in samples if probed]
        found_floors[nbytes] = replace(_middle(each), disk_gb_per_s=sum(disk) / 2, calls_per_s=median(calls))
    said = ", ".join(f"{it.dram_gb_per_s:.1f} GB/s and {it.compute_gflops:.0f} GFLOP/s" for it in each)
    said += f"; {median(calls):,.0f} calls/s"
    print(f"{threads} threads, in each round of tables: {said}", flush=True)
    return Known(profile, found_floors)


def _middle(all: Sequence[Floors]) -> Floors:
    """The median of each."""
    return Floors(*map(median, zip(*(vars(it).values() for it in all), strict=True)))


def rank_profile(cell: Cell, place: Path) -> Profile:
    """What `profile_of` has measured, as each rank of the cell would know it of itself: what a group was predicted with
    is what it is chosen and planned with."""
    counts = half_of(processors()), processors()
    kept = [profile_file(Home.from_env(), count) for count in counts]
    half, whole = (
        machine_profile(count, place, file, only_kept=True) for count, file in zip(counts, kept, strict=True)
    )
    if half is None or whole is None:
        lacking = kept[0] if half is None else kept[1]
        raise SystemExit(f"{lacking} is no profile of this machine as it is now: predict first, there")
    return Profile((replace(one_of(cell, half, whole), corrections=Corrections()),))


def processors() -> int:
    """That this process may use."""
    return len(os.sched_getaffinity(0))


def half_of(threads: int) -> int:
    return max(1, threads // 2)


def processors_of(rank: int, threads: int) -> list[int]:
    """That a rank of a group on this machine has, as machines have their own; further ranks share those of the first.
    Free to go where it likes, a rank that is woken by another's bytes is put beside it at times, and both wait for each
    other."""
    there = sorted(os.sched_getaffinity(0))
    return [there[(rank * threads + at) % len(there)] for at in range(threads)]


def pins(ranks: int, threads: int) -> list[str]:
    """The same of each rank, as `taskset` wants it."""
    return [",".join(map(str, processors_of(rank, threads))) for rank in range(ranks)]


def loopback(threads: int) -> ProfileLink:
    """Between two daemons of this machine, as they measure it themselves."""
    with attached(2, threads, PORT, pins(2, threads)) as client:
        client.measure_links()
        worker = client.nodes().nodes[1]
    return ProfileLink((RANKS[0], RANKS[1]), worker.rtt_s / 2, worker.bytes_per_s)


def group_profile(cell: Cell, half: Profile, whole: Profile, link: ProfileLink) -> Profile:
    """The ranks of a cell, all on one machine (`one_of`), and what is between them."""
    one, turns = one_of(cell, half, whole), ranks_a_processor(cell, whole)
    slower = replace(link, latency_s=turns * link.latency_s, bytes_per_s=link.bytes_per_s / turns)
    names = RANKS[: cell.ranks]
    links = (replace(slower, between=pair) for pair in combinations(names, 2))
    return Profile(tuple(replace(one, name=name) for name in names), tuple(links))


def one_of(cell: Cell, half: Profile, whole: Profile) -> Device:
    """A rank with its part of a machine's processors and memory. When all work, each takes as many times as long for a
    byte or a number as the machine with all threads, which has the same to do. `half`: as measured on half of the
    threads, whose fixed costs are a rank's, as many times as ranks take turns on a processor."""

    def times(values: tuple[float, ...]) -> tuple[float, ...]:
        return tuple(cell.ranks * it for it in values)

    def longer(laws: tuple[RowsLaw, ...]) -> tuple[RowsLaw, ...]:
        return tuple(replace(law, byte_s=times(law.byte_s)) for law in laws)

    turns, caches, overheads = ranks_a_processor(cell, whole), whole.head.caches, half.head.overheads
    fixed = {name: turns * its for name, its in vars(overheads).items() if name != "swept"}
    swept = overheads.swept
    return replace(
        half.head,
        threads=cell.threads,
        memory_bytes=whole.head.memory_bytes / cell.ranks,
        memory_bytes_per_s=whole.head.memory_bytes_per_s / cell.ranks,
        flops=whole.head.flops / cell.ranks,
        products=longer(whole.head.products),
        attention=tuple(
            replace(law, decode_s=times(law.decode_s), prompt_s=times(law.prompt_s))
            for law in whole.head.attention
        ),
        caches=caches
        and replace(
            caches,
            nbytes=tuple(it // cell.ranks for it in caches.nbytes),
            products=longer(caches.products),
        ),
        overheads=Overheads(
            **fixed, swept=swept and replace(swept, layer_s=tuple(turns * it for it in swept.layer_s))
        ),
    )


def ranks_a_processor(cell: Cell, whole: Profile) -> float:
    """How many take turns on each; at least 1."""
    return max(1.0, cell.ranks * cell.threads / whole.head.threads)
