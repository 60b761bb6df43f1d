"""How a model may be cut for the machines of one group: every layer divided, or the layers dealt out; and what steps
take with a cut that was chosen.

Shares are first what would make all machines ready at once, then what can really be cut (`slicing`), then changed a
little where a part does not fit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import product
from typing import NamedTuple

from .amounts import format_bytes
from .errors import ShardError
from .group_choice import Choice
from .group_cost import Cost, Placement
from .machines import Links, Machine, StepRows, Workload
from .plan import Wanted
from .rank_plans import Fit
from .rank_sizes import Held, Memory, Portion, Sizes
from .shares import level, level_by
from .slicing import CutOfExperts, Grains, divide
from .spec import BlockId
from .sum_cost import Means, Network

_REPAIRS = 3  # times shares are changed because a part does not fit
_GRAIN = 256  # shares are whole numbers of about this sum

EXPERT_CUTS: tuple[CutOfExperts, ...] = ("columns", "whole")
Layers = tuple[tuple[int, int], ...]  # each rank's, half-open


class Cuts:
    """All that is tried for one model."""

    def __init__(
        self,
        wanted: Wanted,
        sizes: Sizes,
        memory: Memory,
        grains: Grains,
        *,
        may_cut_vocabulary: bool = False,
    ) -> None:
        self._wanted, self._sizes, self._memory, self._grains = wanted, sizes, memory, grains
        self.may_cut_vocabulary = may_cut_vocabulary
        self._portions: dict[tuple[tuple[float, ...], CutOfExperts, bool], list[Portion] | str] = {}

    def divided(
        self, machines: Sequence[Machine], *, all_wishes: bool, beside: bool = False
    ) -> Iterator[tuple[tuple[float, ...], tuple[Placement, ...]]]:
        """Every layer divided: (shares as `divide` takes them, the ranks, whose portions tell how experts are cut).
        `all_wishes`: shares for prompts, for answers and between; otherwise those between alone. `beside`: a head that
        has all of the model besides, whose vocabulary stays whole."""
        tried = set()
        cuts = EXPERT_CUTS if self._wanted.spec.moe and len(machines) > 1 else EXPERT_CUTS[:1]
        for shares, experts in product(self._wishes(machines, all_wishes), cuts):
            for _ in range(_REPAIRS):
                whole = _rounded(shares)
                if (whole, experts) in tried:
                    break
                tried.add((whole, experts))
                parts, over = self._as_shared(machines, whole, experts, beside=beside)
                if parts:
                    yield whole, parts
                if not over:
                    break
                shares = [share * factor for share, factor in zip(shares, over, strict=True)]

    def as_before(
        self,
        machines: Sequence[Machine],
        shares: tuple[float, ...],
        experts: CutOfExperts,
        *,
        beside: bool = False,
    ) -> tuple[Placement, ...]:
        """The ranks with shares that were used before; none if these cannot be, or one does not fit."""
        if len(shares) != len(machines):
            return ()
        return self._as_shared(machines, shares, experts, beside=beside)[0]

    def _as_shared(
        self, machines: Sequence[Machine], shares: tuple[float, ...], experts: CutOfExperts, *, beside: bool
    ) -> tuple[tuple[Placement, ...], list[float]]:
        """As `_Tried`: parts and repairs. Columns of every expert give every rank as much to do whatever is chosen, but
        there may be few blocks of them; and where experts stream, whole ones are dealt out."""
        portions = self.portions_of(shares, experts)
        if isinstance(portions, str):
            return (), []
        tried = self._tried(machines, portions)
        if not beside and self._may_cut(machines) and tried.fit.may_want_cut_vocabulary:
            others = self.portions_of(shares, experts, cut_vocabulary=True)
            cut = None if isinstance(others, str) else self._tried(machines, others)
            # Where rank 0 lacks memory, shares are changed for a vocabulary that is cut.
            if cut is not None and (tried.fit.wants(cut.fit) or tried.fit.lacking is not None):
                tried = cut
        parts, over = tried.parts, tried.repairs
        if len(machines) > 1 and experts == "columns" and any(part.held.missing_experts for part in parts):
            return (), []
        return parts, over

    def _tried(self, machines: Sequence[Machine], portions: Sequence[Portion]) -> _Tried:
        each = zip(machines, portions, strict=True)
        return _Tried([(*pair, self._memory.held(pair[1], pair[0])) for pair in each])

    def _may_cut(self, machines: Sequence[Machine]) -> bool:
        return self.may_cut_vocabulary and len(machines) > 1

    def _wishes(self, machines: Sequence[Machine], all_wishes: bool) -> Iterator[Sequence[float]]:
        """Shares with which all are ready at once: with a token, with a prompt, and between; with the vocabulary cut,
        where there is too little room otherwise; and where they stream."""
        by_memory = [1 / machine.memory_bytes_per_s for machine in machines]
        by_flops = [1 / machine.flops for machine in machines]
        between = [(one * other) ** 0.5 for one, other in zip(by_memory, by_flops, strict=True)]
        costs = (by_memory, by_flops, between) if all_wishes else (between,)
        most = self._most(machines)
        fitting = [level(each, most) for each in costs]
        yield from (shares for shares in fitting if shares)
        if fitting[0] and most[0]:
            return
        if self._may_cut(machines):
            cut = self._most(machines, cut_vocabulary=True)
            yield from (shares for each in costs if (shares := level(each, cut)))
        if not fitting[0]:
            nbytes = self._sizes.cut
            within = [_share_within(*pair, nbytes) for pair in zip(machines, most, strict=True)]
            if streaming := level_by(within):
                yield streaming

    def _most(self, machines: Sequence[Machine], *, cut_vocabulary: bool = False) -> list[float]:
        """The largest share of what is cut that each machine can have in memory."""
        whole = self._memory.share_bytes(cut_vocabulary=cut_vocabulary)
        each = zip(machines, self._fixed(machines, cut_vocabulary), strict=True)
        return [min(1.0, max(0.0, (it.memory_bytes - needed) / whole)) for it, needed in each]

    def _fixed(self, machines: Sequence[Machine], cut_vocabulary: bool) -> list[float]:
        """What each needs besides its share."""
        share = 1 / len(machines)
        even = [Portion.even(self._wanted.spec, share, not rank) for rank in range(len(machines))]
        portions = [it._replace(vocab=share) if cut_vocabulary else it for it in even]
        return [self._memory.fixed_bytes(*pair) for pair in zip(machines, portions, strict=True)]

    def portions_of(
        self, shares: tuple[float, ...], experts: CutOfExperts, *, cut_vocabulary: bool = False
    ) -> list[Portion] | str:
        """What each rank has with these shares, or why there is no such division."""
        key = shares, experts, cut_vocabulary
        if key not in self._portions:
            self._portions[key] = self._cut(*key)
        return self._portions[key]

    def _cut(
        self, shares: tuple[float, ...], experts: CutOfExperts, cut_vocabulary: bool
    ) -> list[Portion] | str:
        spec, ranks = self._wanted.spec, len(shares)
        if ranks == 1:
            return [Portion.even(spec, 1.0)]
        try:
            shards = divide(spec, ranks, self._grains, shares, cut_vocabulary=cut_vocabulary, experts=experts)
        except ShardError as error:
            return str(error)
        return [Portion.of_shard(spec, shard) for shard in shards]

    def why_not(self, machines: Sequence[Machine]) -> str:
        """Why these machines together cannot have the model."""
        refused = [self.portions_of((1,) * len(machines), experts) for experts in EXPERT_CUTS]
        if all(isinstance(it, str) for it in refused):
            return str(refused[0])
        fixed = self._fixed(machines, False)
        for rank, (machine, needed) in enumerate(zip(machines, fixed, strict=True)):
            if machine.memory_bytes < needed:
                has = format_bytes(machine.memory_bytes)
                what = "scratch takes" if rank else "embedding, head and scratch take"
                return f"{machine.name} has {has} of memory for models, and {what} {format_bytes(needed)}"
        needed = sum(fixed) + self._memory.share_bytes()
        memory = sum(machine.memory_bytes for machine in machines)
        if needed > memory:
            return f"it takes about {format_bytes(needed)} of memory, there are {format_bytes(memory)} for models"
        return "it cannot be cut so that every part fits into the memory of its machine"

    def layered(self, machines: Sequence[Machine]) -> Iterator[tuple[Layers, tuple[Placement, ...]]]:
        """Layers in the order of ranks: as many on the fastest as fit there, or as long prompts take equally long."""
        spec = self._wanted.spec
        layers = len(spec.layers)
        most = [min(layers - len(machines) + 1, int(share * layers)) for share in self._most(machines)]
        if min(most) < 1 or sum(most) < layers:
            return
        counts = [1] * len(machines)
        for rank in sorted(range(len(machines)), key=lambda rank: -machines[rank].memory_bytes_per_s):
            counts[rank] += min(most[rank] - 1, layers - sum(counts))
        even = [1] * len(machines)
        while sum(even) < layers:
            open_ranks = [rank for rank in range(len(machines)) if even[rank] < most[rank]]
            even[min(open_ranks, key=lambda rank: (even[rank] + 1) / machines[rank].flops)] += 1
        for division in dict.fromkeys((tuple(counts), tuple(even))):
            stops = [sum(division[: rank + 1]) for rank in range(len(machines))]
            bounds = tuple(zip((0, *stops), stops, strict=False))
            portions = [Portion.of_layers(spec, *own, rank == 0) for rank, own in enumerate(bounds)]
            if parts := self._tried(machines, portions).parts:
                yield bounds, parts


class _Tried(NamedTuple):
    """What each machine would have, and how it would hold that, or the bytes that it would need."""

    each: Sequence[tuple[Machine, Portion, Held | int]]

    @property
    def fit(self) -> Fit:
        lacking = (rank for rank, (_, _, held) in enumerate(self.each) if isinstance(held, int))
        streams = any(isinstance(held, Held) and held.streams for _, _, held in self.each)
        return Fit(next(lacking, None), streams)

    @property
    def parts(self) -> tuple[Placement, ...]:
        """The ranks; none if one does not fit."""
        found = [
            Placement(machine, portion, it) for machine, portion, it in self.each if isinstance(it, Held)
        ]
        return tuple(found) if len(found) == len(self.each) else ()

    @property
    def repairs(self) -> list[float]:
        """What to multiply shares by for a better fit; none if they fit, or nothing would help."""
        over = [
            0.95 * machine.memory_bytes / max(held, 1) if isinstance(held, int) else 1.0
            for machine, _, held in self.each
        ]
        return over if len(over) > 1 and min(over) > 0 and self.fit.lacking is not None else []


def _share_within(machine: Machine, in_memory: float, cut_bytes: int) -> Callable[[float], float]:
    """The largest share of what is cut that a machine gets through in a time. `in_memory`: the most that it can have
    there. Where it streams, about half of its memory goes to other things."""

    def within(seconds: float) -> float:
        share = in_memory
        if machine.disk_bytes_per_s:
            share = max(share, in_memory / 2 + seconds * machine.disk_bytes_per_s / cut_bytes)
        return min(1.0, seconds * machine.memory_bytes_per_s / cut_bytes, share)

    return within


def _rounded(shares: Sequence[float]) -> tuple[float, ...]:
    """Shares as whole numbers, so that nearly equal ones are equal and dividing by them is quick."""
    whole = sum(shares)
    return tuple(max(1, round(_GRAIN * share / whole)) for share in shares)


class GroupSteps(NamedTuple):
    """`answer_s`: seconds of a step, by its rows and by the tokens before them; `prompt_s`: until the first token, by
    the tokens of a prompt that all machines read."""

    answer_s: Callable[[int, float], float]
    prompt_s: Callable[[int], float]


def group_steps(
    choice: Choice,
    wanted: Wanted,
    block_bytes: Mapping[BlockId, int],
    machines: Sequence[Machine],
    links: Links,
    means: Sequence[Means],
    grains: Grains,
    *,
    may_cut_vocabulary: bool,
    workload: Workload = Workload(),  # noqa: B008 it is frozen
) -> GroupSteps | None:
    """Of what `choose` chose with the same arguments: usual requests take what its figures say, with what was measured
    of these machines. None if its cut cannot be made any more."""
    sizes, places = Sizes.of(wanted.spec, block_bytes), [rank.place for rank in choice.ranks]
    memory, cost = Memory(wanted, sizes), Cost(wanted, sizes, workload)
    cuts = Cuts(wanted, sizes, memory, grains, may_cut_vocabulary=may_cut_vocabulary)
    its, beside = [machines[place] for place in places], choice.split == "prompts"
    parts = cuts.as_before(
        memory.beside(its) if beside else its, choice.shares, choice.experts, beside=beside
    )
    network = Network(machines, links, places)
    if not parts:
        return None
    able = [it for it in means if network.can(it.topology)]
    took, chunk = cost.together(parts, network, able).took, cost.chunk(parts)

    def step_s(rows: int, context: float) -> float:
        return took(StepRows(rows, context, logits=rows)).seconds

    def first_s(tokens: int) -> float:
        return cost.reading(tokens, chunk, took, took).seconds

    usual = min(workload.context_tokens, wanted.context_tokens)
    answers = choice.figures.token_s / step_s(1, usual)
    prompts = choice.figures.first_token_s[0] / first_s(cost.prompts[0])
    return GroupSteps(
        lambda rows, before: answers * step_s(rows, before + rows / 2),
        lambda tokens: prompts * first_s(tokens),
    )
