"""Helpers: an executor with a KV pool for a checkpoint, and its logits for given tokens."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from shoal.daemon.config import NodeConfig
from shoal.daemon.loading.planning import make_plan
from shoal.daemon.throughput.model_sizes import weighed
from shoal.engine.collective import Alone
from shoal.engine.executor import Executor
from shoal.kernels.arrays import Floats
from shoal.models.checkpoint.checkpoint import Checkpoint, open_checkpoint
from shoal.models.step import Segment, Step
from shoal.models.transformer import Transformer
from shoal.offload.block_store import ResidentStore
from shoal.offload.kv.pool import KvPool
from shoal.partition.plan import Plan
from shoal.partition.spec import length_class

FP32 = NodeConfig(kv_type="f32", kv_tokens=512, context_tokens=128)


def planned(checkpoint: Checkpoint, config: NodeConfig, memory_bytes: int) -> Plan:
    """The plan of a checkpoint; there must be one."""
    made = make_plan(weighed(checkpoint, config.quant), config, memory_bytes)
    assert isinstance(made, Plan)
    return made


class Running:
    """A checkpoint that is ready to compute, without scheduler or text."""

    def __init__(self, path: Path, config: NodeConfig = FP32, narrow_inputs: bool = False) -> None:
        self.path = path
        with open_checkpoint(path) as checkpoint:
            self.plan = planned(checkpoint, config, 1 << 33)
            self.spec = checkpoint.spec
            self.kv = KvPool(self.spec, self.plan.kv)
            store = ResidentStore.load(self.plan, checkpoint)
        model = Transformer(self.spec, narrow_inputs)
        self.executor = Executor(model, self.plan, store, self.kv, Alone())

    def step(self, *parts: tuple[list[int], int, list[int]]) -> Floats:
        """(token ids, start position, pages) per sequence → logits (T, vocab) of every row."""
        length = length_class(self.spec.ropes, self.plan.context_tokens)
        segments = (Segment(ids, start, pages, len(ids), length) for ids, start, pages in parts)
        step = Step.build(segments, self.plan.part_tokens)
        return self.executor.head(self.executor.forward(step))

    def logits(self, ids: list[int], prefill: list[int]) -> Floats:
        """Logits (T, vocab) of `ids`: chunks of the given lengths, then token by token."""
        pages = self.kv.table.take(-(-len(ids) // self.kv.page_tokens))
        assert pages is not None
        rows, start = [], 0
        for count in [*prefill, *[1] * (len(ids) - sum(prefill))]:
            rows.append(self.step((ids[start : start + count], start, pages)))
            start += count
        self.kv.table.give_back(pages)
        return np.concatenate(rows)


def relative_error(ours: Floats, theirs: Floats) -> float:
    """max |Δ| over the scale of the logits."""
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())
