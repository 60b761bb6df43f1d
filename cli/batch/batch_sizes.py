"""How many requests a batch computes at the same time, and how much of prompts in one step.

The more rows a step has, the less each costs: weights are read once for all, and experts get many rows. Steps of a
thousand rows cost half as much a row as steps of 64 (docs/LOG.md). But they take memory, and weights that have to be
streamed for it would cost far more than that.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import NamedTuple

from shoal.daemon.config import NodeConfig
from shoal.daemon.errors import DaemonError
from shoal.daemon.library.library import Library
from shoal.daemon.library.packs import Packs
from shoal.daemon.loading.outlook import Outlook, outlook
from shoal.daemon.model_name import Reference
from shoal.daemon.throughput.own_machine import OwnMachine


class BatchSize(NamedTuple):
    sequences: int
    chunk_tokens: int

    def of(self, config: NodeConfig) -> NodeConfig:
        return replace(config, max_sequences=self.sequences, chunk_tokens=self.chunk_tokens)


BATCH_SIZES = (BatchSize(256, 1024), BatchSize(64, 512), BatchSize(16, 256))  # the fastest first
IF_STREAMED = BATCH_SIZES[1]  # where weights are streamed in any case, steps hold what memory allows anyhow


def batch_size(names: Iterable[str], config: NodeConfig, library: Library, packs: Packs) -> BatchSize:
    """The fastest that keeps the weights of all models in memory."""
    models, machine = [*names], OwnMachine(config.thread_count)
    for size in BATCH_SIZES:
        found = [
            streamed
            for name in models
            if (streamed := _streamed(name, size.of(config), library, packs, machine)) is not None
        ]
        if not any(found):
            return size
    return IF_STREAMED


def _streamed(
    name: str, config: NodeConfig, library: Library, packs: Packs, machine: OwnMachine
) -> bool | None:
    """Whether a model's weights would be streamed, or not fit at all; None if it cannot be opened."""
    wanted = Reference.parse(name)
    try:
        found = outlook(library.resolve(wanted.model), replace(config, quant=wanted.quant), packs, machine)
    except DaemonError as error:  # loading will say what is wrong
        return True if error.code == "resources" else None
    return not isinstance(found, Outlook) or found.streamed_bytes > 0
