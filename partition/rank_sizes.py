"""What a part of a model weighs: bytes, multiplications, and the memory that a rank needs for it.

A part is given as shares of what is cut (`Portion`): those of a shard, of some of the layers, or any that one wants to
know about. Whether a rank's part has to be streamed is estimated as `streamed_plan` would divide memory, but without
trying where each block goes, and never to its favour.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from math import comb, prod
from typing import NamedTuple

from .hardware_guesses import KV_SHARE, SCRATCH_SHARE, WINDOW_SHARE
from .machines import BlockTimes, DiskTimes, FixedCosts, Machine, RankHolds, RankShares, StepRows
from .memory_layout import PAGE_TOKENS, arena_slack, kv_page_bytes
from .pinning import between
from .plan import Wanted, least_kv_pages, scratch_bytes
from .slicing import Shard, shard_spec
from .spec import BlockId, ModelSpec, MoeSpec
from .streamed_plan import PART_TOKENS, READING_BYTES

_VECTORS = 4  # norms and biases of a layer, each as long as a hidden state


class Portion(NamedTuple):
    """A rank's shares of everything that is cut, each in [0, 1]. Embedding and head (`vocab`) are all rank 0's, unless
    they are cut as well."""

    heads: float
    kv_heads: float
    ffn: float
    shared_ffn: float
    experts: float  # columns of every expert, or …
    whole_experts: bool  # … some of the experts
    vocab: float
    first: bool
    spec: Callable[[], ModelSpec]  # the smaller model that it is; making it takes longer than most questions

    @classmethod
    def even(cls, spec: ModelSpec, share: float, first: bool = True) -> Portion:
        """The same share of everything."""
        return cls(share, share, share, share, share, False, float(first), first, lambda: spec)

    @classmethod
    def of_shard(cls, spec: ModelSpec, shard: Shard) -> Portion:
        own, moe = shard.ranges, spec.moe
        experts, shared, whole = 0.0, 0.0, False
        if moe:
            whole = own.experts.size < moe.experts
            experts = own.experts.size * own.expert_ffn.size / (moe.experts * moe.ffn)
            shared = own.shared_ffn.size / max(1, moe.shared_ffn)
        o_columns = own.o_columns.size / spec.head_dim  # some may be another rank's as well
        return cls(
            (own.heads.size + o_columns) / (2 * spec.heads),
            own.kv_heads.size / spec.kv_heads,
            own.ffn.size / max(1, spec.ffn),
            shared,
            experts,
            whole,
            own.vocab.size / max(1, spec.vocab),
            shard.rank == 0,
            cache(lambda: shard_spec(spec, shard)),
        )

    @classmethod
    def of_layers(cls, spec: ModelSpec, start: int, stop: int, first: bool) -> Portion:
        """Some of the layers."""
        even = cls.even(spec, (stop - start) / len(spec.layers), first)
        vocab = spec.vocab if first else 0
        layers = spec.layers[start:stop]
        return even._replace(spec=cache(lambda: replace(spec, layers=layers, vocab=vocab)))

    @property
    def cuts_vocabulary(self) -> bool:
        return 0 < self.vocab < 1


class Sizes(NamedTuple):
    """Bytes of a whole model, all layers together, by what is cut how; and its largest blocks."""

    queries: int  # q and o: cut by query heads
    keys: int  # k and v: cut by KV heads
    ffn: int
    routers: int  # whole on every rank
    shared_ffn: int
    experts: int
    embed: int
    head: int
    largest_attn: int
    largest_ffn: int  # or shared expert
    largest_expert: int
    largest_slice: int  # of the head

    @classmethod
    def of(cls, spec: ModelSpec, block_bytes: Mapping[BlockId, int]) -> Sizes:
        """`block_bytes`: of every block; the head may be in slices."""
        sums: Counter[str] = Counter()
        largest: Counter[str] = Counter()
        for block, nbytes in block_bytes.items():
            sums[block.kind] += nbytes
            largest[block.kind] = max(largest[block.kind], nbytes)
        moe = spec.moe
        queries = spec.heads / (spec.heads + spec.kv_heads)
        routers = sums["router"]
        if moe and moe.shared_ffn:  # beside a shared expert; they are f32 at most
            routers = min(routers, 4 * spec.hidden * moe.experts * sum(layer.moe for layer in spec.layers))
        return cls(
            queries=int(sums["attn"] * queries),
            keys=sums["attn"] - int(sums["attn"] * queries),
            ffn=sums["ffn"],
            routers=routers,
            shared_ffn=sums["router"] - routers,
            experts=sums["expert"],
            embed=sums["embed"],
            head=sums["head"],
            largest_attn=largest["attn"],
            largest_ffn=max(largest["ffn"], largest["router"]),
            largest_expert=largest["expert"],
            largest_slice=largest["head"],
        )

    @property
    def cut(self) -> int:
        """Bytes of what is cut."""
        return self.queries + self.keys + self.ffn + self.shared_ffn + self.experts

    def attn_of(self, portion: RankShares) -> float:
        return self.queries * portion.heads + self.keys * portion.kv_heads

    def ffn_of(self, portion: RankShares) -> float:
        """Dense FFNs, shared experts and routers."""
        return self.ffn * portion.ffn + self.shared_ffn * portion.shared_ffn + self.routers

    def held_of(self, portion: Portion) -> float:
        """All but embedding and head."""
        return self.attn_of(portion) + self.ffn_of(portion) + self.experts * portion.experts

    def head_of(self, portion: RankShares) -> float:
        return self.head * portion.vocab


class Operations(NamedTuple):
    """Multiplications and additions of a whole model for one token; attention by the tokens attended to, all layers
    together."""

    queries: float
    keys: float
    ffn: float
    shared_ffn: float
    routers: float
    experts: float  # the active ones
    head: float
    scores: float  # for each token that one layer attends to
    kv_bytes: float  # likewise

    @classmethod
    def of(cls, spec: ModelSpec, kv_type: str) -> Operations:
        moe, hidden = spec.moe, spec.hidden
        sparse = sum(layer.moe for layer in spec.layers)
        dense = len(spec.layers) - sparse
        each_head = 4 * hidden * spec.head_dim * len(spec.layers)  # two matrices, two operations a weight
        return cls(
            queries=each_head * spec.heads,
            keys=each_head * spec.kv_heads,
            ffn=6 * hidden * spec.ffn * dense,
            shared_ffn=6 * hidden * moe.shared_ffn * sparse if moe else 0,
            routers=2 * hidden * moe.experts * sparse if moe else 0,
            experts=6 * hidden * moe.ffn * moe.active * sparse if moe else 0,
            head=2 * hidden * spec.vocab,
            scores=4 * spec.heads * spec.head_dim,
            kv_bytes=kv_page_bytes(spec, kv_type) / PAGE_TOKENS / len(spec.layers),
        )


class TwoSpeeds(NamedTuple):
    """The laws of a machine of which no more is known than how fast it reads weights and computes: whatever takes
    longer, block by block."""

    machine: Machine
    sizes: Sizes
    work: Operations
    windows: Mapping[int | None, int]  # how many layers have each
    moe: MoeSpec | None
    chosen: Callable[[int], float] | None = None  # `used`, where more is known; None: choices are independent

    def fixed(self, share: float) -> FixedCosts:
        """See `PartLaws`: nobody has measured it."""
        return FixedCosts()

    def times(self, portion: RankShares, step: StepRows, crowd: float) -> BlockTimes:
        """See `PartLaws`."""
        sizes, work, rows = self.sizes, self.work, step.all_rows
        attended = sum(
            count * min(step.context, window or step.context) for window, count in self.windows.items()
        )
        attn_bytes = sizes.attn_of(portion) + step.streams * work.kv_bytes * attended * portion.kv_heads
        count = (work.queries + work.scores * attended) * portion.heads + work.keys * portion.kv_heads
        attn_s = self._longer_s(attn_bytes, rows * count)
        experts = crowd * portion.experts
        ffn_bytes = sizes.ffn_of(portion) + sizes.experts * experts * self._touched(rows)
        count = work.ffn * portion.ffn + work.shared_ffn * portion.shared_ffn + work.routers
        ffn_s = self._longer_s(ffn_bytes, rows * (count + work.experts * experts))
        nbytes = attn_bytes + ffn_bytes + sizes.head_of(portion)
        memory_s = nbytes / self.machine.memory_bytes_per_s
        return BlockTimes(attn_s, ffn_s, self.head_s(portion.vocab, step.logits), memory_s)

    def head_s(self, share: float, rows: int) -> float:
        """See `PartLaws`."""
        return self._longer_s(self.sizes.head * share, rows * self.work.head * share)

    def used(self, rows: int) -> float:
        """See `PartLaws`."""
        if self.chosen is not None:
            return self.chosen(rows)
        moe = self.moe
        return moe.experts * (1 - (1 - moe.active / moe.experts) ** rows) if moe else 0.0

    def _touched(self, rows: int) -> float:
        """The share of all experts."""
        return self.used(rows) / self.moe.experts if self.moe else 0.0

    def disk(
        self, portion: RankShares, held: RankHolds, rows: int, crowd: float, own: BlockTimes
    ) -> DiskTimes:
        """See `PartLaws`: its bytes ÷ its speed, beside which everything is computed."""
        experts = self.sizes.experts * portion.experts * self._touched(rows) * crowd * held.missing_experts
        return DiskTimes((held.streamed_bytes + experts) / max(self.machine.disk_bytes_per_s, 1.0))

    def _longer_s(self, nbytes: float, operations: float) -> float:
        return max(nbytes / self.machine.memory_bytes_per_s, operations / self.machine.flops)


class Held(NamedTuple):
    """What a rank has in memory for its portion, and what it streams."""

    needed_bytes: int
    streamed_bytes: int  # in every step
    missing_experts: float  # share of its experts that are not in memory
    chunk_tokens: int  # of the longest step that its memory allows
    window_bytes: int = 0  # for blocks that stream, of which …
    block_bytes: int = 0  # … the largest has so many
    expert_slots: int = 0

    @property
    def streams(self) -> bool:
        return self.streamed_bytes > 0 or self.missing_experts > 0


class Memory:
    """Whether portions of one model fit into the memory of machines."""

    def __init__(self, wanted: Wanted, sizes: Sizes) -> None:
        self._wanted = wanted
        # Of ranks without embedding and head:
        self._without = wanted._replace(spec=replace(wanted.spec, vocab=0))
        self._sizes = sizes
        self._kv_bytes = least_kv_pages(wanted) * kv_page_bytes(wanted.spec, wanted.kv_type)
        self._kv_tokens = least_kv_pages(wanted) * PAGE_TOKENS

    def whole_bytes(self) -> int:
        """The least that one machine needs for all of it."""
        return self._resident(Portion.even(self._wanted.spec, 1.0), self._wanted)

    def beside(self, machines: Sequence[Machine]) -> list[Machine]:
        """The same machines for a group whose head has all of the model in memory besides its part, which needs no
        vocabulary and scratch of its own: with the memory that this leaves it, and no disks, as nothing is to stream.
        None if there is too little."""
        head, *others = [machine._replace(disk_bytes_per_s=0.0) for machine in machines]
        whole = Portion.even(self._wanted.spec, 1.0)
        wanted = self._rough(head, whole)
        left = head.memory_bytes - self._resident(whole, wanted)
        if left <= 0:
            return []
        own = scratch_bytes(wanted) + self._sizes.embed + self._sizes.head
        return [head._replace(memory_bytes=left + own), *others]

    def may_hold(self, machines: Sequence[Machine], *, may_cut_vocabulary: bool) -> bool:
        """False if these machines, the head first, cannot hold the model however it is cut."""
        sizes, head = self._sizes, machines[0]
        vocabulary = 0 if may_cut_vocabulary and len(machines) > 1 else sizes.embed + sizes.head
        if any(machine.disk_bytes_per_s for machine in machines):
            return bool(head.disk_bytes_per_s) or head.memory_bytes > vocabulary
        memory = sum(machine.memory_bytes for machine in machines)
        return head.memory_bytes > vocabulary and memory > sizes.cut + sizes.embed + sizes.head

    def share_bytes(self, *, cut_vocabulary: bool = False) -> float:
        """What all that is cut takes, with its KV: a rank's share of it takes this in proportion."""
        cut = self._sizes.cut + (self._sizes.embed + self._sizes.head if cut_vocabulary else 0)
        return cut + arena_slack(cut) + self._kv_bytes

    def fixed_bytes(self, machine: Machine, portion: Portion) -> float:
        """What a rank needs besides its share, at most."""
        scratch = scratch_bytes(self._rough(machine, portion))
        vocabulary = 0 if portion.cuts_vocabulary else (self._sizes.embed + self._sizes.head) * portion.vocab
        return scratch + vocabulary + self._sizes.routers

    def held(self, portion: Portion, machine: Machine, *, exact: bool = False) -> Held | int:
        """How the machine would hold the portion: all in memory, or else streamed; or the least memory it would need.
        Unless `exact`, or memory is short, scratch is counted as for the whole model."""
        wanted = self._rough(machine, portion)
        needed = self._resident(portion, wanted)
        if exact or needed > machine.memory_bytes:
            wanted = wanted._replace(spec=portion.spec())
            needed = self._resident(portion, wanted)
        if needed <= machine.memory_bytes:
            row_bytes = self._row_bytes(wanted, wanted.chunk_tokens)
            longer = int((machine.memory_bytes - needed) // row_bytes)
            return Held(needed, 0, 0.0, min(wanted.chunk_tokens + longer, self._longest))
        return self._streamed(portion, wanted, machine, needed)

    def _rough(self, machine: Machine, portion: Portion) -> Wanted:
        if not portion.cuts_vocabulary:
            return (self._wanted if portion.first else self._without)._replace(threads=machine.threads)
        rows = self._wanted.spec.vocab
        spec = replace(self._wanted.spec, vocab=max(1, round(rows * portion.vocab)))
        gathered = rows if portion.first else 0
        return self._wanted._replace(spec=spec, threads=machine.threads, vocab=gathered)

    @property
    def _longest(self) -> int:
        return max(self._wanted.chunk_tokens, self._kv_tokens)

    def _resident(self, portion: Portion, wanted: Wanted) -> int:
        sizes = self._sizes
        weights = sizes.held_of(portion) + sizes.head_of(portion)
        weights += sizes.embed * portion.vocab
        kv = self._kv_bytes * portion.kv_heads
        return int(weights + arena_slack(int(weights)) + kv + scratch_bytes(wanted)) + 1

    def _streamed(self, portion: Portion, wanted: Wanted, machine: Machine, resident: int) -> Held | int:
        sizes, memory = self._sizes, machine.memory_bytes
        kv = self._kv_bytes * portion.kv_heads
        if wanted.kv_tokens is None:
            kv = max(kv, min(memory / KV_SHARE, kv * wanted.sequences))
        least_part, _, most_part = PART_TOKENS
        shortest, longest = wanted.chunk_tokens, self._longest
        least_scratch = scratch_bytes(wanted, least_part)
        most_scratch = scratch_bytes(wanted._replace(chunk_tokens=longest), most_part)
        scratch = between(least_scratch, memory // SCRATCH_SHARE, most_scratch)
        row_bytes = self._row_bytes(wanted, least_part)
        chunk = min(longest, shortest + int((scratch - least_scratch) // row_bytes))
        blocks = (
            sizes.largest_attn * max(portion.heads, portion.kv_heads),
            sizes.largest_ffn * max(portion.ffn, portion.shared_ffn),
            min(sizes.largest_slice, sizes.head_of(portion)),
        )
        first = int(max(blocks))
        window = between(first, memory // WINDOW_SHARE, 2 * first)
        dense = int(sizes.attn_of(portion) + sizes.ffn_of(portion) + sizes.head_of(portion))
        count, slots, expert = 0, 0, 1
        if self._wanted.spec.moe and sizes.experts:
            count = round(sizes.experts / sizes.largest_expert)
            expert = int(sizes.largest_expert * (1 if portion.whole_experts else portion.experts))
            count = round(count * portion.experts) if portion.whole_experts else count
            slots = min(self._wanted.spec.moe.active, count)
        # Blocks are pinned whole, so up to the largest of them is left free.
        vectors = _VECTORS * 4 * wanted.spec.hidden * len(wanted.spec.layers)
        room = memory - READING_BYTES - vectors - kv - scratch
        room_dense = room - slots * expert
        if room_dense < window or not machine.disk_bytes_per_s:
            least = memory - room_dense + window if machine.disk_bytes_per_s else resident
            return min(resident, int(least) + 1)
        streamed = max(0, min(dense, dense - (room_dense - window) + first))
        if room_dense >= dense + first:  # only rows of the embedding, and experts, come from disk
            streamed = 0
            slots = min(count, int((room - dense) // expert))
        missing = 1 - slots / count if count else 0.0
        return Held(memory, int(streamed), missing, chunk, window, first, slots)

    def _row_bytes(self, wanted: Wanted, part: int) -> float:
        """Memory that one more row in a step takes."""
        longer = wanted._replace(chunk_tokens=2 * wanted.chunk_tokens)
        return max(1.0, (scratch_bytes(longer, part) - scratch_bytes(wanted, part)) / wanted.chunk_tokens)


@cache
def crowding(experts: int, active: int, ranks: int) -> float:
    """How many times its share of the active experts the busiest rank has on average, if whole experts are dealt to
    ranks evenly and every choice is equally likely."""
    own = [experts // ranks + (rank < experts % ranks) for rank in range(ranks)]
    choices, width = comb(experts, active), experts + 1
    busiest, before = 0.0, 0
    for most in range(-(-active // ranks), min(active, max(own)) + 1):
        # Ways to choose so many experts of a rank are coefficients of a polynomial, here digits of `width` bits; those
        # to choose so many of all ranks are digits of the product.
        each = {
            size: sum(comb(size, few) << few * width for few in range(min(most, size) + 1)) for size in {*own}
        }
        ways = prod(each[size] for size in own) >> active * width & (1 << width) - 1
        busiest += most * (ways - before) / choices
        before = ways
    return busiest * ranks / active
