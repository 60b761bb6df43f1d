"""Measures what steps cost whatever the size of a model: the engine's round, the calls of a layer, routing, logits.

Runs the real engine with models that have next to nothing to multiply.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
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
from shoal.partition.throughput.profile import Overheads

from .kernel_laws import usual_s

if TYPE_CHECKING:
    from shoal.devices.device_home import DeviceHome

FEW, MANY = 2, 22  # layers
ANSWER_TOKENS = 96  # of an answer
DEVICE_TOKENS = 12  # of one that a device computes
VOCAB = 1 << 17
_SIZE = 32
_DEVICE = "a device"
_CHUNK = 64


class _Where(NamedTuple):
    """`home` computes, by whose clock it is measured."""

    home: ComputeHome
    clock: Callable[[], float]
    tokens: int


def overheads(device: DeviceHome | None = None) -> Overheads:
    """Measured with models of few and of many layers, dense and with experts, on the CPU or on a device."""
    where = _Where(kernels.home_of(CPU), time.perf_counter, ANSWER_TOKENS)
    if device is not None:
        where = _Where(device, lambda: device.device.now_s, DEVICE_TOKENS)
    few, many = _step_s(where, FEW), _step_s(where, MANY)
    mixed = _step_s(where, MANY, MoeSpec(8, 2, _SIZE, True))
    layer_s = max(1e-7, (many - few) / (MANY - FEW))
    return Overheads(
        step_s=max(1e-6, few - FEW * layer_s),
        layer_s=layer_s,
        mixture_s=max(0.0, (mixed - many) / MANY),
        logit_s=_sampling_s() / VOCAB,
    )


def _step_s(where: _Where, layers: int, moe: MoeSpec | None = None) -> float:
    """Of a decode, the lesser half of them."""
    engine = _engine(_spec(layers, moe), where.home)
    sampler = Sampler(SamplingParams(temperature=0.0), [1])
    engine.submit(Sequence([1] * 8, 8 + where.tokens, sampler))
    took: list[float] = []
    while True:
        began_s = where.clock()
        if not engine.step():
            break
        engine.events()
        took.append(where.clock() - began_s)
    return sorted(took)[len(took) // 4]


def _spec(layers: int, moe: MoeSpec | None) -> ModelSpec:
    return ModelSpec(
        family="llama",
        layers=(LayerSpec(moe=moe is not None),) * layers,
        hidden=_SIZE,
        vocab=_SIZE,
        context=1024,
        heads=1,
        kv_heads=1,
        head_dim=_SIZE,
        ffn=0 if moe else _SIZE,
        ropes=(RopeSpec(_SIZE, 10000.0),),
        moe=moe,
    )


def _engine(spec: ModelSpec, home: ComputeHome) -> Engine:
    wanted = Wanted(spec, 256, 256, "f16", _CHUNK, 1, 0, 1)
    plan = plan_in_ram(wanted, dict.fromkeys(spec.blocks(), _SIZE), memory_bytes=1 << 30)
    assert isinstance(plan, Plan)
    cpu = kernels.home_of(CPU)
    blocks = {block: _weights(spec, block) for block in spec.blocks()}
    if home is not cpu:
        on_it = [
            it if it.block.kind == "embed" else replace(it, tier="gpu", device=_DEVICE) for it in plan.blocks
        ]
        plan = replace(plan, blocks=tuple(on_it))
        blocks = {block: its if block.kind == "embed" else its.within(home) for block, its in blocks.items()}
    kv = KvPool(spec, plan.kv, [home] * len(spec.layers))
    store = ResidentStore({block: Resident(its) for block, its in blocks.items()})
    homes = {CPU: cpu, _DEVICE: home}
    executor = Executor(Transformer(spec), plan, store, kv, Alone(), homes.__getitem__)
    scheduler = Scheduler(
        PrefixCache(kv.table, kv.page_tokens),
        sequences=1,
        queue=4,
        chunk_tokens=_CHUNK,
        guesses=0,
        ropes=spec.ropes,
    )
    return Engine(Rank(executor, time.monotonic), scheduler, time.monotonic)


def _weights(spec: ModelSpec, block: BlockId) -> Weights:
    generator = np.random.default_rng(7)
    matrices: dict[str, Matrix] = {}
    vectors: dict[str, Floats] = {}
    for role, shape in shapes(spec, block.kind).items():
        values = (generator.standard_normal(shape) / 8).astype(np.float32)
        if len(shape) == 2:
            matrices[role] = Matrix.of(values)
        else:
            vectors[role] = values
    return Weights(matrices, vectors)


def _sampling_s() -> float:
    """Of one greedy choice among many logits."""
    logits = np.random.default_rng(7).standard_normal(VOCAB, np.float32)
    sampler = Sampler(SamplingParams(temperature=0.0), [1])

    return usual_s(iter(lambda: partial(sampler.sample, logits), None))
