"""From a device's laws to seconds: products with weights, attention, reads, distinct experts. Pure formulas, explained
in docs/throughput-model.md.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from typing import NamedTuple

from ..memory_layout import KV_FORMATS, PAGE_TOKENS, KvLayout, kv_page_bytes
from ..plan import Plan
from ..spec import ModelSpec
from .prediction import Job
from .profile import ANY, Accelerator, AttentionLaw, Device, RowsLaw
from .weights_of import Product, Weighed

_WIDE = 16  # bits of inputs, where nothing else is said
_LAW_ROWS = 64  # of a chunk, with which attention of prompts is measured
ATTENTION_SHARE = 0.5  # of a device's operations per second that attention reaches, where no law was measured

_NO_DISK = 1.0  # byte per second
# What is leased from a window or a cache of experts, and given back, costs twice what it does where it stays: readers
# are woken, who want the interpreter as well. (0.1 to 0.3 ms a block where a layer takes 0.08; 0.4 for experts that go
# together, where a mixture takes 0.19.)
LEASE_CALLS = 2
READ_PIECE_BYTES = 4 << 20  # that are read of a block at once, and …
_ROW_BYTES = 256 << 10  # … those that take as long as a row

# Published traces of mixtures touch 61% of the experts that independent choices would; the truth lies between.
DISTINCT_SHARE = 0.61
_HALVINGS = 40  # until 1 / r is found
ALL_TOUCHED = 16  # times experts / active: with so many rows even the least popular experts are chosen


class Rows(NamedTuple):
    """Like sequences in a step: `alike` of them, each with `rows` tokens behind `before` others."""

    alike: int
    rows: int
    before: float


class Share(NamedTuple):
    """Seconds of one part of a step: of these, `memory_s` are what reading the bytes takes anyhow."""

    seconds: float
    memory_s: float

    def __add__(self, other: object) -> Share:
        assert isinstance(other, Share)
        return Share(self.seconds + other.seconds, self.memory_s + other.memory_s)

    def times(self, count: float) -> Share:
        return Share(count * self.seconds, count * self.memory_s)


NOTHING = Share(0.0, 0.0)


def as_it_ran(device: Device, share: Share) -> Share:
    """What a part of a step takes by what running has taught of the device."""
    learnt = device.corrections
    memory_s = learnt.memory * share.memory_s
    return Share(memory_s + learnt.compute * (share.seconds - share.memory_s), memory_s)


def product(device: Device, matrix: Product, rows: float, *, narrow: bool = False) -> Share:
    """Multiplying `rows` rows by a matrix. By the tables of its type, between those of the next smaller and the next
    larger matrices that were measured; beyond the last number of rows each costs as much as the last ones did.
    `narrow`: the plan has narrow inputs."""
    memory_s = matrix.nbytes / device.memory_bytes_per_s
    found = [law for law in device.products if law.kind == matrix.kind and (matrix.expert or not law.experts)]
    few = [law for law in found if law.input_bits < _WIDE] if narrow and matrix.narrow else []
    own = few or [law for law in found if law.input_bits == _WIDE]
    laws = own or [law for law in device.products if law.kind == ANY]
    if laws:
        seconds = matrix.nbytes * _byte_s(sorted(laws, key=_nbytes), matrix.nbytes, rows)
    else:
        return _slower(memory_s, 2.0 * matrix.rows * matrix.cols * rows / device.flops)
    return Share(seconds, min(seconds, memory_s))


def _slower(memory_s: float, computed_s: float) -> Share:
    """Of two things that go on beside each other, by a few figures: what takes longer decides alone."""
    return Share(memory_s, memory_s) if memory_s >= computed_s else Share(computed_s, 0.0)


def _nbytes(law: RowsLaw) -> float:
    return law.nbytes


def _byte_s(laws: Sequence[RowsLaw], nbytes: float, rows: float) -> float:
    place = bisect_left([law.nbytes for law in laws], nbytes)
    low, high = laws[max(0, place - 1)], laws[min(place, len(laws) - 1)]
    share = between_logs(nbytes, low.nbytes, high.nbytes)
    return (1 - share) * _at_rows(low, rows) + share * _at_rows(high, rows)


def _at_rows(law: RowsLaw, rows: float) -> float:
    last = law.rows[-1]
    return law.byte_s[-1] * rows / last if rows > last else interpolated(rows, law.rows, law.byte_s)


def products(device: Device, matrices: Sequence[Product], rows: float, *, narrow: bool = False) -> Share:
    return sum((product(device, matrix, rows, narrow=narrow) for matrix in matrices), NOTHING)


def attention(
    device: Device, spec: ModelSpec, kv_type: str, rows: int, before: float, window: int | None
) -> Share:
    """One layer's attention of `rows` tokens of one sequence that has `before` tokens already."""
    seen = rows * before + rows * (rows + 1) / 2
    if window is not None:
        full = min(rows, max(0.0, window - before))  # tokens that see everything before them
        seen = full * before + full * (full + 1) / 2 + (rows - full) * window
    numbers = seen * spec.heads * spec.head_dim
    kv_bytes = min(before + rows, (window or before + rows) + rows) * kv_token_bytes(spec, kv_type)
    memory_s = kv_bytes / device.memory_bytes_per_s
    laws = [law for law in device.attention if law.kv_type == kv_type]
    if not laws:
        return _slower(memory_s, 4 * numbers / (ATTENTION_SHARE * device.flops))
    dims = sorted({law.head_dim for law in laws})
    low = max((it for it in dims if it <= spec.head_dim), default=dims[0])
    high = min((it for it in dims if it >= spec.head_dim), default=dims[-1])
    few_s, many_s = (
        _attention_s([law for law in laws if law.head_dim == it], spec, rows, seen) for it in (low, high)
    )
    # A number costs a part of a head's weight of softmax, which is divided among its dimensions.
    part = (1 / spec.head_dim - 1 / high) / (1 / low - 1 / high) if low < high else 0.0
    # Tables are of K and V that caches hold for the most part.
    seconds = max(memory_s, many_s + part * (few_s - many_s))
    return Share(seconds, min(seconds, memory_s))


def _attention_s(laws: Sequence[AttentionLaw], spec: ModelSpec, rows: int, seen: float) -> float:
    """By tables of one size of heads."""
    laws = sorted(laws, key=lambda law: law.queries)
    few, many = (
        rows * spec.heads * spec.head_dim * _row_s(it, rows, seen / rows) for it in (laws[0], laws[-1])
    )
    # What a head of K and V takes is divided among the queries that share it.
    part = 1 / laws[0].queries - 1 / laws[-1].queries
    own = (spec.kv_heads / spec.heads - 1 / laws[-1].queries) / part if part else 0.0
    # With more queries than were measured, no less than if all of it were of heads of K and V.
    least = min(1.0, laws[-1].queries * spec.kv_heads / spec.heads) * min(few, many)
    return max(many + own * (few - many), least)


def _row_s(law: AttentionLaw, rows: int, context: float) -> float:
    """Of each number of a query that sees so many tokens. Few rows, such as guesses that are verified, lie between a
    decode and a long chunk."""
    share = between_logs(rows, 1, _LAW_ROWS)
    decode_s, prompt_s = (_seeing_s(law.context, it, context) for it in (law.decode_s, law.prompt_s))
    return (1 - share) * decode_s + share * prompt_s


def _seeing_s(contexts: tuple[int, ...], number_s: tuple[float, ...], context: float) -> float:
    """On lines through the points, which do not begin with 0: a row has to be turned and stored, whatever it sees."""
    if context >= contexts[-1] or len(contexts) == 1:
        return context * number_s[-1]
    high = max(1, bisect_left(contexts, context))
    low_s, high_s = (contexts[place] * number_s[place] for place in (high - 1, high))
    slope = (high_s - low_s) / (contexts[high] - contexts[high - 1])
    found_s = low_s + slope * (context - contexts[high - 1])
    return min(max(found_s, context * number_s[0]), low_s) if context < contexts[0] else found_s


def kv_token_bytes(spec: ModelSpec, kv_type: str) -> float:
    """K and V of one token in one layer."""
    return spec.kv_heads * KvLayout.of(KV_FORMATS[kv_type], spec.head_dim).head_bytes / PAGE_TOKENS


class Touched(NamedTuple):
    """Seconds in which memory for K and V is used for the first time: until the first token, and in a usual step of
    an answer."""

    ttft_s: float
    token_s: float


def fresh_pages(device: Device, spec: ModelSpec, kv_type: str, job: Job, share: float) -> Touched:
    """A pool takes nothing of memory before it is used, so texts pay for the pages that nobody had before them, on the
    device with this `share` of each: all of it as soon as it is begun, since the system's pages are larger."""
    kv_bytes = job.fresh * share * kv_page_bytes(spec, kv_type)
    page_s = job.batch * kv_bytes / device.first_touch_bytes_per_s
    read = -(-job.prompt_tokens // PAGE_TOKENS)
    begun = -(-(job.context_tokens - 1) // PAGE_TOKENS) - read  # nobody asks for what follows the last token
    return Touched(read * page_s, begun * page_s * job.step_tokens / (job.new_tokens - 1) if begun else 0.0)


def block_bytes_per_s(device: Device, nbytes: float) -> float:
    """The disk's speed with blocks of so many bytes, into memory that no cache holds. No plan streams from no disk;
    whoever asks anyhow gets what a very slow one would do."""
    if device.reads is None:
        return device.disk_bytes_per_s or _NO_DISK
    return interpolated(nbytes, device.reads.nbytes, device.reads.bytes_per_s)


def ring_bytes_per_s(device: Device, nbytes: float) -> float:
    """The same through a window's ring of so many bytes, of blocks that are large."""
    if device.reads is None or device.reads.rings is None:
        return block_bytes_per_s(device, math.inf)
    return interpolated(nbytes, device.reads.rings.nbytes, device.reads.rings.bytes_per_s)


def gathered_s(device: Device, rows: int) -> float:
    """Until so many rows of an embedding on disk are here. A read of some KB takes, with all that goes with it (80 and
    60 µs), about as long as one of `_ROW_BYTES`; the first waits for half of a piece that is coming."""
    waiting_s = 0.5 * READ_PIECE_BYTES / block_bytes_per_s(device, READ_PIECE_BYTES)
    return waiting_s + rows * _ROW_BYTES / block_bytes_per_s(device, _ROW_BYTES)


def embedded_s(plan: Plan, device: Device, rows: int) -> float:
    """The same of a plan's embedding; 0 if that stays in memory. A tied one has no bytes of its own, but is read as
    well."""
    away = any(it.block.kind == "embed" and it.tier == "disk" for it in plan.blocks)
    return gathered_s(device, rows) if away else 0.0


def passing_bytes_per_s(its: Accelerator) -> float:
    """Of weights that pass from memory in every step, and are page-locked where they lie."""
    return its.locked_bytes_per_s or its.host_bytes_per_s


def distinct_experts(experts: int, active: int, rows: float, share: float | None = None) -> float:
    """How many experts of a layer are chosen by `rows` tokens. Independent, uniform choices would make it
    N(1 − (1 − k/N)^n), which is an upper bound: real routers prefer some experts and neighbours choose alike. `share`
    of that is taken: by default DISTINCT_SHARE, rising to all of it with ALL_TOUCHED × N/k rows. Never fewer than one
    token's."""
    uniform: float = experts * (1 - (1 - active / experts) ** rows)
    if share is None:
        share = DISTINCT_SHARE + (1 - DISTINCT_SHARE) * min(1.0, rows * active / (ALL_TOUCHED * experts))
    return min(uniform, max(min(active, uniform), share * uniform))


def used_experts(model: Weighed, rows: float, share: float | None = None) -> float:
    """How many experts of a layer of this mixture are chosen by `rows` tokens: `share` of independent, uniform choices;
    where none is given, by how often each was used, if that was counted, or as `distinct_experts` has it."""
    moe = model.spec.moe
    assert moe is not None
    if share is None and model.chances:
        known = model.chosen
        if rows not in known:
            known[rows] = sum(chosen_by(it, rows) for it in model.chances) / len(model.chances)
        return known[rows]
    return distinct_experts(moe.experts, moe.active, rows, share)


def chosen_by(chances: Sequence[float], rows: float) -> float:
    """How many experts of a layer `rows` tokens choose together that choose independently, each expert with its
    chance: Σ 1 − (1 − p)^n. With even chances that is `distinct_experts`' upper bound, with uneven ones less."""
    found: float = sum(1 - (1 - chance) ** rows for chance in chances)
    return found


def token_chances(shares: Sequence[float], active: int) -> tuple[float, ...] | None:
    """How likely one token is to choose each expert of a layer, by the shares of parts of steps in which they were
    used: as if each part had had as many rows r, which chose independently, so that a share is 1 − (1 − p)^r, and the
    chances of a token's `active` experts come to as many. None where parts used half of all experts and more: they had
    so many rows that they tell little."""
    if not active <= sum(shares) <= len(shares) / 2:
        return None
    low, high = 0.0, 1.0  # 1 / r
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        few = chosen_by(shares, middle) < active
        low, high = (middle, high) if few else (low, middle)
    return tuple(1 - (1 - share) ** high for share in shares)


def interpolated(at: float, points: tuple[float, ...] | tuple[int, ...], values: tuple[float, ...]) -> float:
    """Between the points on lines; before the first and after the last its value."""
    if at <= points[0]:
        return values[0]
    for number in range(1, len(points)):
        low, high = points[number - 1], points[number]
        if at <= high:
            share = (at - low) / (high - low)
            return values[number - 1] + share * (values[number] - values[number - 1])
    return values[-1]


def between_logs(at: float, low: float, high: float) -> float:
    """How far `at` lies on the way from low to high on a logarithmic scale, in [0, 1]."""
    if high <= low:
        return 0.0
    return min(1.0, max(0.0, math.log(at / low) / math.log(high / low)))
