"""What a process with one model has in memory at most: what its budget has room for, and what a job makes of that.

A budget is for whatever may come: as many and as long texts as a plan allows, each step as long as can be. A job is one
thing of these. Pure.
"""

from __future__ import annotations

from ..memory_layout import kv_page_bytes
from ..plan import Plan, scratch_bytes, wanted_by
from .prediction import Job
from .weights_of import Weighed

# The interpreter with its libraries: as budgets count it before there is a model, and what of it is in memory while it
# answers.
PROCESS_BYTES, RESIDENT_BYTES = 84 << 20, 57_000_000
_UNUSED_READING = 6 << 20  # of `READING_BYTES`, which has rows of the embedding for whole chunks


def beside_bytes(model: Weighed, kv_type: str) -> int:
    """Of a budget, what is no plan's: the process, the tokenizer, and pages of K and V on their way to disk."""
    return PROCESS_BYTES + model.tokenizer_bytes + model.buffers.get(kv_type, 0)


def peak_bytes(model: Weighed, plan: Plan, job: Job, times: int = 1) -> int:
    """What the process has in memory at most, if the job is done so many `times`, each with other texts."""
    kv, scratch = _unused_kv(model, plan, job, times), _unused_scratch(model, plan, job)
    return RESIDENT_BYTES + model.tokenizer_bytes + plan.peak_bytes - kv - scratch


def _unused_kv(model: Weighed, plan: Plan, job: Job, times: int) -> int:
    """Pages of texts that have ended are kept for others that begin alike, as long as there are others, those that were
    only begun, too. Keys of a page lie dimension by dimension, so a page that was begun has all of them in memory."""
    whole, begun = divmod(job.context_tokens, plan.kv.page_tokens)
    each = whole + bool(begun)
    part = (whole + (1 + begun / plan.kv.page_tokens) / 2) / each if begun else 1.0
    touched = part * min(plan.kv.pages, job.batch * times * each)
    unused = max(0.0, plan.kv.nbytes - touched * kv_page_bytes(model.spec, plan.kv.dtype))
    return int(host_kv_share(plan) * unused)


def host_kv_share(plan: Plan) -> float:
    """Of K and V, the share that is no device's."""
    return 1 - plan.device_kv_bytes / max(1, plan.kv.nbytes)


def _unused_scratch(model: Weighed, plan: Plan, job: Job) -> int:
    if plan.device:  # what loading takes may be more than steps do
        return 0
    reading = _UNUSED_READING if plan.streams else 0
    most = wanted_by(plan, model.spec)
    own = most._replace(
        chunk_tokens=min(plan.chunk_tokens, job.batch * job.prompt_tokens),
        sequences=min(plan.sequences, job.batch),
        guesses=min(plan.guesses, job.batch * job.guesses),
    )
    return reading + scratch_bytes(most, plan.part_tokens) - scratch_bytes(own, plan.part_tokens)
