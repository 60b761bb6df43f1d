"""Many requests, none of which anybody waits for: how many at once, in steps of how many tokens, and how long all take.

The more rows a step has, the less each costs: weights are read, or brought to a device, once for all, and experts get
many rows. But K and V of all, and what a step holds, take memory.

And what no schedule exceeds, where weights stay on the host: MoE-Lens's two stages (Yuan et al. 2025, arXiv
2504.09345), worked out anew in docs/throughput-model.md. In each iteration all weights pass to the accelerator once,
and every token that is there meets them: one token of each request that is being answered, and the prompts of those
that begin. Attention of answers is the host's. Pure.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import ceil, inf
from typing import NamedTuple

from ..plan import Plan
from .cost import cost, steady_batch
from .laws import kv_token_bytes, passing_bytes_per_s
from .prediction import Binding, Job
from .profile import Accelerator, Device
from .solve import Asks, Candidate, here
from .weights_of import Weighed


class BatchSize(NamedTuple):
    """Requests at once, and tokens of prompts in a step."""

    sequences: int
    chunk_tokens: int


# The fastest first; these of a processor.
BATCH_SIZES = (BatchSize(256, 1024), BatchSize(64, 512), BatchSize(16, 256))
WITH_DEVICE = (
    BatchSize(4096, 8192),
    BatchSize(1024, 8192),
    BatchSize(1024, 4096),
    BatchSize(512, 2048),
    *BATCH_SIZES,
)
_STEPS = 20  # shares of a model in memory that bounds are worked out for


@dataclass(frozen=True)
class PlannedBatch:
    """A plan for all requests of one kind. `at_once`: that have a place for K and V, and a row in each step; `seconds`:
    until all are answered. `missing`: what the machine lacks for it, in words; "" if it fits, and then nothing else of
    it is true but `least_bytes`, of memory with which it would."""

    name: str
    model: Weighed
    plan: Plan
    at_once: int
    seconds: float
    missing: str
    lacks_memory: bool
    least_bytes: int
    peak_bytes: dict[str, int]
    binding: Binding


def batches(
    models: Sequence[Weighed], wanted: Callable[[BatchSize], Asks], device: Device, job: Job, requests: int
) -> list[PlannedBatch]:
    """Of each way to run each model, the size of batch that takes least time, in the order of that; those that do not
    fit come last. `wanted`: what plans are asked for, with a size."""
    sizes = WITH_DEVICE if device.accelerators else BATCH_SIZES
    best: dict[tuple[object, ...], PlannedBatch] = {}
    for model in models:
        for size in sizes:
            for found in here(model, wanted(size)(model, "", device.threads), device, job):
                batch = _batch(found, device, job, requests)
                plan = batch.plan
                way = model.quant, plan.device, plan.passes, plan.streams
                if way not in best or _rank(batch) < _rank(best[way]):
                    best[way] = batch
    return sorted(best.values(), key=_rank)


def _rank(batch: PlannedBatch) -> tuple[bool, float]:
    """What fits by its time, what does not by what it lacks."""
    return (True, batch.least_bytes) if batch.missing else (False, batch.seconds)


def _batch(found: Candidate, device: Device, job: Job, requests: int) -> PlannedBatch:
    plan, model = found.plan, found.model
    assert plan is not None
    steady = steady_batch(model, plan, device, job)
    at_once = min(steady.streams, requests)
    together = cost(model, plan, device, job._replace(batch=at_once))
    # The last ones have begun after a step for as many as begin in each, and end an answer later.
    seconds = steady.step_s * (requests * job.new_tokens / steady.streams + job.new_tokens - 1)
    if requests <= steady.streams:
        seconds = together.total_s(job)
    suffix = f", {model.quant}" if model.quant != "keep" else ""
    return PlannedBatch(
        found.name + suffix,
        model,
        plan,
        at_once,
        seconds,
        found.missing,
        found.lacks_memory,
        found.least_bytes,
        dict(together.peak_bytes),
        together.binding,
    )


class Hybrid(NamedTuple):
    """A model on an accelerator and its host. `token_flops`: operations for one token on the accelerator. `disk_s`: of
    an iteration, what comes from disk in it."""

    weights_bytes: float  # that pass to the accelerator in each iteration
    token_flops: float
    kv_token_bytes: float  # of one token in all layers
    flops: float
    host_bytes_per_s: float
    kv_bytes: float  # of memory, for K and V
    memory_bytes_per_s: float  # of the host
    disk_s: float = 0.0

    @classmethod
    def all_of(cls, model: Weighed, host: Device, accelerator: Accelerator, kv_type: str) -> list[Hybrid]:
        """The best that there could be with more and more of the weights in memory, the rest on disk: what memory is
        not taken by those has K and V, be it the host's or the accelerator's, and what of all layers the accelerator
        has room for need not pass. None where the weights find no room."""
        spec = model.spec
        moe, flops = spec.moe, 0.0
        for kind, layers in model.layer_kinds.items():
            active = moe.active if moe and kind.expert else 0
            weights = sum(it.rows * it.cols for it in (*kind.attention, *kind.dense))
            flops += 2.0 * layers * (weights + active * sum(it.rows * it.cols for it in kind.expert))
        ends = sum(nbytes for block, nbytes in model.block_bytes.items() if block.kind in ("embed", "head"))
        memory_bytes, passing = host.memory_bytes + accelerator.memory_bytes, model.weights_bytes - ends
        most = min(1.0, memory_bytes / model.weights_bytes)
        held = [most * place / _STEPS for place in range(_STEPS + 1)] if host.disk_bytes_per_s else [1.0]
        return [
            cls(
                max(0.0, passing - accelerator.memory_bytes),
                flops,
                len(spec.layers) * kv_token_bytes(spec, kv_type),
                accelerator.flops,
                passing_bytes_per_s(accelerator),
                memory_bytes - share * model.weights_bytes,
                host.memory_bytes_per_s,
                (1 - share) * passing / host.disk_bytes_per_s if share < 1 else 0.0,
            )
            for share in held
            if share <= most
        ]

    @property
    def pass_s(self) -> float:
        """Seconds in which all weights pass."""
        return max(self.weights_bytes / self.host_bytes_per_s, self.disk_s)

    @property
    def saturating_tokens(self) -> float:
        """Of an iteration, with which computing all of a model takes as long as the pass (see `saturating_tokens`)."""
        return self.pass_s * self.flops / self.token_flops

    @property
    def kv_tokens(self) -> float:
        """Tokens for whose K and V there is room."""
        return self.kv_bytes / self.kv_token_bytes


def saturating_tokens(
    flops: float, host_bytes_per_s: float, experts: int, active: int, weight_bytes: float = 2
) -> float:
    """Tokens of an iteration with which computing experts takes as long as bringing them: each weight is brought once
    and costs two operations for each token that chose it, which are active / experts of all."""
    return flops / host_bytes_per_s * weight_bytes / 2 * experts / active


def tokens_per_kv(prompt_tokens: int, new_tokens: int) -> float:
    """Tokens that an iteration computes for each token of K and V that there is room for ("parallelism-memory
    efficiency"). A request is there for g iterations and holds p + i tokens in the i-th; meanwhile p + g are computed
    for it."""
    prompt, new = prompt_tokens, new_tokens
    return (prompt + new) / (new * (prompt + (new + 1) / 2))


def upper_bound(hybrid: Hybrid, prompt_tokens: int, new_tokens: int) -> float:
    """First stage: tokens of answers per second that no schedule exceeds, with endlessly many requests. Either the
    host's memory bounds how many tokens there are for each pass, or computing them takes longer than the pass."""
    kept = hybrid.kv_tokens * tokens_per_kv(prompt_tokens, new_tokens)
    by_memory = kept / hybrid.pass_s if hybrid.pass_s else inf
    by_compute = hybrid.flops / hybrid.token_flops
    return min(by_memory, by_compute) * new_tokens / (prompt_tokens + new_tokens)


def expected(
    hybrid: Hybrid, prompt_tokens: int, new_tokens: int, requests: int, page_tokens: int = 64
) -> float:
    """Second stage: tokens of answers per second of so many requests. K and V come in whole pages, the first and the
    last requests find nobody beside them, and the host attends to all that it holds in every iteration."""
    prompt, new = prompt_tokens, new_tokens
    # By one request, over its time.
    held = sum(page_tokens * ceil((prompt + i) / page_tokens) for i in range(1, new + 1))
    begins = min(hybrid.kv_tokens / held, requests / 1.0)  # requests that begin in each iteration
    computed = begins * (prompt + new)
    attention_s = begins * held * hybrid.kv_token_bytes / hybrid.memory_bytes_per_s
    iteration_s = max(hybrid.pass_s, computed * hybrid.token_flops / hybrid.flops, attention_s)
    iterations = requests / begins + new - 1  # until the last has begun, and until it has ended
    return requests * new / (iterations * iteration_s) if begins else 0.0
