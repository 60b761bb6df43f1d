"""Cells of the throughput model's test: what is predicted, then measured, and how far one is from the other.

Pure: figures in, errors and verdicts out. Does not know how anything is measured (`foresight`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from statistics import median
from typing import Literal, NamedTuple

import numpy as np

VOID = 0.10  # what floors before and after say may differ by so much
OTHERS = 0.10  # of a processor, that other programs may take while a group is measured
WANTED = {
    "median": 0.06,
    "90th percentile": 0.15,
    "bias": 0.05,
    "bands": 0.90,
    "memory over": 0.05,
    "memory under": 0.02,
    "ranks agree": 0.95,
    "regret median": 1.05,
    "regret worst": 1.15,
}
NOISES = 2  # how many times their noise plans must differ by to be told apart


class Cell(NamedTuple):
    """What is asked of which model. `memory`: the budget in bytes, 0 = it all stays in memory. `threads`: of each of
    `ranks` processes."""

    model: str
    quant: str
    threads: int
    batch: int
    prompt_tokens: int
    new_tokens: int
    memory: int = 0
    ranks: int = 1

    @property
    def name(self) -> str:
        where = f"{self.memory / 1e6:.0f} MB" if self.memory else "in memory"
        job = f"{self.prompt_tokens}+{self.new_tokens}×{self.batch}"
        by = f"{self.ranks} × {self.threads}" if self.ranks > 1 else str(self.threads)
        return f"{self.model} {self.quant}, {by} threads, {job}, {where}"

    @property
    def kind(self) -> str:
        """Cells of a kind are summed up together."""
        if self.ranks > 1:
            return "groups"
        if self.memory:
            return "streamed"
        return "in memory, 1 stream" if self.batch == 1 else f"in memory, {self.batch} streams"


@dataclass
class Floors:
    """How fast the machine is just now: GB/s of memory on all threads, where as much comes round as in a step of the
    cell, and of direct reads; GFLOP/s of rows multiplied by weights; calls a second of kernels that have next to
    nothing to multiply (0: not probed)."""

    dram_gb_per_s: float
    disk_gb_per_s: float
    compute_gflops: float = 0.0
    calls_per_s: float = 0.0

    def mean(self, other: Floors) -> Floors:
        pairs = zip(vars(self).values(), vars(other).values(), strict=True)
        return Floors(*((one + another) / 2 for one, another in pairs))


class WithDisk(NamedTuple):
    """What is predicted with a disk that is so many times as fast as the profile's."""

    times: float
    ttft_s: float
    token_s: float


@dataclass
class Foretold:
    """What was predicted of a cell, before anything was measured. `floors`: when the profile was. `peak_bytes`: 0 = not
    to be looked at. `rounds`: to measure. `parts`, `prompt_parts`: seconds of a token and of the prompts by what takes
    them (see `Prediction`); without them all of it is what binds. `round_bytes`: with which floors are probed.
    `resident_bytes`: of weights, that stay in memory where others are streamed (0: all do). `disks`: what would be
    predicted with faster and slower ones, of a cell that streams."""

    cell: Cell
    plan: str
    ttft_s: float
    token_s: float
    band: tuple[float, float]  # of tokens a second
    peak_bytes: int
    binding: str
    floors: Floors
    rounds: int = 3
    parts: dict[str, float] = field(default_factory=dict)
    prompt_parts: dict[str, float] = field(default_factory=dict)
    round_bytes: int = 1 << 30
    resident_bytes: int = 0
    disks: list[WithDisk] = field(default_factory=list)

    def void(self, measured: Measured) -> bool:
        """Whether the machine changed by more than `VOID` in what this cell goes with, so that it says nothing: from
        before to afterwards, or between its rounds (a disk went from 2.1 to 1.3 GB/s and back). Ranks wait for each
        other some hundred times a token: another program, of whatever priority, that has a processor when a message
        comes makes all of them wait, which no floor tells."""
        if measured.cell.ranks > 1 and measured.others > OTHERS:
            return True
        if measured.apart > VOID:
            return True
        one, other = map(self.token_times, (measured.before, measured.after))
        return abs(one - other) > VOID * max(one, other)

    def token_times(self, now: Floors) -> float:
        """How many times longer than predicted a token takes with these floors. Reading memory and disk, computing
        and fixed costs go with theirs; what machines send each other does not."""
        disks = {its.times: its.token_s for its in self.disks}
        return self._times(now, self.parts or {self.binding: 1.0}, disks)

    def ttft_times(self, now: Floors) -> float:
        """The same of the first token."""
        if not self.prompt_parts:
            return self.token_times(now)
        return self._times(now, self.prompt_parts, {its.times: its.ttft_s for its in self.disks})

    def _times(self, now: Floors, parts: Mapping[str, float], disks: Mapping[float, float]) -> float:
        then = self.floors
        beside = {
            part: before / its if before and its else 1.0
            for part, before, its in (
                ("memory", then.dram_gb_per_s, now.dram_gb_per_s),
                ("compute", then.compute_gflops, now.compute_gflops),
                ("overhead", then.calls_per_s, now.calls_per_s),
            )
        }
        computing = {part: seconds for part, seconds in parts.items() if part != "disk"}
        whole_s = sum(computing.values())
        now_s = sum(s * beside.get(part, 1.0) for part, s in computing.items())
        times = now_s / whole_s if whole_s else 1.0
        if not disks:
            return times
        # If the processor and the disk are as many times as slow, so is all. What the disk is besides, predictions say.
        disk = now.disk_gb_per_s / self.floors.disk_gb_per_s * times
        slowness = sorted((1 / its, seconds) for its, seconds in disks.items())
        found = float(np.interp(1 / disk, *zip(*slowness, strict=True)))
        return times * found / disks[1.0]


@dataclass
class Measured:
    """What came of it. `apart`: half of the range of its rounds, as a share of their middle: of a token. `others`:
    processors that other programs took meanwhile, on average."""

    cell: Cell
    ttft_s: float
    token_s: float
    peak_bytes: int
    before: Floors
    after: Floors
    apart: float = 0.0
    others: float = 0.0

    @property
    def floors(self) -> Floors:
        """While it was measured."""
        return self.before.mean(self.after)


class Verdict(NamedTuple):
    """A cell's errors: measured ÷ predicted − 1. `token`, `ttft`: of the ratios to the floors; `absolute`: of a token
    as it is."""

    name: str
    kind: str
    void: bool
    token: float
    ttft: float
    absolute: float
    within: bool  # the band, moved by the floors
    memory: float | None  # measured ÷ predicted − 1; None: not looked at
    peaks: tuple[int, int]  # bytes, predicted and measured


def verdict(foretold: Foretold, measured: Measured) -> Verdict:
    """How far a cell's prediction was off."""
    now = measured.floors
    token_times, ttft_times = foretold.token_times(now), foretold.ttft_times(now)
    token = measured.token_s / foretold.token_s / token_times - 1
    speed = measured.cell.batch / measured.token_s * token_times
    return Verdict(
        measured.cell.name,
        measured.cell.kind,
        foretold.void(measured),
        token,
        measured.ttft_s / foretold.ttft_s / ttft_times - 1,
        measured.token_s / foretold.token_s - 1,
        foretold.band[0] <= speed <= foretold.band[1],
        measured.peak_bytes / foretold.peak_bytes - 1 if foretold.peak_bytes else None,
        (foretold.peak_bytes, measured.peak_bytes),
    )


def percentile(values: Iterable[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else 0.0


def summary(verdicts: Sequence[Verdict], kind: Literal["token", "ttft"]) -> dict[str, float]:
    """Median and 90th percentile of errors, bias, the share of bands that held; of cells that count."""
    counted = [it for it in verdicts if not it.void]
    errors = [it.token if kind == "token" else it.ttft for it in counted]
    if not errors:
        return {"cells": 0, "void": len(verdicts)}
    sizes = [abs(error) for error in errors]
    return {
        "cells": len(counted),
        "void": len(verdicts) - len(counted),
        "median": median(sizes),
        "90th percentile": percentile(sizes, 0.9),
        "bias": sum(errors) / len(errors),
        "bands": sum(it.within for it in counted) / len(counted),
    }


def memory_summary(verdicts: Iterable[Verdict]) -> dict[str, float]:
    """Of the cells whose memory was looked at, void or not: how far predictions were over what was taken, and under it,
    at most; and the share of those within both limits."""
    errors = [it.memory for it in verdicts if it.memory is not None]
    if not errors:
        return {"cells": 0}
    kept = sum(-WANTED["memory over"] <= it <= WANTED["memory under"] for it in errors)
    return {
        "cells": len(errors),
        "median": median(errors),
        "most over": max(0.0, -min(errors)),
        "most under": max(0.0, max(errors)),
        "kept": kept / len(errors),
    }


class Alternative(NamedTuple):
    """One way to do a job: seconds of all of it, predicted, and measured as with the floors of the prediction."""

    name: str
    predicted_s: float
    measured_s: float
    apart: float


def alternatives(
    foretold: Mapping[Cell, Foretold], found: Iterable[Measured]
) -> dict[str, list[Alternative]]:
    """By model and job, the ways that were measured to do it: with other threads, bits, budgets, ranks. Void cells do
    not count."""
    ways: dict[str, list[Alternative]] = {}
    for it in found:
        cell, said = it.cell, foretold[it.cell]
        if said.void(it):
            continue
        token_times, ttft_times = said.token_times(it.floors), said.ttft_times(it.floors)
        later = cell.new_tokens - 1
        job = f"{cell.model} {cell.prompt_tokens}+{cell.new_tokens}×{cell.batch}"
        way = Alternative(
            cell.name,
            said.ttft_s + later * said.token_s,
            it.ttft_s / ttft_times + later * it.token_s / token_times,
            it.apart,
        )
        ways.setdefault(job, []).append(way)
    return {job: each for job, each in ways.items() if len(each) > 1}


def ranked(ways: Mapping[str, Sequence[Alternative]]) -> dict[str, float]:
    """Of the pairs that differ by more than noise: how many are predicted in their order. Of each job: how many times
    as long as the quickest way the one takes that was predicted to be it; 1 where the two cannot be told apart."""
    pairs = [pair for each in ways.values() for pair in combinations(each, 2) if _differ(*pair)]
    agree = sum((a.predicted_s < b.predicted_s) == (a.measured_s < b.measured_s) for a, b in pairs)
    regrets = []
    for each in ways.values():
        chosen = min(each, key=lambda way: way.predicted_s)
        best = min(each, key=lambda way: way.measured_s)
        regrets.append(chosen.measured_s / best.measured_s if _differ(chosen, best) else 1.0)
    if not regrets:
        return {"pairs": 0}
    return {
        "pairs": len(pairs),
        "ranks agree": agree / len(pairs) if pairs else 1.0,
        "jobs": len(regrets),
        "regret median": median(regrets),
        "regret worst": max(regrets),
    }


def _differ(one: Alternative, other: Alternative) -> bool:
    low, high = sorted((one.measured_s, other.measured_s))
    return high / low - 1 > NOISES * max(one.apart, other.apart)
