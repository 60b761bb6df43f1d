"""Which plan a checkpoint gets within so much memory.

The plan keeps the model in memory if that is possible, even with a shorter context if none was asked for. Otherwise it
streams from a pack. Weights in fewer bits than the files have come from a pack in either case. This module knows
checkpoints and configuration; `partition` divides memory, and `budgeting` knows how much a budget leaves.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from shoal import kernels
from shoal.daemon.config import NodeConfig, beyond_the_model
from shoal.engine.learn.step_cost import ROW_SHARE
from shoal.models.checkpoint.checkpoint import open_checkpoint
from shoal.models.checkpoint.shard import AnyCheckpoint
from shoal.offload.pack.builder import source_of
from shoal.offload.pack.layout import layout
from shoal.offload.pack.manifest import Quant
from shoal.partition.hardware_guesses import MEMORY_BYTES_PER_S
from shoal.partition.plan import Misfit, Plan, Wanted, first_fit, least_in_ram, plan_in_ram
from shoal.partition.rank_plans import RankPart
from shoal.partition.spec import BlockId, ModelSpec
from shoal.partition.streamed_plan import kv_has_room, plan_streamed

DEFAULT_CONTEXT_TOKENS = 8192
LEAST_CONTEXT_TOKENS = 512  # the default context shrinks to this at most when memory is short


def make_plan(
    checkpoint: AnyCheckpoint, config: NodeConfig, memory_bytes: int, *, streaming: bool = True
) -> Plan | Misfit:
    """The plan for a checkpoint within `memory_bytes`. If no context was asked for, it gets the largest that fits.
    `streaming`: its weights may come from disk.

    Raises DaemonError `context_overflow`.
    """
    wanted = wanted_of(checkpoint.spec, config)
    block_bytes = _block_bytes(checkpoint, config.quant)

    def tried() -> Iterator[Plan | Misfit]:
        for shorter in wanted:
            yield plan_in_ram(shorter, block_bytes, memory_bytes=memory_bytes)
        if streaming:
            roomy = next((it for it in wanted if kv_has_room(it, memory_bytes)), wanted[-1])
            yield plan_streamed(roomy, *extents(checkpoint, config.quant), memory_bytes=memory_bytes)

    return first_fit(tried())


def least_bytes(draft: Path, config: NodeConfig) -> int:
    """The least memory that a draft model needs beside the model that it guesses for. Raises DaemonError."""
    with open_checkpoint(draft) as checkpoint:
        shortest = wanted_of(checkpoint.spec, config)[-1]
        return least_in_ram(shortest, _block_bytes(checkpoint, "keep")).peak_bytes


def row_share(plan: Plan, read_bytes_per_s: float) -> float:
    """What one more row in a step probably costs, as a share of a step of one row: little if that waits for a disk."""
    compute_s = plan.weights_bytes / MEMORY_BYTES_PER_S
    return ROW_SHARE * compute_s / max(compute_s, plan.step_s(read_bytes_per_s))


def rank_part(checkpoint: AnyCheckpoint, quant: Quant, memory_bytes: int, threads: int) -> RankPart:
    """What a rank needs for its part of a checkpoint, to be planned with the others of its group."""
    block_bytes = _block_bytes(checkpoint, quant)
    return RankPart(checkpoint.spec, block_bytes, *extents(checkpoint, quant), memory_bytes, threads)


def extents(checkpoint: AnyCheckpoint, quant: Quant = "keep") -> tuple[dict[BlockId, int], int]:
    """(bytes of every block in a pack, in the order of a step; bytes of the vectors). A tied embedding has none."""
    manifest = layout(checkpoint, quant, source_of(checkpoint))
    embed = BlockId("embed")
    sizes = {embed: 0} if checkpoint.spec.vocab else {}
    sizes |= {item.block: item.nbytes for item in manifest.blocks}
    if checkpoint.spec.tied:
        sizes[embed] = 0  # its bytes are the head's
    return sizes, manifest.vectors.nbytes


def _block_bytes(checkpoint: AnyCheckpoint, quant: Quant) -> dict[BlockId, int]:
    """Bytes of every block in memory, in the order of a step."""
    if quant == "keep":
        return {block: checkpoint.block_bytes(block) for block in checkpoint.spec.blocks()}
    sizes, vectors_bytes = extents(checkpoint, quant)
    sizes[next(iter(sizes))] += vectors_bytes  # of all blocks: they are read at once
    return sizes


def wanted_of(spec: ModelSpec, config: NodeConfig) -> list[Wanted]:
    """What the configuration asks for: with its context, or once with each context to try, the longest first."""
    usual = config.context_tokens or min(spec.context, DEFAULT_CONTEXT_TOKENS)
    least = max(LEAST_CONTEXT_TOKENS, config.least_context_tokens)
    longest = Wanted(
        spec,
        context_tokens=max(usual, config.least_context_tokens),
        kv_tokens=config.kv_tokens,
        kv_type=config.kv_type,
        chunk_tokens=config.chunk_tokens,
        sequences=config.max_sequences,
        guesses=config.max_guesses,
        threads=config.thread_count,
        native=kernels.home() != "reference",
    )
    if longest.context_tokens > spec.longest:
        raise beyond_the_model(longest.context_tokens, spec.longest, spec.context)
    wanted = [longest]
    while config.context_tokens is None and (context := wanted[-1].context_tokens) > least:
        wanted.append(longest._replace(context_tokens=max(least, context // 2)))
    return wanted
