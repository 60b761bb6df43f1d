"""Chooses which machines run a model together, what each of them has of it, and how they add their sums.

The head may run it alone. Further machines are looked at in the order in which they joined; each is taken, perhaps
instead of others, if usual requests get faster and nothing costs more than `TOLERANCE`: neither a token of an answer
nor the first token of a prompt, against anything that was chosen without it. So another machine never makes anything
slower by more than that. Up to `EXACT_MACHINES` all groups are compared, beyond that those near the last choice.

Pure, and deterministic: the same figures give the same choice. `group_cost` predicts, `group_words` says why.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import combinations
from typing import Literal, NamedTuple

from .errors import ShardError
from .group_cost import Cost, Figures, Part
from .machines import Links, LinkSpeed, Machine, Workload, check_machines, link_between
from .plan import Wanted
from .rank_sizes import Memory, Piece, Sizes
from .shares import level, level_by
from .slicing import ANYWHERE, Grains, divide
from .spec import BlockId, LayerSpec
from .sum_cost import Means, Network, Topology, Wire

TOLERANCE = 1.05  # times what anything may take with one machine more
EXACT_MACHINES = 6
_REPAIRS = 4  # times shares are changed because a part does not fit
_GRAIN = 1000  # shares are whole numbers of about this sum

Split = Literal["tensor", "pipeline"]
Places = tuple[int, ...]  # of machines, ascending: those of ranks 0, 1, …


class RankPlan(NamedTuple):
    """What one rank gets. `share` is that of the weights that are cut, as it came out; `layers` those of a pipeline."""

    machine: str
    place: int  # of the machine
    share: float
    needed_bytes: int  # of its memory
    streamed_bytes: int  # from its disk in every step, and …
    missing_experts: float  # … the share of its experts that come from there when they are chosen
    layers: tuple[int, int] | None = None


class Unused(NamedTuple):
    """A machine that is not used, and what a group with it would do; None if there is no such group, and why."""

    machine: str
    link: LinkSpeed | None  # to the head
    with_it: Figures | None
    ranks_with_it: int
    why_not: str = ""


class Choice(NamedTuple):
    """A group, and why it is this one. `shares` are what `divide` gets; () where it would be one rank, or a pipeline.
    `alone`: what the head would do by itself, `freely`: what would have been chosen if no number had been asked for;
    None if that cannot be."""

    split: Split
    ranks: tuple[RankPlan, ...]
    shares: tuple[float, ...]
    figures: Figures
    prompts: tuple[int, ...]  # tokens of the prompts in `figures.first_token_s`
    machines: int  # that there were
    unused: tuple[Unused, ...] = ()
    alone: Figures | None = None
    freely: Figures | None = None
    freely_ranks: int = 0


class NoGroup(NamedTuple):
    """No group of these machines can run the model. `needed_bytes` of memory would do for one machine alone, the
    machines have `memory_bytes` together."""

    why: str
    needed_bytes: int
    memory_bytes: int


class _Found(NamedTuple):
    places: Places
    split: Split
    shares: tuple[float, ...]
    parts: tuple[Part, ...]
    figures: Figures
    layers: tuple[tuple[int, int], ...] = ()

    @property
    def rank(self) -> tuple[float, int]:
        """The less the better: the time of a usual request, then the number of machines."""
        return self.figures.total_s, len(self.places)


def choose(
    wanted: Wanted,
    block_bytes: Mapping[BlockId, int],
    machines: Sequence[Machine],
    links: Links,
    workload: Workload = Workload(),  # noqa: B008 it is frozen
    *,
    grains: Grains = ANYWHERE,
    splits: Collection[Split] = ("tensor",),
    topologies: Collection[Topology] = ("star",),
    wires: Sequence[Wire] = ("f32", "bf16", "int8"),
    ranks: int | None = None,
) -> Choice | NoGroup:
    """The group for a model. `machines[0]` is the head. `block_bytes`: of all blocks, the head of the vocabulary in
    slices if weights may stream (`plan_streamed`'s extents). `splits`, `topologies`, `wires`: what there is; of wires
    that are equally fast the first is taken. `ranks`: somebody insists on so many.

    Raises MachineError for figures that cannot be true.
    """
    check_machines(machines, links)
    means = [Means(topology, wire) for topology in sorted(topologies) for wire in wires]
    search = _Search(
        wanted, Sizes.of(wanted.spec, block_bytes), machines, links, workload, grains, splits, means
    )
    free = search.freely()
    found = free if ranks is None else search.of_size(ranks)
    if found is None:
        return search.nothing(ranks)
    alone = search.best((0,))
    return Choice(
        split=found.split,
        ranks=tuple(search.rank_plans(found)),
        shares=found.shares,
        figures=found.figures,
        prompts=search.cost.prompts,
        machines=len(machines),
        unused=tuple(search.unused(found)) if ranks is None else (),
        alone=alone and alone.figures,
        freely=free.figures if free and ranks is not None else None,
        freely_ranks=len(free.places) if free and ranks is not None else 0,
    )


class _Search:
    """All groups of some machines for one model. Remembers what it has worked out."""

    def __init__(
        self,
        wanted: Wanted,
        sizes: Sizes,
        machines: Sequence[Machine],
        links: Links,
        workload: Workload,
        grains: Grains,
        splits: Collection[Split],
        means: Sequence[Means],
    ) -> None:
        self.cost = Cost(wanted, sizes, workload)
        self._wanted, self._sizes, self._grains = wanted, sizes, grains
        self._machines, self._links = machines, links
        self._splits, self._means = splits, means
        self._memory = Memory(wanted, sizes)
        self._found: dict[Places, _Found | None] = {}
        self._pieces: dict[tuple[float, ...], list[Piece] | str] = {}
        self.refused: dict[int, str] = {}  # why a model cannot be cut for so many ranks

    # --- which groups ---------------------------------------------------------------------------------------

    def freely(self) -> _Found | None:
        """The best group, by the rules of this module."""
        best = self.best((0,))
        floor = best.figures if best else None
        for newest in range(1, len(self._machines)):
            for places in self._by_promise(self._groups_with(newest, best), best, floor):
                found = self.best(places)
                if found is None or (floor and not found.figures.within(floor, TOLERANCE)):
                    continue
                if best is None or found.rank < best.rank:
                    best = found
            if best:
                floor = best.figures.best_of(floor) if floor else best.figures
        return best

    def of_size(self, ranks: int) -> _Found | None:
        """The best group of so many machines. Of many machines, those are tried that go best with the head."""
        others = range(1, len(self._machines))
        if not 1 <= ranks <= len(self._machines):
            return None
        if len(self._machines) > EXACT_MACHINES:
            others = sorted(others, key=lambda place: self._promise((0, place)))[
                : max(ranks, EXACT_MACHINES) - 1
            ]
            others = sorted(others)
        best = None
        for places in self._by_promise(((0, *rest) for rest in combinations(others, ranks - 1)), None, None):
            if best is not None and self._promise(places) >= best.figures.total_s:
                break
            found = self.best(places)
            if found and (best is None or found.rank < best.rank):
                best = found
        return best

    def _groups_with(self, newest: int, best: _Found | None) -> Iterator[Places]:
        """Groups of the head, this machine and machines before it."""
        if len(self._machines) <= EXACT_MACHINES:
            for count in range(newest):
                for between in combinations(range(1, newest), count):
                    yield (0, *between, newest)
            return
        if best is None:
            yield tuple(range(newest + 1))
            yield 0, newest
            return
        yield (*best.places, newest)
        if len(best.places) > 1:
            yield 0, newest
        for left in best.places[1:]:
            yield (*(place for place in best.places if place != left), newest)

    def _by_promise(
        self, groups: Iterator[Places], best: _Found | None, floor: Figures | None
    ) -> Iterator[Places]:
        """Those groups that may be better than the best one, the most promising first."""
        promising = []
        for places in dict.fromkeys(groups):
            figures = self._bound(places)
            if figures is None or (floor and not figures.within(floor, TOLERANCE)):
                continue
            if best is None or figures.total_s < best.figures.total_s:
                promising.append((figures.total_s, places))
        yield from (places for _, places in sorted(promising))

    def _promise(self, places: Places) -> float:
        """What a usual request takes at least."""
        figures = self._bound(places)
        return figures.total_s if figures else float("inf")

    def _bound(self, places: Places) -> Figures | None:
        network = Network(self._machines, self._links, places)
        if not network.reached:
            return None
        return self.cost.bound([self._machines[place] for place in places], network, self._means)

    # --- one group ------------------------------------------------------------------------------------------

    def best(self, places: Places) -> _Found | None:
        """The best way for these machines to run the model; None if there is none."""
        if places not in self._found:
            tried = list(self._ways(places))
            self._found[places] = min(tried, key=lambda found: found.figures.total_s, default=None)
        return self._found[places]

    def _ways(self, places: Places) -> Iterator[_Found]:
        network = Network(self._machines, self._links, places)
        if not network.reached:
            return
        machines = [self._machines[place] for place in places]
        if len(places) == 1 or "tensor" in self._splits:
            for shares, parts in self._divided(machines):
                figures = self.cost.tensor(parts, network, self._means)
                yield _Found(places, "tensor", shares if len(places) > 1 else (), parts, figures)
        if len(places) > 1 and "pipeline" in self._splits:
            for layers, parts in self._layered(machines):
                piped = self.cost.pipeline(parts, network)
                if piped:
                    yield _Found(places, "pipeline", (), parts, piped, layers)

    def _divided(self, machines: Sequence[Machine]) -> Iterator[tuple[tuple[float, ...], tuple[Part, ...]]]:
        tried = set()
        for shares in self._wishes(machines):
            for _ in range(_REPAIRS):
                whole = _rounded(shares)
                if whole in tried:
                    break
                tried.add(whole)
                pieces = self._pieces_of(whole)
                if isinstance(pieces, str):
                    break
                parts, over = self._parts(machines, pieces)
                if parts:
                    yield whole, parts
                if not over:
                    break
                shares = [share * factor for share, factor in zip(shares, over, strict=True)]

    def _parts(
        self, machines: Sequence[Machine], pieces: Sequence[Piece]
    ) -> tuple[tuple[Part, ...], list[float]]:
        """(the ranks, or none if one does not fit; what to multiply shares by for a better fit, or none)"""
        parts, over = [], [1.0] * len(machines)
        for rank, (machine, piece) in enumerate(zip(machines, pieces, strict=True)):
            held = self._memory.held(piece, machine)
            if isinstance(held, int):
                over[rank] = 0.95 * machine.memory_bytes / max(held, 1)
            else:
                parts.append(Part(machine, piece, held))
        if len(parts) < len(machines):
            return (), over if len(machines) > 1 and min(over) > 0 else []
        return tuple(parts), []

    def _wishes(self, machines: Sequence[Machine]) -> Iterator[Sequence[float]]:
        """Shares that make decoding level, that make prompts level, and some between."""
        share_bytes = self._memory.share_bytes()
        most = []
        for rank, machine in enumerate(machines):
            room = machine.memory_bytes - self._memory.fixed_bytes(machine, rank == 0)
            most.append(min(1.0, max(0.0, room / share_bytes)))
        by_memory = [1 / machine.memory_bytes_per_s for machine in machines]
        by_flops = [1 / machine.flops for machine in machines]
        between = [(one * other) ** 0.5 for one, other in zip(by_memory, by_flops, strict=True)]
        fitting = [level(costs, most) for costs in (by_memory, by_flops, between)]
        yield from (shares for shares in fitting if shares)
        if not fitting[0] or any(machine.disk_bytes_per_s for machine in machines):
            weights = self._sizes.cut
            streaming = level_by(
                [_share_within(machine, part, weights) for machine, part in zip(machines, most, strict=True)]
            )
            if streaming:
                yield streaming

    def _pieces_of(self, shares: tuple[float, ...]) -> list[Piece] | str:
        """What each rank has with these shares, or why there is no such division."""
        if shares not in self._pieces:
            self._pieces[shares] = self._cut(shares)
        return self._pieces[shares]

    def _cut(self, shares: tuple[float, ...]) -> list[Piece] | str:
        spec, ranks = self._wanted.spec, len(shares)
        if ranks == 1:
            return [Piece.even(spec, 1.0)]
        try:
            shards = divide(spec, ranks, self._grains, shares)
            columns = [1.0 / ranks] * ranks
            if spec.moe:  # experts in memory are cut like an FFN of their size
                like = replace(spec, ffn=spec.moe.ffn, moe=None, layers=(LayerSpec(),))
                columns = [it.ranges.ffn.size / like.ffn for it in divide(like, ranks, self._grains, shares)]
        except ShardError as error:
            self.refused[ranks] = str(error)
            return str(error)
        return [Piece.of_shard(spec, shard, part) for shard, part in zip(shards, columns, strict=True)]

    def _layered(
        self, machines: Sequence[Machine]
    ) -> Iterator[tuple[tuple[tuple[int, int], ...], tuple[Part, ...]]]:
        """Layers in the order of ranks: as many on the fastest as fit there, or as long prompts take equally long."""
        spec = self._wanted.spec
        layers, share_bytes = len(spec.layers), self._memory.share_bytes()
        if layers < len(machines):
            return
        most = []
        for rank, machine in enumerate(machines):
            room = machine.memory_bytes - self._memory.fixed_bytes(machine, rank == 0)
            most.append(min(layers - len(machines) + 1, int(room / share_bytes * layers)))
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
            pieces = [Piece.of_layers(spec, *own, rank == 0) for rank, own in enumerate(bounds)]
            parts, _ = self._parts(machines, pieces)
            if parts:
                yield bounds, parts

    # --- what is said ---------------------------------------------------------------------------------------

    def rank_plans(self, found: _Found) -> Iterator[RankPlan]:
        weighed = [self._sizes.attn_of(it.piece) + self._sizes.ffn_of(it.piece) for it in found.parts]
        experts = any(part.held.missing_experts for part in found.parts)
        for rank, part in enumerate(found.parts):
            weighed[rank] += self._sizes.experts * (
                part.piece.experts if experts else part.piece.expert_columns
            )
        for rank, (place, part) in enumerate(zip(found.places, found.parts, strict=True)):
            held = part.held
            yield RankPlan(
                part.machine.name,
                place,
                weighed[rank] / sum(weighed),
                held.needed_bytes,
                held.streamed_bytes,
                held.missing_experts,
                found.layers[rank] if found.layers else None,
            )

    def unused(self, chosen: _Found) -> Iterator[Unused]:
        """Every machine that is not used, with the best group of the chosen ones and it."""
        for place, machine in enumerate(self._machines):
            if place in chosen.places:
                continue
            places = tuple(sorted((*chosen.places, place)))
            link = link_between(self._links, 0, place)
            found = self.best(places)
            why = "" if found else self._why_not(places)
            yield Unused(machine.name, link, found and found.figures, len(places), why)

    def nothing(self, ranks: int | None) -> NoGroup:
        memory = sum(machine.memory_bytes for machine in self._machines)
        everybody = tuple(range(len(self._machines)))
        if ranks is None:
            why = self._why_not(everybody)
        elif not 1 <= ranks <= len(self._machines):
            why = f"{ranks} ranks: there are {len(self._machines)} machines, the head and those that joined"
        else:
            why = self._why_not(everybody[:ranks])
        return NoGroup(why, self._memory.whole_bytes(), memory)

    def _why_not(self, places: Places) -> str:
        """Why these machines together can do nothing."""
        if not Network(self._machines, self._links, places).reached:
            return "the head cannot reach it"
        self._pieces_of((1,) * len(places))
        if len(places) in self.refused:
            return self.refused[len(places)]
        return "it does not fit into the memory of these machines"


def _share_within(machine: Machine, in_memory: float, cut_bytes: int) -> Callable[[float], float]:
    """The largest share of what is cut that a machine gets through in a time. `in_memory`: the most that it can have
    there. Where it streams, about half of its memory goes to other things."""

    def within(seconds: float) -> float:
        streamed = (
            (in_memory / 2 + seconds * machine.disk_bytes_per_s / cut_bytes)
            if machine.disk_bytes_per_s
            else 0.0
        )
        return min(1.0, seconds * machine.memory_bytes_per_s / cut_bytes, max(in_memory, streamed))

    return within


def _rounded(shares: Sequence[float]) -> tuple[float, ...]:
    """Shares as whole numbers, so that nearly equal ones are equal and dividing by them is quick."""
    whole = sum(shares)
    return tuple(max(1, round(_GRAIN * share / whole)) for share in shares)
