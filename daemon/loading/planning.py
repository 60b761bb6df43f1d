"""Which plan a checkpoint gets within so much memory.

The plan keeps the model in memory if that is possible, even with a shorter context if none was asked for. Otherwise it
streams from a pack. Weights in fewer bits than the files have come from a pack in either case. This module knows
configuration; `partition.throughput` has the plans and chooses, and `budgeting` knows how much a budget leaves.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from shoal import kernels
from shoal.daemon.config import NodeConfig, beyond_the_model
from shoal.daemon.errors import DaemonError
from shoal.daemon.throughput.model_sizes import weighed
from shoal.models.checkpoint.checkpoint import open_checkpoint
from shoal.models.checkpoint.shard import AnyCheckpoint
from shoal.offload.pack.manifest import Quant
from shoal.partition.amounts import format_bytes
from shoal.partition.placement import DeviceRoom, NoRoomThere
from shoal.partition.plan import Misfit, Plan, Wanted, least_in_ram
from shoal.partition.rank_plans import RankPart
from shoal.partition.spec import BlockId, ModelSpec
from shoal.partition.throughput.alone import best_plan, rival_threads
from shoal.partition.throughput.placing.device_choice import plan_with_device, with_device_or_alone
from shoal.partition.throughput.profile import Device, unmeasured
from shoal.partition.throughput.weights_of import Weighed

DEFAULT_CONTEXT_TOKENS = 8192
LEAST_CONTEXT_TOKENS = 512  # the default context shrinks to this at most when memory is short


def make_plan(
    model: Weighed,
    config: NodeConfig,
    memory_bytes: int,
    device: Device | None = None,
    *,
    streaming: bool = True,
    room: DeviceRoom | None = None,
) -> Plan | Misfit:
    """The plan for a model within `memory_bytes`. If no context was asked for, it gets the largest that fits.
    `device`: what this machine can do, if that was measured. `streaming`: its weights may come from disk. `room`: of
    the device that computes as much of it as fits there; if it is optional, only where that is predicted to be
    quicker.

    Raises DaemonError `context_overflow`, and `resources` where nothing fits on the device.
    """
    contexts = wanted_of(model.spec, config)
    device = device or unmeasured(config.thread_count)
    machine, many = device.on(config.threads), math.isinf(config.slowdown)
    if room is not None and not room.optional:
        return _on_device(model, contexts, room, memory_bytes, machine, many=many, streaming=streaming)
    if room is not None:
        made = with_device_or_alone(
            model, contexts, room, memory_bytes, machine, streaming=streaming, many=many
        )
    else:
        made = best_plan(model, contexts, memory_bytes, device, streaming=streaming)
    if config.threads is not None or isinstance(made, Misfit) or made.device:
        return made
    return replace(made, rival_threads=rival_threads(model, made, device))


def _on_device(
    model: Weighed,
    contexts: Sequence[Wanted],
    room: DeviceRoom,
    memory_bytes: int,
    machine: Device,
    *,
    many: bool,
    streaming: bool,
) -> Plan | Misfit:
    made = plan_with_device(model, contexts, room, memory_bytes, machine, many=many, streaming=streaming)
    if isinstance(made, NoRoomThere):
        raise DaemonError(
            "resources",
            f"one layer{' without its experts' if model.spec.moe else ''} with its KV and scratch takes "
            f"{format_bytes(made.least_bytes)}, device {room.name} has {format_bytes(room.free_bytes)} free of "
            f"{format_bytes(room.limit_bytes)}",
            "`device=cpu` does without it, or take a smaller `context_tokens`",
        )
    return made


def least_bytes(draft: Path, config: NodeConfig) -> int:
    """The least memory that a draft model needs beside the model that it guesses for. Raises DaemonError."""
    with open_checkpoint(draft) as checkpoint:
        shortest = wanted_of(checkpoint.spec, config)[-1]
        model = weighed(checkpoint, "keep")
        return least_in_ram(shortest, model.block_bytes).peak_bytes + model.tokenizer_bytes


def rank_part(
    checkpoint: AnyCheckpoint, quant: Quant, memory_bytes: int, threads: int, vocab: int | None = None
) -> RankPart:
    """What a rank needs for its part of a checkpoint, to be planned with the others of its group. `vocab`: as in
    `Wanted`."""
    part = weighed(checkpoint, quant)
    # A worker may have no pack, which is what has slices.
    blocks = _with_whole_head(part) if vocab == 0 and quant != "keep" else part.block_bytes
    return RankPart(part.spec, blocks, part.extents, part.vectors_bytes, memory_bytes, threads, vocab)


def _with_whole_head(part: Weighed) -> Mapping[BlockId, int]:
    """Bytes of its blocks in memory, the head in one piece; a tied one's are the embedding's."""
    head = BlockId("head")
    found = {block: nbytes for block, nbytes in part.block_bytes.items() if block.kind != "head"} | {head: 0}
    found[BlockId("embed") if part.spec.tied else head] += sum(part.block_bytes.values()) - sum(
        found.values()
    )
    return found


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
