"""What each rank of a group holds of every block: its shard, as half-open ranges.

Attention is cut by KV heads, each with the query heads of its group. If there are more ranks than KV heads, several
ranks have the same KV head and share its query heads. FFNs (a mixture's shared expert is one) are cut by columns.
Mixtures are cut by columns of every expert, so that all ranks have the same work whatever tokens choose, or by whole
experts, so that a rank that streams them reads fewer of them, in one piece each. Rank 0 has all of embedding and head,
or they are cut by rows of the vocabulary. So a rank's weights are those of a smaller model of the same hidden size
(`shard_spec`), and what it computes of a block is a partial: the partials of all ranks, added in the order of ranks,
are the whole.

A cut between heads may fall into a block of quantised columns of o. Then both ranks have that block, and each feeds
zeros to the columns of the other (`ModelSpec.o_margins`).

Every rank has all norms and routers whole. A bias of a matrix that is cut by rows (q, k, v, gate, up) is cut with the
matrix. A bias that is added to a sum over columns (o, down) belongs to rank 0 alone; otherwise every rank would add it.

Norms over all heads at once (`qk_norm` "full": OLMo-2, OLMoE) use the squares of all ranks (`NormShare`), and their
weights are cut with the heads.

Pure integers: knows no tensors, roles of weights or files. `models.checkpoint.shard` cuts tensors by these ranges.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import accumulate, pairwise
from math import isfinite, lcm
from typing import Literal, NamedTuple

from .errors import ShardError
from .memory_layout import BAND_ROWS
from .spec import ModelSpec, MoeSpec, NormShare


class Range(NamedTuple):
    """Half-open."""

    start: int
    stop: int

    @property
    def size(self) -> int:
        return self.stop - self.start

    def times(self, factor: int) -> Range:
        """The same range, counted in things of which `factor` make one."""
        return Range(self.start * factor, self.stop * factor)


NONE = Range(0, 0)
CutOfExperts = Literal["columns", "whole"]


@dataclass(frozen=True)
class Ranges:
    """What a shard holds of every block; `NONE` where the model has nothing."""

    heads: Range  # query heads
    kv_heads: Range
    o_columns: Range  # those of these heads, and the rest of the first and the last block of columns
    ffn: Range  # columns of a dense FFN: rows of gate and up, columns of down
    shared_ffn: Range  # columns of the shared expert
    experts: Range  # that this rank has any of
    expert_ffn: Range  # columns of each of these
    vocab: Range  # rows of embed and head; `NONE` where rank 0 has them all


@dataclass(frozen=True)
class Shard:
    """What rank `rank` of `ranks` holds. Ranks are counted from 0, but `str()` counts from 1: 2/3."""

    rank: int
    ranks: int
    ranges: Ranges

    @property
    def has_sum_biases(self) -> bool:
        """Whether this rank adds the biases of what is summed over ranks."""
        return self.rank == 0

    def same_bytes(self, other: Shard) -> bool:
        """Whether both hold the same weights, as shards of groups of different sizes may."""
        return (self.ranges, self.has_sum_biases) == (other.ranges, other.has_sum_biases)

    def __str__(self) -> str:
        return f"{self.rank + 1}/{self.ranks}"


class Grains(NamedTuple):
    """How many columns of o and of the down of FFN, shared expert and experts cannot be parted, because they are a
    block of the stored type: 32 or 256, or 1 for floats."""

    o: int = 1
    ffn: int = 1
    shared_ffn: int = 1
    expert_ffn: int = 1


ANYWHERE = Grains()


def divide(
    spec: ModelSpec,
    ranks: int,
    grains: Grains = ANYWHERE,
    shares: Sequence[float] = (),
    *,
    cut_vocabulary: bool = False,
    experts: CutOfExperts = "columns",
) -> tuple[Shard, ...]:
    """The shards of `ranks` ranks. Their sizes are as near to `shares` (one for each rank, by default equal) as the
    model can be cut, but every rank gets something. Embedding and head are all rank 0's unless `cut_vocabulary`: then
    each rank keeps rows, and every token costs a sum and a gathering more.

    ShardError, with the numbers, if there are too many ranks or the shares are wrong.
    """
    _refuse(ranks, _limits(spec, grains, cut_vocabulary, experts), shares)
    exact = [Fraction(share) for share in shares] or [Fraction(1)] * ranks
    moe = spec.moe
    heads, kv_heads = zip(*_attention(spec, exact), strict=True)
    parts = zip(
        heads,
        kv_heads,
        [_whole_blocks(own.times(spec.head_dim), grains.o) for own in heads],
        _columns(spec.ffn, grains.ffn, exact),
        _columns(moe.shared_ffn if moe else 0, grains.shared_ffn, exact),
        *_experts(moe, grains.expert_ffn, exact, experts),
        _columns(spec.vocab, 1, exact) if cut_vocabulary else [Range(0, spec.vocab), *[NONE] * (ranks - 1)],
        strict=True,
    )
    return tuple(Shard(rank, ranks, Ranges(*own)) for rank, own in enumerate(parts))


def shard_spec(spec: ModelSpec, shard: Shard) -> ModelSpec:
    """The smaller model whose weights the shard has. It counts vocabulary and heads from the shard's first; its experts
    keep their numbers, and its router chooses among all of them."""
    own, moe = shard.ranges, spec.moe
    if moe:
        held = None if own.experts.size == moe.experts else own.experts
        moe = replace(moe, ffn=own.expert_ffn.size, shared_ffn=own.shared_ffn.size, held=held)
    mixed = own.heads.times(spec.head_dim)
    share = None
    if spec.qk_norm == "full" and shard.ranks > 1:
        first = own.heads.start % (spec.heads // spec.kv_heads) == 0  # of the ranks that have these KV heads
        share = NormShare(spec.heads, spec.kv_heads, first)
    return replace(
        spec,
        heads=own.heads.size,
        kv_heads=own.kv_heads.size,
        ffn=own.ffn.size,
        vocab=own.vocab.size,
        tied=spec.tied and own.vocab.size > 0,
        o_margins=(mixed.start - own.o_columns.start, own.o_columns.stop - mixed.stop),
        norm_share=share,
        moe=moe,
    )


def cut_rows(spec: ModelSpec, shard: Shard) -> Range | None:
    """The rows of embedding and head that a shard of this model has, if they are cut; None if they are all rank 0's."""
    own = shard.ranges.vocab
    return own if 0 < own.size < spec.vocab else None


def _refuse(ranks: int, limits: Iterable[tuple[int, str]], shares: Sequence[float]) -> None:
    if ranks < 1:
        raise ShardError(f"{ranks} ranks: there must be 1 or more")
    for most, why in limits:
        if ranks > most:
            raise ShardError(f"{ranks} ranks are too many: {why}; {most} would do")
    if shares and len(shares) != ranks:
        raise ShardError(f"{len(shares)} shares for {ranks} ranks: give each rank one")
    if not all(isfinite(share) and share > 0 for share in shares):
        raise ShardError(f"shares {list(shares)}: every one must be positive")


def _limits(
    spec: ModelSpec, grains: Grains, cut_vocabulary: bool, experts: CutOfExperts
) -> Iterable[tuple[int, str]]:
    """(how many ranks can each get some of it, why not more) for everything that is cut, the fewest ranks first."""
    moe = spec.moe
    found = [(spec.heads, f"there are {spec.heads} heads")]
    if moe and experts == "whole":
        found.append((moe.experts, f"there are {moe.experts} experts, which stay whole"))
    for name, count, what, grain in (
        ("the FFN", spec.ffn, "columns", grains.ffn),
        ("the shared expert", moe.shared_ffn if moe else 0, "columns", grains.shared_ffn),
        ("every expert", moe.ffn if moe and experts == "columns" else 0, "columns", grains.expert_ffn),
        ("the vocabulary", spec.vocab if cut_vocabulary else 0, "rows", 1),
    ):
        if count:
            step = lcm(BAND_ROWS, grain)
            why = f"{name} has {count} {what}, which are cut in groups of {step}"
            found.append((-(-count // step), why))
    return sorted(found)


def _attention(spec: ModelSpec, shares: Sequence[Fraction]) -> list[tuple[Range, Range]]:
    """(query heads, KV heads) of each rank."""
    group = spec.heads // spec.kv_heads
    if len(shares) <= spec.kv_heads:
        return [(kv.times(group), kv) for kv in _cut(spec.kv_heads, shares)]
    found = []
    for head, ranks in enumerate(_runs(shares, spec.kv_heads, group)):
        for start, stop in _cut(group, shares[slice(*ranks)]):
            found.append((Range(head * group + start, head * group + stop), Range(head, head + 1)))
    return found


def _runs(shares: Sequence[Fraction], runs: int, most: int) -> list[Range]:
    """Cuts the ranks into `runs` runs of 1 to `most` consecutive ones, whose shares sum to nearly the same."""
    sums = list(accumulate(shares, initial=Fraction(0)))
    bounds = [0]
    for run in range(1, runs):
        left = runs - run
        lowest = max(bounds[-1] + 1, len(shares) - most * left)
        highest = min(bounds[-1] + most, len(shares) - left)
        wanted = sums[-1] * run / runs
        _, nearest = min((abs(sums[bound] - wanted), bound) for bound in range(lowest, highest + 1))
        bounds.append(nearest)
    return [Range(*pair) for pair in pairwise([*bounds, len(shares)])]


def _experts(
    moe: MoeSpec | None, grain: int, shares: Sequence[Fraction], cut: CutOfExperts
) -> tuple[list[Range], list[Range]]:
    """Which experts each rank has, and which of their columns."""
    if moe is None:
        return [NONE] * len(shares), [NONE] * len(shares)
    if cut == "whole":
        return _cut(moe.experts, shares), [Range(0, moe.ffn)] * len(shares)
    return [Range(0, moe.experts)] * len(shares), _columns(moe.ffn, grain, shares)


def _whole_blocks(columns: Range, grain: int) -> Range:
    """The columns of all blocks that have any of these."""
    return Range(columns.start // grain * grain, -(-columns.stop // grain) * grain)


def _columns(columns: int, grain: int, shares: Sequence[Fraction]) -> list[Range]:
    """[0, columns) cut between bands and between blocks: in groups of both, of which only the last may be smaller."""
    step = lcm(BAND_ROWS, grain)
    parts = (part.times(step) for part in _cut(-(-columns // step), shares))
    return [Range(start, min(stop, columns)) for start, stop in parts]


def _cut(units: int, shares: Sequence[Fraction]) -> list[Range]:
    """[0, units) cut into consecutive ranges of at least one unit, as large as `shares` to the nearest unit; no ranges
    but `NONE` if there are no units."""
    if not units:
        return [NONE] * len(shares)
    assert len(shares) <= units
    bounds = [0]
    sums = list(accumulate(shares))
    for rank, done in enumerate(sums[:-1], 1):
        nearest = round(units * done / sums[-1])
        bounds.append(min(max(nearest, bounds[-1] + 1), units - (len(shares) - rank)))
    return [Range(*pair) for pair in pairwise([*bounds, units])]
