"""Measures what steps cost whatever the size of a model: the engine's round, the calls of a layer, routing, streams,
logits.

Runs the real engine with models that have next to nothing to multiply. Between their blocks as much memory is read as
weights have that pass the caches in a real step: an interpreter whose caches are never swept is two or three times as
fast.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from itertools import cycle
from statistics import median
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from shoal import kernels
from shoal.devices.device_names import CPU
from shoal.engine.collective import Alone
from shoal.engine.engine import Engine
from shoal.engine.executor import Executor
from shoal.engine.rank import Rank
from shoal.engine.scheduler import Scheduler
from shoal.engine.sequence import Sequence
from shoal.kernels import ComputeHome, Matrix
from shoal.kernels.arrays import Floats
from shoal.models.families import shapes
from shoal.models.sampling import Sampler, SamplingParams
from shoal.models.transformer import Transformer
from shoal.models.weights import Weights
from shoal.offload.block_store import Resident, ResidentStore
from shoal.offload.kv.pool import KvPool
from shoal.offload.kv.prefix_cache import PrefixCache
from shoal.partition.plan import Plan, Wanted, plan_in_ram
from shoal.partition.spec import BlockId, LayerSpec, ModelSpec, MoeSpec, RopeSpec
from shoal.partition.throughput.profile import SWEPT_LAYER_BYTES, Overheads

from .kernel_laws import usual_s

if TYPE_CHECKING:
    from shoal.devices.device_home import DeviceHome

FEW, MANY = 2, 14  # layers
STREAMS = 16
ANSWER_TOKENS = 24  # of each stream that are measured
DEVICE_TOKENS = 12  # of one that a device computes
VOCAB = 1 << 17
LOGIT_ROWS = 16
SWEPT_BYTES = SWEPT_LAYER_BYTES // 2  # before each block
SWEPT_MEMORY_BYTES = 64 << 20
_SIZE = 32
_DEVICE = "a device"
_CHUNK = 64


class _Where(NamedTuple):
    """`home` computes, by whose clock it is measured."""

    home: ComputeHome
    clock: Callable[[], float]


def overheads(done: Callable[[str], None]) -> Overheads:
    """Measured with models of few and of many layers, dense and with experts, with one stream and with several, with
    swept caches and without, step by step in turn, as a machine changes its speed meanwhile. `done` is called before
    each round."""
    memory = np.ones(SWEPT_MEMORY_BYTES // 4, np.float32)
    mixture = MoeSpec(32, 8, _SIZE, True)
    each = (
        _Steps(None, FEW),
        _Steps(None, MANY),
        _Steps(memory, FEW),
        _Steps(memory, MANY),
        _Steps(memory, MANY, moe=mixture),
        _Steps(memory, FEW, STREAMS),
        _Steps(memory, MANY, STREAMS),
    )
    for _ in range(ANSWER_TOKENS):
        done("fixed costs")
        for steps in each:
            steps.step()
    few_warm, many_warm, few, many, mixed, few_streams, many_streams = (median(it.took) for it in each)
    warm_s, layer_s = (
        max(1e-7, (most - least) / (MANY - FEW)) for least, most in ((few_warm, many_warm), (few, many))
    )
    stream_few, stream_many = (many_of - one for many_of, one in ((few_streams, few), (many_streams, many)))
    stream_layer_s = max(0.0, (stream_many - stream_few) / (MANY - FEW) / (STREAMS - 1))
    return Overheads(
        step_s=max(1e-6, few - FEW * layer_s),
        layer_s=min(warm_s, layer_s),
        mixture_s=max(0.0, (mixed - many) / MANY),
        logit_s=_sampling_s() / VOCAB,
        stream_s=max(0.0, stream_few / (STREAMS - 1) - FEW * stream_layer_s),
        stream_layer_s=stream_layer_s,
        swept_layer_s=max(0.0, layer_s - warm_s),
    )


def device_overheads(device: DeviceHome) -> Overheads:
    """Of one stream that a device computes: it has no caches that others sweep."""
    where = _Where(device, lambda: device.device.now_s)
    each = (
        _Steps(None, FEW, where=where),
        _Steps(None, MANY, where=where),
        _Steps(None, MANY, moe=MoeSpec(8, 2, _SIZE, True), where=where),
    )
    for _ in range(DEVICE_TOKENS):
        for steps in each:
            steps.step()
    few, many, mixed = (median(it.took) for it in each)
    layer_s = max(1e-7, (many - few) / (MANY - FEW))
    return Overheads(
        step_s=max(1e-6, few - FEW * layer_s),
        layer_s=layer_s,
        mixture_s=max(0.0, (mixed - many) / MANY),
        logit_s=_sampling_s() / VOCAB,
    )


class _Steps:
    """Decodes so many streams. `memory`: what sweeps the caches. `took`: seconds of each step, without the sweeping."""

    def __init__(
        self,
        memory: Floats | None,
        layers: int,
        streams: int = 1,
        moe: MoeSpec | None = None,
        where: _Where | None = None,
    ) -> None:
        spec = _spec(layers, moe)
        where = where or _Where(kernels.home_of(CPU), time.perf_counter)
        self.took: list[float] = []
        self._clock = where.clock
        blocks = {block: _weights(spec, block, where.home) for block in spec.blocks()}
        self._store = _Swept({block: Resident(its) for block, its in blocks.items()}, memory)
        self._engine = _engine(spec, self._store, streams, where.home)
        for _ in range(streams):
            sampler = Sampler(SamplingParams(temperature=0.0), [1])
            self._engine.submit(Sequence([1] * 4, 4 + 2 * ANSWER_TOKENS, sampler))
        self._engine.step()  # the prompts

    def step(self) -> None:
        began_s, swept_s = self._clock(), self._store.swept_s
        self._engine.step()
        self._engine.events()
        self.took.append(self._clock() - began_s - (self._store.swept_s - swept_s))


class _Swept(ResidentStore):
    """Sweeps the caches before it lends a block. `swept_s`: how long that took, all in all."""

    def __init__(self, blocks: Mapping[BlockId, Resident], memory: Floats | None) -> None:
        super().__init__(blocks)
        self.swept_s = 0.0
        pieces = [] if memory is None else np.array_split(memory, max(1, memory.nbytes // SWEPT_BYTES))
        self._pieces = cycle(pieces or [np.zeros(1, np.float32)])

    def acquire(self, block: BlockId) -> AbstractContextManager[Weights]:
        began_s = time.perf_counter()
        next(self._pieces).max()
        self.swept_s += time.perf_counter() - began_s
        return super().acquire(block)


def _spec(layers: int, moe: MoeSpec | None) -> ModelSpec:
    return ModelSpec(
        family="llama",
        layers=(LayerSpec(moe=moe is not None),) * layers,
        hidden=_SIZE,
        vocab=_SIZE,
        context=1024,
        heads=8,
        kv_heads=4,
        head_dim=_SIZE,
        ffn=0 if moe else _SIZE,
        ropes=(RopeSpec(_SIZE, 10000.0),),
        moe=moe,
    )


def _engine(spec: ModelSpec, store: ResidentStore, streams: int, home: ComputeHome) -> Engine:
    wanted = Wanted(spec, 256, 256 * streams, "f16", _CHUNK, streams, 0, 1)
    plan = plan_in_ram(wanted, dict.fromkeys(spec.blocks(), _SIZE), memory_bytes=1 << 30)
    assert isinstance(plan, Plan)
    if home is not kernels.home_of(CPU):
        on_it = [
            it if it.block.kind == "embed" else replace(it, tier="gpu", device=_DEVICE) for it in plan.blocks
        ]
        plan = replace(plan, blocks=tuple(on_it))
    kv = KvPool(spec, plan.kv, [home] * len(spec.layers))
    homes = {CPU: kernels.home_of(CPU), _DEVICE: home}
    executor = Executor(Transformer(spec), plan, store, kv, Alone(), homes.__getitem__)
    scheduler = Scheduler(
        PrefixCache(kv.table, kv.page_tokens),
        sequences=streams,
        queue=streams,
        chunk_tokens=_CHUNK,
        guesses=0,
        ropes=spec.ropes,
    )
    return Engine(Rank(executor, time.monotonic), scheduler, time.monotonic)


def _weights(spec: ModelSpec, block: BlockId, home: ComputeHome) -> Weights:
    generator = np.random.default_rng(7)
    matrices: dict[str, Matrix] = {}
    vectors: dict[str, Floats] = {}
    for role, shape in shapes(spec, block.kind).items():
        values = (generator.standard_normal(shape) / 8).astype(np.float32)
        if len(shape) == 2:
            matrices[role] = Matrix.of(values)
        else:
            vectors[role] = values
    made = Weights(matrices, vectors)
    return made if block.kind == "embed" or home is kernels.home_of(CPU) else made.within(home)


def _sampling_s() -> float:
    """Of one greedy choice among many logits, of those of several streams."""
    rows = np.random.default_rng(7).standard_normal((LOGIT_ROWS, VOCAB), np.float32)
    sampler = Sampler(SamplingParams(temperature=0.0), [1])
    return usual_s(cycle([partial(sampler.sample, row) for row in rows]))
