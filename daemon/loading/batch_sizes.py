"""How many requests a batch computes at the same time, and how much of prompts in one step.

The more rows a step has, the less each costs: weights are read once for all, and experts get many rows. Steps of a
thousand rows cost half as much a row as steps of 64 (docs/LOG.md). But they take memory, and weights that have to be
streamed for it would cost far more than that. With a device, larger steps still may pay, or push too much out of its
memory: there predictions decide.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from shoal.daemon.config import NodeConfig
from shoal.daemon.errors import DaemonError
from shoal.daemon.library.library import Library
from shoal.daemon.library.packs import Packs
from shoal.daemon.loading.device_rooms import may_have_device
from shoal.daemon.loading.outlook import Outlook, TooLarge, outlook
from shoal.daemon.model_name import Reference
from shoal.daemon.throughput.own_machine import OwnMachine
from shoal.partition.throughput.offline import BATCH_SIZES, WITH_DEVICE, BatchSize

IF_STREAMED = BATCH_SIZES[1]  # where weights are streamed in any case, steps hold what memory allows anyhow
GIVEN_CHUNK_TOKENS = 1024  # of prompts in a step, where the number of sequences is given


def given_size(sequences: int) -> BatchSize:
    """If somebody says how many at once."""
    return BatchSize(sequences, GIVEN_CHUNK_TOKENS)


def with_size(config: NodeConfig, size: BatchSize) -> NodeConfig:
    return replace(config, max_sequences=size.sequences, chunk_tokens=size.chunk_tokens)


def batch_size(
    names: Iterable[str],
    config: NodeConfig,
    library: Library,
    packs: Packs,
    machine: OwnMachine | None = None,
) -> BatchSize:
    """The fastest that keeps the weights of all models in memory. `machine`: what this one can do, with its devices,
    if that is known."""
    models, machine = [*names], machine or OwnMachine(config.thread_count)
    rates: dict[BatchSize, float] = {}
    maybe_there, taken = may_have_device(config), False
    for size in WITH_DEVICE if maybe_there else BATCH_SIZES:
        found = [_found(name, with_size(config, size), library, packs, machine) for name in models]
        known = [it for it in found if it is not None]
        if any(not isinstance(it, Outlook) or it.streamed_bytes for it in known):
            continue
        outlooks = [it for it in known if isinstance(it, Outlook)]
        if not maybe_there or not outlooks:
            return size
        taken = taken or any(it.device for it in outlooks)
        speeds = [it.batch_tokens_per_s for it in outlooks]
        rates[size] = 1 / sum(1 / speed for speed in speeds) if all(speeds) else 0.0
    if taken and any(rates.values()):
        return max(rates, key=lambda size: rates[size])
    return next((size for size in rates if size in BATCH_SIZES), IF_STREAMED)


def _found(
    name: str, config: NodeConfig, library: Library, packs: Packs, machine: OwnMachine
) -> Outlook | TooLarge | None:
    """How a model would run; None if it cannot be opened."""
    wanted = Reference.parse(name)
    try:
        return outlook(library.resolve(wanted.model), replace(config, quant=wanted.quant), packs, machine)
    except DaemonError as error:  # loading will say what is wrong
        return TooLarge(error.message, 0, 0) if error.code == "resources" else None
