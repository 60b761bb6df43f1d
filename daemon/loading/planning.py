"""Which plan a checkpoint gets within a budget, and the store that carries it out.

In memory if that is possible, even with a shorter context that nobody asked for; else streamed from a pack, which is
made if there is none. Weights in fewer bits than the files have come from a pack in either case. Knows checkpoints,
configuration and budgets; how a plan divides memory is `partition`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Protocol

from shoal import kernels
from shoal.daemon.config import NodeConfig
from shoal.daemon.errors import DaemonError
from shoal.daemon.memory import PROCESS, trim
from shoal.daemon.progress import Progress
from shoal.daemon.sizes import format_bytes
from shoal.engine.learn.step_cost import ROW_SHARE
from shoal.models.checkpoint.checkpoint import Checkpoint
from shoal.offload.block_store import BlockStore, ResidentStore
from shoal.offload.budget import Budget
from shoal.offload.kv.disk import buffer_bytes
from shoal.offload.pack.builder import source_of
from shoal.offload.pack.layout import layout
from shoal.offload.pack.manifest import Quant
from shoal.offload.pack.pack import Pack
from shoal.offload.window.window_store import WindowStore
from shoal.partition.errors import PlanError
from shoal.partition.memory_layout import PAGE_TOKENS, kv_page_bytes
from shoal.partition.plan import Plan, Wanted, plan_in_ram
from shoal.partition.spec import BlockId
from shoal.partition.streaming import KV_SHARE, plan_within

DEFAULT_CONTEXT_TOKENS = 8192
LEAST_CONTEXT_TOKENS = 512  # what the default context may shrink to when memory is short
MEMORY_BYTES_PER_S = 20e9  # that weights in memory are read with, for a first guess of what rows cost
MEASURED_BYTES = 64 << 20  # less than this read while loading says nothing about the disk's speed …
USUAL_DISK_BYTES_PER_S = 1.5e9  # … which is then taken to be this


class Packs(Protocol):
    """Where packs come from (`packs` has it)."""

    def get(self, checkpoint: Checkpoint, progress: Callable[[int, int], None], *, quant: Quant) -> Pack:
        """The pack of a checkpoint, made if there is none; `progress` hears of that. Raises DaemonError."""
        ...


def make_plan(
    checkpoint: Checkpoint, config: NodeConfig, memory_bytes: int, *, streaming: bool = True
) -> Plan:
    """The plan for a checkpoint within `memory_bytes`; where no context was asked for, the largest that fits.
    `streaming`: whether its weights may come from disk.

    Raises DaemonError `context_overflow`, or PlanError when not even LEAST_CONTEXT_TOKENS fit.
    """
    contexts = list(_contexts(checkpoint, config))
    block_bytes = _block_bytes(checkpoint, config.quant)

    def in_ram(context: int) -> Plan:
        return plan_in_ram(_wanted(checkpoint, config, context), block_bytes, memory_bytes=memory_bytes)

    # No error is kept: by its traceback it would keep all callers, and what they hold, in a ring.
    for context in contexts:
        with suppress(PlanError):
            return in_ram(context)
    if streaming:
        page_bytes = kv_page_bytes(checkpoint.spec, config.kv_type)
        fitting = (c for c in contexts if -(-c // PAGE_TOKENS) * page_bytes <= memory_bytes // KV_SHARE)
        try:
            return _plan_within(checkpoint, config, next(fitting, contexts[-1]), memory_bytes)
        except PlanError as streamed:
            try:
                return in_ram(contexts[-1])
            except PlanError as error:
                if streamed.least_bytes < error.least_bytes:
                    raise streamed from None
                raise  # of a small model: what streaming takes is more than its weights
    return in_ram(contexts[-1])


def plan_within_budget(
    checkpoint: Checkpoint,
    config: NodeConfig,
    budget: Budget,
    *,
    idle_bytes: int = 0,
    extra_bytes: int = 0,
    streaming: bool = True,
) -> Plan:
    """The plan within what the budget has left, and `idle_bytes` that could be given back, less `extra_bytes` that go
    with it: for KV on its way to disk and a draft model. Raises as `make_plan`, with the least budget that would do."""
    free = max(0, budget.free_bytes + idle_bytes - extra_bytes)
    try:
        return make_plan(checkpoint, config, free, streaming=streaming)
    except PlanError as error:
        own = budget.held_by(PROCESS)
        others = budget.held_bytes - idle_bytes - own
        least = error.least_bytes + extra_bytes + own + others
        parts = {
            "the model": error.least_bytes,
            "KV-to-disk buffers and any draft model": extra_bytes,
            "the process": own,
            "other models": others,
        }
        needs = ", ".join(f"{nbytes / 1e6:,.0f} MB for {what}" for what, nbytes in parts.items() if nbytes)
        budgeted = f"the budget is {format_bytes(budget.limit_bytes)}"
        raise PlanError(f"needs at least {least / 1e6:,.0f} MB: {needs}; {budgeted}", least) from error


def open_store(
    plan: Plan,
    checkpoint: Checkpoint,
    quant: Quant,
    packs: Packs | None,
    progress: Progress,
    *,
    bounded: bool,
) -> tuple[BlockStore, float]:
    """The store of a plan, its blocks that stay read, and how fast the disk was meanwhile in bytes per second, 0 if
    nothing will be streamed. `bounded`: what reading leaves in memory matters.

    Raises OffloadError or CheckpointError, or DaemonError when it takes a pack and there is no place for one.
    """

    def loading(done: int, total: int) -> None:
        if bounded:
            trim()  # buffers that were read into
        progress("loading", done, total)

    if not plan.streams and quant == "keep":
        if bounded:
            checkpoint.bypass_cache()
        return ResidentStore.load(plan, checkpoint, loading), 0.0
    if packs is None:
        raise DaemonError("resources", "has to come from a pack, and there is no place for a pack of it")
    pack = packs.get(checkpoint, lambda done, total: progress("packing", done, total), quant=quant)
    began_s = time.monotonic()
    store = WindowStore.open(plan, pack, loading)
    seconds = time.monotonic() - began_s
    if not plan.streams:
        return store, 0.0
    told = plan.pinned_bytes >= MEASURED_BYTES
    return store, plan.pinned_bytes / seconds if told else USUAL_DISK_BYTES_PER_S


def disk_buffer_bytes(checkpoint: Checkpoint, config: NodeConfig) -> int:
    """Of KV pages on their way to and from disk, where KV is kept there."""
    page_bytes = kv_page_bytes(checkpoint.spec, config.kv_type)
    return buffer_bytes(page_bytes) if config.kv_disk_bytes != 0 else 0


def row_share(plan: Plan, read_bytes_per_s: float) -> float:
    """What one more row of a step probably costs, as a share of a step of one: little, where that waits for a disk."""
    compute_s = plan.weights_bytes / MEMORY_BYTES_PER_S
    return ROW_SHARE * compute_s / max(compute_s, plan.step_s(read_bytes_per_s))


def extents(checkpoint: Checkpoint, quant: Quant = "keep") -> tuple[dict[BlockId, int], int]:
    """(bytes of every block in a pack, in the order of a step; bytes of the vectors). A tied embedding has none."""
    manifest = layout(checkpoint, quant, source_of(checkpoint))
    sizes = {item.block: item.nbytes for item in manifest.blocks}
    embed = BlockId("embed")
    sizes = {embed: 0 if checkpoint.spec.tied else sizes[embed]} | {
        block: nbytes for block, nbytes in sizes.items() if block != embed
    }
    return sizes, manifest.vectors.nbytes


def _contexts(checkpoint: Checkpoint, config: NodeConfig) -> Iterator[int]:
    """The one that was asked for, or those to be tried."""
    spec = checkpoint.spec
    context = config.context_tokens or min(spec.context, DEFAULT_CONTEXT_TOKENS)
    if context > spec.context:
        raise DaemonError(
            "context_overflow",
            f"a context of {context} tokens was asked for, the model was made for {spec.context}",
            f"use --ctx {spec.context} or less",
        )
    yield context
    while config.context_tokens is None and context > LEAST_CONTEXT_TOKENS:
        context = max(LEAST_CONTEXT_TOKENS, context // 2)
        yield context


def _block_bytes(checkpoint: Checkpoint, quant: Quant) -> dict[BlockId, int]:
    """Of every block in memory, in the order of a step."""
    if quant == "keep":
        return {block: checkpoint.block_bytes(block) for block in checkpoint.spec.blocks()}
    sizes, vectors_bytes = extents(checkpoint, quant)
    sizes[BlockId("embed")] += vectors_bytes  # of all blocks: they are read at once
    return sizes


def _plan_within(checkpoint: Checkpoint, config: NodeConfig, context: int, memory_bytes: int) -> Plan:
    sizes, vectors_bytes = extents(checkpoint, config.quant)
    return plan_within(_wanted(checkpoint, config, context), sizes, vectors_bytes, memory_bytes=memory_bytes)


def _wanted(checkpoint: Checkpoint, config: NodeConfig, context: int) -> Wanted:
    return Wanted(
        checkpoint.spec,
        context_tokens=context,
        kv_tokens=config.kv_tokens,
        kv_type=config.kv_type,
        chunk_tokens=config.chunk_tokens,
        sequences=config.max_sequences,
        guesses=config.max_guesses,
        threads=config.thread_count,
        native=kernels.home() != "reference",
    )
