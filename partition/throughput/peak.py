"""What a process with one model has in memory at most: what its budget has room for, and what a job makes of that.

A budget is for whatever may come: as many and as long texts as a plan allows, each step as long as can be, and whatever
kernels and types take most. A job is one thing of these, and only what was written to counts. Pure.
"""

from __future__ import annotations

from ..memory_layout import (
    HUGE_BYTES,
    INPUT_GROUP,
    PACKED_BYTES,
    PAGE_TOKENS,
    SPAN_TOKENS,
    SPANS_BYTES,
    TILE_TOKENS,
    kv_page_bytes,
)
from ..plan import Plan
from ..streamed_plan import READING_BYTES, experts_together
from .prediction import Job
from .weights_of import Product, Weighed

# The interpreter with its libraries: as budgets count it before there is a model, and what of it is in memory while it
# answers.
PROCESS_BYTES, RESIDENT_BYTES = 84 << 20, 59_500_000
_UNUSED_READING = 6 << 20  # of `READING_BYTES`, which has rows of the embedding for whole chunks
_THREAD_BYTES = 320 << 10  # that a thread of the kernels unpacks weights and adds up in, and its stack
_FLOATS = ("F32", "F16", "BF16")  # inputs of these weights are not rounded


def beside_bytes(model: Weighed, kv_type: str) -> int:
    """Of a budget, what is no plan's: the process, the tokenizer, and pages of K and V on their way to disk."""
    return PROCESS_BYTES + model.tokenizer_bytes + model.buffers.get(kv_type, 0)


def peak_bytes(model: Weighed, plan: Plan, job: Job, times: int = 1) -> int:
    """What the process has in memory at most, if the job is done so many `times`, each with other texts."""
    kv = _kv_bytes(model, plan, job, times)
    if plan.device:  # what loading takes may be more than steps do
        step = plan.scratch_bytes
    else:
        reading = model.vectors_bytes + READING_BYTES - _UNUSED_READING if plan.streams else 0
        step = min(plan.scratch_bytes, reading + step_bytes(model, plan, job))
    weights = sum(map(_in_huge_pages, (plan.pinned_bytes, plan.window_bytes, plan.expert_bytes)))
    return RESIDENT_BYTES + model.tokenizer_bytes + weights + kv + step


def _kv_bytes(model: Weighed, plan: Plan, job: Job, times: int) -> int:
    """Of this machine. Pages of texts that have ended are kept for others that begin alike, as long as there are
    others, those that were only begun, too. They are taken in their order, in huge pages of the system."""
    each = -(-job.context_tokens // PAGE_TOKENS)
    pages = min(plan.kv.pages, job.batch * times * each)
    share = host_kv_share(plan)
    taken = _in_huge_pages(int(share * pages * kv_page_bytes(model.spec, plan.kv.dtype)))
    return min(int(share * plan.kv.nbytes), taken)


def _in_huge_pages(nbytes: int) -> int:
    return -(-nbytes // HUGE_BYTES) * HUGE_BYTES


def host_kv_share(plan: Plan) -> float:
    """Of K and V, the share that is no device's."""
    return 1 - plan.device_kv_bytes / max(1, plan.kv.nbytes)


def step_bytes(model: Weighed, plan: Plan, job: Job) -> int:
    """What the longest step of a job holds besides weights, K and V: hidden states of all its rows, what the rows that
    are in a block together make of them there, and logits; with native kernels, whose memory is as much as any of them
    took and stays. Malloc finds no room for logits between what blocks have left."""
    spec = model.spec
    decoded = job.batch * (1 + job.guesses)
    rows = min(plan.chunk_tokens + decoded, max(job.batch * job.prompt_tokens, decoded))
    part = min(rows, plan.rows_together(rows))
    sums = 3 if part < rows else 1  # of a block, two of which may travel
    queries, keys = spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim
    attending = part * (2 * queries + 2 * keys)  # q and what comes of it, k and v
    feeding = 0
    if moe := spec.moe:
        at_once = rows if plan.expert_slots else part  # whose experts are known before one is computed
        shared = bool(moe.shared_ffn)
        feeding = at_once * ((1 + shared) * spec.hidden + 3 * moe.active) + part * moe.experts
    numbers = rows * spec.hidden + part * sums * spec.hidden + max(attending, feeding)
    numbers += rows * spec.head_dim  # of ropes
    logits = min(plan.logit_rows, decoded) * (spec.vocab + _slice_rows(model, plan))
    return 4 * (numbers + logits) + _kernel_bytes(model, plan, part, job.context_tokens)


def _slice_rows(model: Weighed, plan: Plan) -> int:
    """Of the largest slice of a head that is in slices: its logits are there beside all of them."""
    slices = [model.products[it.block][0].rows for it in plan.blocks if it.block.kind == "head"]
    return max(slices) if len(slices) > 1 else 0


def _kernel_bytes(model: Weighed, plan: Plan, rows: int, context: int) -> int:
    """What native kernels have for themselves: inputs, packed as the weights want them that they are multiplied by, of
    as many rows as share a tile of weights, but with experts of all rows and all that these choose; and in attention
    the queries, turned, and sums of spans that are computed apart."""
    spec, moe = model.spec, model.spec.moe
    queries = rows * spec.heads * spec.head_dim
    spans = -(-context // SPAN_TOKENS)
    apart = spans > 1 and plan.threads > 1 and rows * spec.heads < TILE_TOKENS * 4 * plan.threads
    most = 4 * queries + (min(SPANS_BYTES, 4 * spans * queries) if apart else 0)
    tile = min(rows, TILE_TOKENS)
    for kind in model.layer_kinds:
        first, last = kind.dense[0], kind.dense[-1]
        most = max(most, *(tile * _packed(it, normed=True) for it in kind.attention))
        most = max(most, tile * (_packed(first, normed=True) + _packed(last)))
        if moe is not None and kind.expert:
            chosen = min(moe.active, experts_together(plan.expert_slots)) if plan.expert_slots else moe.active
            first, last = kind.expert[0], kind.expert[-1]  # in the forms for few rows and for many
            most = max(most, 2 * rows * (_packed(first) + chosen * _packed(last)))
    return most + plan.threads * _THREAD_BYTES


def _packed(product: Product, *, normed: bool = False) -> int:
    """Bytes of one input of a matrix, which are normalised as floats first."""
    rounded = product.kind not in _FLOATS
    return 4 * product.cols * (normed or not rounded) + PACKED_BYTES * product.cols // INPUT_GROUP * rounded
