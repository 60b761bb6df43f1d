"""Checks of a plan that another machine made for this one: nothing in it is believed that this machine's memory
depends on. Pure: knows sizes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from .errors import PlanError
from .memory_layout import KV_FORMATS, PAGE_TOKENS, kv_page_bytes
from .plan import Plan, scratch_bytes, wanted_by
from .spec import MAX_CONTEXT, BlockId, ModelSpec

_MOST = 1 << 50  # bytes, or whatever else is counted
_COUNTS = {
    "context_tokens": (1, MAX_CONTEXT),
    "chunk_tokens": (1, MAX_CONTEXT),
    "sequences": (1, 1 << 16),
    "guesses": (0, 1 << 16),
    "threads": (1, 1 << 16),
    "scratch_bytes": (0, _MOST),
    "part_tokens": (1, 1 << 30),
    "window_bytes": (0, _MOST),
    "expert_slots": (0, 1 << 24),
    "streamed_bytes": (0, _MOST),
    "ranks": (1, 1 << 16),
    "overlap_rows": (1, 1 << 30),
    "group_rows": (1, 1 << 30),
    "page_rows": (0, 1 << 30),
    "device_scratch_bytes": (0, 0),
    "staged_tokens": (0, 0),
    "staged_experts": (0, 0),
    "attending_rows": (0, 0),
}


def check_given(
    plan: Plan,
    spec: ModelSpec,
    matrix_bytes: Callable[[BlockId], int],
    slices: Sequence[BlockId] = (),
) -> None:
    """Raises PlanError unless a step of `plan` takes no more memory than `plan.peak_bytes`. spec: of the shard.
    matrix_bytes: of a block's matrices, as this machine finds them. slices: of the head, as a pack has them; a plan may
    name these instead of the whole."""
    for name, (low, high) in _COUNTS.items():
        _check(name, getattr(plan, name), low, high)
    kv = plan.kv
    if kv.dtype not in KV_FORMATS:
        raise PlanError(f"kv.dtype={kv.dtype[:80]!r}: must be one of {', '.join(KV_FORMATS)}")
    _check("kv.page_tokens", kv.page_tokens, PAGE_TOKENS, PAGE_TOKENS)
    _check("kv.pages", kv.pages, 1, 1 << 32)
    wanted_bytes = kv.pages * kv_page_bytes(spec, kv.dtype)
    _check("kv.nbytes", kv.nbytes, wanted_bytes, wanted_bytes)
    blocks = tuple(it.block for it in plan.blocks)
    sliced = bool(slices and spec.vocab) and blocks == (*spec.blocks()[:-1], *slices)
    if blocks != spec.blocks() and not sliced:
        raise PlanError(f"{len(plan.blocks)} blocks, which are not those of the shard in their order")
    for it in plan.blocks:
        if it.device != "cpu" or it.tier not in ("ram", "disk"):
            raise PlanError(
                f"{it.block} is to be in {it.tier[:80]!r} at {it.device[:80]!r}: this machine has a cpu"
            )
        elsewhere = it.tier == "disk" or (sliced and spec.tied and it.block.kind == "embed")
        _check(f"nbytes of {it.block}", it.nbytes, 0 if elsewhere else matrix_bytes(it.block), _MOST)
    _check("scratch_bytes", plan.scratch_bytes, _least_scratch(plan, spec), _MOST)


def _least_scratch(plan: Plan, spec: ModelSpec) -> int:
    """With whichever kernels need less: those of the machine that planned may be others."""
    wanted = wanted_by(plan, spec)._replace(vocab=0)  # whole logits are elsewhere
    return min(scratch_bytes(wanted._replace(native=native), plan.part_tokens) for native in (True, False))


def _check(what: str, value: int, low: int, high: int) -> None:
    if not low <= value <= high:
        raise PlanError(f"{what}={value}: must be from {low} to {high}")
