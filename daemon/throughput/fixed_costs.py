"""Measures what steps cost whatever the size of a model: the engine's round, the calls of a layer, routing, streams,
logits.

Runs the real engine with models that have next to nothing to multiply. Between their blocks a kernel computes as in a
real step, on all threads, so that each sweeps the caches of one processor: an interpreter whose caches are never swept
is three times as fast as one that waits for a token's weights, and ten times as one that waits for a prompt's.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from itertools import cycle, islice
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
from shoal.kernels import WEIGHT_TYPES, ComputeHome, Linears, Matrix
from shoal.kernels.arrays import Floats
from shoal.models.families import shapes
from shoal.models.sampling import Sampler, SamplingParams
from shoal.models.transformer import Transformer
from shoal.models.weights import Weights
from shoal.offload.block_store import Resident, ResidentStore
from shoal.offload.kv.pool import KvPool
from shoal.offload.kv.prefix_cache import PrefixCache
from shoal.partition.memory_layout import BAND_ROWS
from shoal.partition.plan import Plan, Wanted, plan_in_ram
from shoal.partition.spec import BlockId, LayerSpec, ModelSpec, MoeSpec, RopeSpec
from shoal.partition.throughput.profile import Overheads, SweptLaw

from .kernel_laws import Pool, usual_s

if TYPE_CHECKING:
    from shoal.devices.device_home import DeviceHome

FEW, MANY = 2, 14  # layers
STREAMS = 16
ANSWER_TOKENS = 24  # of each stream, in …
TURNS = 6  # … so many turns, of which the first token finds the caches as other models have left them
DEVICE_TOKENS = 12  # of one that a device computes
VOCAB = 1 << 17
LOGIT_ROWS = 16
ADDED_ROWS, ADDED = 64, 32  # rows of hidden states, and how many of these
WARMING = 4  # rounds before they count: a virtual machine's memory is up to ten times as slow when it is new
LONG_S = (5e-3, 15e-3)  # that kernels compute in a layer of a prompt, with …
LONG_ROWS, LONG_TOKENS, LONG_TURNS = 64, 3, 3  # … so many rows; then fewer tokens in a turn, and fewer turns
_TRIED_BYTES, _MOST_BYTES = 1 << 20, 64 << 20  # of weights for them
_SWEPT_TYPE = "Q4_K"
_SWEPT_COLS = 4096
_SIZE = 32
_DEVICE = "a device"
_CHUNK = 64


class _Sweep(NamedTuple):
    """What computes in a layer besides: `rows` multiplied by so many bytes of weights."""

    nbytes: int
    rows: int = 1


NO_SWEEP = _Sweep(0)
# The last also with experts and with streams.
SWEEPS = (
    _Sweep(2 << 20),
    _Sweep(8 << 20),
    _Sweep(32 << 20),
    _Sweep(16 << 20),
)


class _Where(NamedTuple):
    """`home` computes, by whose clock it is measured."""

    home: ComputeHome
    clock: Callable[[], float]


def overheads(pool: Pool, done: Callable[[str], None]) -> Overheads:
    """Measured with models of few and of many layers, dense and with experts, with one stream and with several, with
    caches that are swept for longer or shorter or not at all, some tokens of each in turn, as a machine changes its
    speed meanwhile. `done` is called before each is made and before each turn of it, `turns()` times."""

    def made(layers: int, sweep: _Sweep = NO_SWEEP, streams: int = 1, moe: MoeSpec | None = None) -> _Steps:
        done("fixed costs")
        return _Steps(layers, sweep, pool, streams, moe)

    sweeps = (*(_long(pool, seconds) for seconds in LONG_S), *SWEEPS)
    warm = made(FEW), made(MANY)
    dense = [(made(FEW, its), made(MANY, its)) for its in sweeps]
    moe, usual = MoeSpec(32, 8, _SIZE, True), SWEEPS[-1]
    mixture, mixed = made(MANY, usual, 1, moe), made(MANY, usual, STREAMS, moe)
    streams = made(FEW, usual, STREAMS), made(MANY, usual, STREAMS)
    everything = [*warm, *(its for pair in dense for its in pair), mixture, mixed, *streams]
    for turn in range(TURNS):
        tokens = len(range(turn, ANSWER_TOKENS, TURNS))
        for steps in everything:
            if turn < (LONG_TURNS if steps.long else TURNS):
                done("fixed costs")
                steps.turn(LONG_TOKENS if steps.long else tokens)
    warm_s = _layer_s(*warm)
    swept = sorted((_passing_s(*pair), max(0.0, _layer_s(*pair) - warm_s)) for pair in dense)
    few, many = (it.usual_s for it in dense[-1])
    layer_s = _layer_s(*dense[-1])
    stream_few, stream_many = streams[0].usual_s - few, streams[1].usual_s - many
    stream_layer_s = max(0.0, (stream_many - stream_few) / (MANY - FEW) / (STREAMS - 1))
    mixture_s = max(0.0, (mixture.usual_s - many) / MANY)
    mixed_s = (mixed.usual_s - streams[1].usual_s) / MANY
    further = max(1.0, (mixed.experts - mixture.experts) / MANY)
    passing, besides = zip(*swept, strict=True)
    return Overheads(
        step_s=max(1e-6, few - FEW * layer_s),
        layer_s=warm_s,
        mixture_s=mixture_s,
        expert_s=max(0.0, mixed_s - mixture_s) / further,
        logit_s=_sampling_s() / VOCAB,
        stream_s=max(0.0, stream_few / (STREAMS - 1) - FEW * stream_layer_s),
        stream_layer_s=stream_layer_s,
        hidden_s=2 * _added_s() / (ADDED_ROWS * _SWEPT_COLS),
        swept=SweptLaw(passing, besides),
    )


def turns() -> int:
    """How often `done` is called. Of all models two are without sweeps, two with each, two with experts and two with
    streams."""
    return (1 + TURNS) * (2 * len(SWEEPS) + 6) + (1 + LONG_TURNS) * 2 * len(LONG_S)


def _long(pool: Pool, seconds: float) -> _Sweep:
    """That takes about so long, however fast this machine is."""
    home, x = kernels.home_of(CPU), np.ones((LONG_ROWS, _SWEPT_COLS), np.float32)
    tried_s = usual_s(partial(home.linears, x, its) for its in cycle(_sweeps(pool, _TRIED_BYTES)))
    return _Sweep(min(_MOST_BYTES, max(1, round(seconds / tried_s * _TRIED_BYTES))), LONG_ROWS)


def device_overheads(device: DeviceHome) -> Overheads:
    """Of one stream that a device computes: it has no caches that others sweep."""
    where = _Where(device, lambda: device.device.now_s)
    few, many = _Steps(FEW, where=where), _Steps(MANY, where=where)
    mixture = _Steps(MANY, moe=MoeSpec(8, 2, _SIZE, True), where=where)
    for _ in range(DEVICE_TOKENS):
        for steps in (few, many, mixture):
            steps.step()
    layer_s = _layer_s(few, many)
    return Overheads(
        step_s=max(1e-6, few.usual_s - FEW * layer_s),
        layer_s=layer_s,
        mixture_s=max(0.0, (mixture.usual_s - many.usual_s) / MANY),
        logit_s=_sampling_s() / VOCAB,
    )


class _Steps:
    """Decodes so many streams. `sweep`: what computes in each layer besides, half of it before each block, with weights
    from `pool`. `took`: seconds of each step that counts, without the sweeping."""

    def __init__(
        self,
        layers: int,
        sweep: _Sweep = NO_SWEEP,
        pool: Pool | None = None,
        streams: int = 1,
        moe: MoeSpec | None = None,
        where: _Where | None = None,
    ) -> None:
        spec = _spec(layers, moe)
        where = where or _Where(kernels.home_of(CPU), time.perf_counter)
        self.long = sweep.rows > 1
        self.took: list[float] = []
        self._passing: list[float] = []
        self._experts: list[int] = []
        self._clock = where.clock
        blocks = {block: _weights(spec, block, where.home) for block in spec.blocks()}
        sweeps = _sweeps(pool, sweep.nbytes // 2) if pool is not None and sweep.nbytes else []
        self._store = _Swept({block: Resident(its) for block, its in blocks.items()}, sweeps, sweep.rows)
        self._engine = _engine(spec, self._store, streams, where.home)
        for number in range(streams):
            prompt = [1 + number] * 4
            sampler = Sampler(SamplingParams(temperature=0.0), prompt)
            self._engine.submit(Sequence(prompt, 4 + 2 * ANSWER_TOKENS, sampler))
        self._engine.step()  # the prompts

    @property
    def usual_s(self) -> float:
        return median(self.took)

    @property
    def passing_s(self) -> float:
        """How long a step is usually swept for."""
        return median(self._passing)

    @property
    def experts(self) -> float:
        """That a step usually uses, in all layers."""
        return median(self._experts)

    def turn(self, tokens: int) -> None:
        """So many steps, of which the first counts only if it is the only one."""
        for _ in range(tokens):
            self.step()
        if tokens > 1:
            del self.took[-tokens], self._passing[-tokens]

    def step(self) -> None:
        began_s, swept_s, experts = self._clock(), self._store.swept_s, self._store.experts
        self._engine.step()
        self._engine.events()
        self._passing.append(self._store.swept_s - swept_s)
        self.took.append(self._clock() - began_s - self._passing[-1])
        self._experts.append(self._store.experts - experts)


class _Swept(ResidentStore):
    """Sweeps the caches before it lends a block, as a product does. `swept_s`: how long that took, all in all.
    `experts`: how many of them it has lent; they come together, with nothing between them."""

    def __init__(self, blocks: Mapping[BlockId, Resident], sweeps: Iterable[Linears], rows: int = 1) -> None:
        super().__init__(blocks)
        self.swept_s = 0.0
        self.experts = 0
        self._sweeps = cycle(sweeps)
        self._input = np.ones((rows, _SWEPT_COLS), np.float32)
        self._home = kernels.home_of(CPU)

    def acquire(self, block: BlockId) -> AbstractContextManager[Weights]:
        began_s = time.perf_counter()
        for sweep in islice(self._sweeps, 1):
            self._home.linears(self._input, sweep)
        self.swept_s += time.perf_counter() - began_s
        return super().acquire(block)

    def acquire_all(self, blocks: Collection[BlockId]) -> AbstractContextManager[list[Weights]]:
        self.experts += len(blocks)
        return super().acquire_all(list(blocks))


def _sweeps(pool: Pool, nbytes: int) -> list[Linears]:
    """Products that read so many bytes of it each."""
    kind = next(it for it in WEIGHT_TYPES if it.name == _SWEPT_TYPE)
    rows = max(1, nbytes // kind.matrix_bytes(BAND_ROWS, _SWEPT_COLS)) * BAND_ROWS
    count = max(1, len(pool.memory) // kind.matrix_bytes(rows, _SWEPT_COLS) - 1)
    return [Linears((pool.matrix(kind, rows, _SWEPT_COLS),)) for _ in range(count)]


def _passing_s(few: _Steps, many: _Steps) -> float:
    return max(1e-9, (many.passing_s - few.passing_s) / (MANY - FEW))


def _layer_s(few: _Steps, many: _Steps) -> float:
    return max(1e-7, (many.usual_s - few.usual_s) / (MANY - FEW))


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


def _added_s() -> float:
    """Of what a block gives for many rows, that is added to their hidden states. Both come from memory or from a far
    cache, as kernels have computed since."""
    home = kernels.home_of(CPU)
    arrays = [home.place(np.ones((ADDED_ROWS, _SWEPT_COLS), np.float32)) for _ in range(ADDED)]
    calls = [partial(home.add, *pair) for pair in zip(arrays[::2], arrays[1::2], strict=True)]
    for call in WARMING * calls:
        call()
    return usual_s(cycle(calls))


def _sampling_s() -> float:
    """Of one greedy choice among many logits, of those of several streams."""
    rows = np.random.default_rng(7).standard_normal((LOGIT_ROWS, VOCAB), np.float32)
    sampler = Sampler(SamplingParams(temperature=0.0), [1])
    return usual_s(cycle([partial(sampler.sample, row) for row in rows]))
