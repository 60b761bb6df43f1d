"""How long many requests would take that nobody waits for, one by one: what `shoal batch` has to do.

Opens headers. `partition.throughput` predicts and chooses.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import msgspec
from msgspec import Struct

from shoal.daemon.config import NodeConfig
from shoal.partition.amounts import format_duration
from shoal.partition.plan import Wanted
from shoal.partition.throughput.offline import (
    BatchSize,
    Hybrid,
    PlannedBatch,
    batches,
    expected,
    upper_bound,
)
from shoal.partition.throughput.prediction import Binding
from shoal.partition.throughput.profile import Profile
from shoal.partition.throughput.solve import Asks
from shoal.partition.throughput.weights_of import Weighed

from .foresight import Asked, prepared
from .own_machine import OwnMachine


class BatchRow(Struct, frozen=True):
    """One plan. `at_once`: requests that are answered beside each other; `chunk_tokens`: of prompts in a step, at most;
    `seconds`: until all are answered. Per second: of answers. `missing`: what the machine lacks for it, None if it
    fits; else these are None, and `needs_bytes` says how much memory it would have to have."""

    name: str
    fits: bool
    at_once: int | None
    chunk_tokens: int | None
    seconds: float | None
    requests_per_s: float | None
    tokens_per_s: float | None
    peak_bytes: dict[str, int]
    binding: Binding
    missing: str | None
    needs_bytes: int | None


class PassingBound(Struct, frozen=True):
    """Of weights that pass through a device in every step: tokens of answers a second that no schedule exceeds with
    these memories, and that a schedule without gaps would give for so many requests (MoE-Lens's two stages); and tokens
    in a step from which on computing takes longer than bringing them."""

    device: str
    tokens_per_s: float
    expected_tokens_per_s: float
    saturating_tokens: float


class BatchForesight(Struct, frozen=True):
    """All plans, the quickest first; `chosen` names the one to run, None if none fits. `best`: names of the few that
    are worth a look, the chosen one first. `trouble`: what is wrong with
    the model's files, or this machine's device or its copies."""

    chosen: str | None
    reason: str
    best: list[str]
    plans: list[BatchRow]
    bounds: list[PassingBound]
    trouble: str | msgspec.UnsetType = msgspec.UNSET


def foresee_batch(
    path: Path,
    profile: Profile,
    asked: Asked,
    requests: int,
    usual: NodeConfig,
    machine: OwnMachine | None = None,
) -> BatchForesight:
    """How the first machine of the profile would answer so many requests (see `foresee`). Raises DaemonError."""
    models, profile, trouble = prepared(path, profile, asked, usual, machine)
    job = asked.job
    context = asked.context_tokens or job.context_tokens
    device, kv_type = profile.head.on(asked.threads), asked.kv_type or usual.kv_type

    def wanted(size: BatchSize) -> Asks:
        def asks(model: Weighed, _: str, threads: int) -> Sequence[Wanted]:
            its = context, None, kv_type, size.chunk_tokens, size.sequences, 0, threads
            return [Wanted(model.spec, *its, narrow_inputs=True)]

        return asks

    found = batches(models, wanted, device, job, requests)
    bounds = []
    for there in device.accelerators:
        ways = Hybrid.all_of(models[0], device, there, kv_type)
        if ways:
            most = [upper_bound(it, job.prompt_tokens, job.new_tokens) for it in ways]
            best = ways[most.index(max(most))]
            likely = expected(best, job.prompt_tokens, job.new_tokens, requests)
            bounds.append(PassingBound(there.name, max(most), likely, best.saturating_tokens))
    rows = [_row(it, requests, job.new_tokens) for it in found]
    fitting = [it for it in found if not it.missing]
    by_model = [[it for it in fitting or found if it.model is model] for model in models]
    # Of the model as it is kept the ways that fit, of the others and of what does not fit the first.
    first, *others = [its for its in by_model if its]
    names = [it.name for it in (*(first if fitting else first[:1]), *(its[0] for its in others))]
    chosen = next((row for row in rows if row.fits and row.name == names[0]), None)
    return BatchForesight(
        chosen.name if chosen else None, _reason(chosen, rows), names, rows, bounds, trouble or msgspec.UNSET
    )


def _row(found: PlannedBatch, requests: int, new_tokens: int) -> BatchRow:
    fits, rate = not found.missing, requests / found.seconds
    return BatchRow(
        found.name,
        fits,
        found.at_once if fits else None,
        found.plan.chunk_tokens if fits else None,
        found.seconds if fits else None,
        rate if fits else None,
        rate * new_tokens if fits else None,
        found.peak_bytes,
        found.binding,
        found.missing or None,
        found.least_bytes if found.lacks_memory else None,
    )


def _reason(chosen: BatchRow | None, rows: Sequence[BatchRow]) -> str:
    """`rows`: what lacks least comes first of those that do not fit."""
    if chosen is None:
        return (
            f"none of these plans fits: {rows[0].name} lacks {rows[0].missing}"
            if rows
            else "there is no plan"
        )
    assert chosen.seconds is not None
    said = f"{chosen.at_once:,} at once, all in {format_duration(chosen.seconds)}"
    second = next((row for row in rows if row.fits and row is not chosen), None)
    if second is None or second.seconds is None:
        return said
    return f"{said}; {second.name} would take {format_duration(second.seconds)}"
