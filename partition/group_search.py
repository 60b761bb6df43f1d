"""Finds which machines should run a model together, what each of them has of it, and how they add their sums.

The head may run it alone. Further machines are looked at in the order in which they joined; each is taken, perhaps
instead of others, if usual requests get faster by what it is `WORTH` and nothing costs more than `TOLERANCE`: neither a
token of an answer nor the first token of a prompt, against anything that was chosen without it. So another machine
never makes anything slower by more than that. Of the first `EXACT_MACHINES` all groups are compared; with each that
joins later, only those near the last choice.

What was used before is taken again while it costs no more than `STEADY` times the best: another cut means that weights
are sent again.

Pure, and deterministic: the same figures give the same choice. `group_cost` predicts, `group_choice` says why.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from itertools import combinations
from math import inf
from types import MappingProxyType
from typing import NamedTuple

from .group_choice import Choice, KeptCut, KeptCuts, NoGroup, Places, RankPlan, Split, Unused
from .group_cost import Cost, Figures, Placement
from .group_cuts import Cuts
from .machines import Links, Machine, Workload, check_machines, link_between
from .plan import Wanted
from .rank_sizes import Held, Memory, Sizes
from .slicing import ANYWHERE, Grains
from .spec import BlockId
from .sum_cost import Means, Network, Topology, Wire

WORTH = 0.97  # of the time of a usual request is left, at most, where a group takes more machines
TOLERANCE = 1.05  # times what anything may take with one machine more
EXACT_MACHINES = 6
STEADY = 1.1  # times the best a usual request may take with a cut that is kept
LEAST_ERROR, MOST_ERROR = 0.5, 8.0  # times as long as predicted: what others are thought to take then
_FEW = 2  # groups that are looked at closely with each machine after these

# What exists already. The rest can be predicted.
AVAILABLE_SPLITS: tuple[Split, ...] = ("tensor", "prompts")
AVAILABLE_TOPOLOGIES: tuple[Topology, ...] = ("exchange", "sliced", "star")
AVAILABLE_WIRES: tuple[Wire, ...] = ("f32", "bf16", "int8")


class _Found(NamedTuple):
    places: Places
    split: Split
    shares: tuple[float, ...]
    parts: tuple[Placement, ...]
    figures: Figures
    layers: tuple[tuple[int, int], ...] = ()


def _is_better(total_s: float, places: Places, best: _Found) -> bool:
    """Whether to take these machines if a usual request takes so long with them."""
    worth = WORTH if len(places) > len(best.places) else 1.0
    return total_s < worth * best.figures.total_s


def choose(
    wanted: Wanted,
    block_bytes: Mapping[BlockId, int],
    machines: Sequence[Machine],
    links: Links,
    workload: Workload = Workload(),  # noqa: B008 it is frozen
    *,
    grains: Grains = ANYWHERE,
    splits: Collection[Split] = AVAILABLE_SPLITS,
    topologies: Collection[Topology] = AVAILABLE_TOPOLOGIES,
    wires: Sequence[Wire] = AVAILABLE_WIRES,
    may_cut_vocabulary: bool = True,
    ranks: int | None = None,
    kept: KeptCuts = KeptCuts(),  # noqa: B008 it is frozen
    measured: Mapping[Places, float] = MappingProxyType({}),
    compared: bool = True,
) -> Choice | NoGroup:
    """The group for a model. `machines[0]` is the head. `block_bytes`: of all blocks, the head of the vocabulary in
    slices if weights may stream (`plan_streamed`'s extents). `splits`, `topologies`, `wires`: what may be used; the
    fastest is, whatever a wire rounds away, and of equally fast wires the first. `may_cut_vocabulary`: embedding and
    head, where that helps (`Fit.wants`). `ranks`: somebody insists on so many, which then compute everything together.
    `kept`: what is taken again if it is nearly as good. `measured`: seconds that a token took with some machines; what
    is predicted for them, and for groups which they are part of, is corrected by that. `compared`: whether to find out
    what would have been chosen without `ranks`.

    A worker whose figures cannot be true is not used. Raises MachineError if it is the head.
    """
    wrong = check_machines(machines)
    means = [Means(topology, wire) for topology in sorted(topologies) for wire in wires]
    search = _Search(
        wanted,
        Sizes.of(wanted.spec, block_bytes),
        machines,
        links,
        workload,
        grains,
        splits,
        means,
        wrong,
        measured,
        may_cut_vocabulary,
    )
    free = search.freely() if ranks is None or compared else None
    found = free if ranks is None else search.of_size(ranks)
    if found is None:
        return search.nothing(ranks)
    alone = search.best((0,))
    found = search.steady(found, kept, alone, ranks)
    return Choice(
        split=found.split,
        ranks=tuple(search.rank_plans(found)),
        shares=found.shares,
        experts="whole" if found.parts[0].portion.whole_experts else "columns",
        cuts_vocabulary=found.parts[0].portion.cuts_vocabulary,
        figures=found.figures,
        prompts=search.cost.prompts,
        machines=len(machines),
        unused=tuple(search.unused(found)) if ranks is None else (),
        alone=alone and alone.figures,
        freely=free.figures if free and ranks is not None else None,
        freely_ranks=len(free.places) if free and ranks is not None else 0,
        measured=bool(measured),
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
        wrong: Mapping[int, str],
        measured: Mapping[Places, float],
        may_cut_vocabulary: bool,
    ) -> None:
        self.cost = Cost(wanted, sizes, workload)
        self._machines, self._links, self._sizes = machines, links, sizes
        self._splits, self._means = splits, means
        self._answer_tokens = workload.answer_tokens
        self._wrong = wrong  # machines that are not to be used, and why
        self._memory = Memory(wanted, sizes)
        self._cuts = Cuts(wanted, sizes, self._memory, grains, may_cut_vocabulary=may_cut_vocabulary)
        self._found: dict[Places, list[_Found]] = {}
        self._errors = {places: self._error(places, token_s) for places, token_s in measured.items()}

    # --- which groups ---------------------------------------------------------------------------------------

    def freely(self) -> _Found | None:
        """The best group, by the rules of this module."""
        best = self.best((0,))
        floor = best.figures if best else None
        for newest in range(1, len(self._machines)):
            groups = self._by_promise(self._groups_with(newest, best), floor)
            for total_s, places in groups if newest < EXACT_MACHINES else groups[:_FEW]:
                if best and not _is_better(total_s, places, best):
                    continue
                for found in (*self._ways(places), *self._for_prompts(places)):
                    if floor and not found.figures.within(floor, TOLERANCE):
                        continue
                    if best is None or _is_better(found.figures.total_s, places, best):
                        best = found
            if best:
                floor = best.figures.best_of(floor) if floor else best.figures
        return best

    def of_size(self, ranks: int) -> _Found | None:
        """The best group of so many machines. Of many machines, those are tried that go best with the head, and those
        with most memory."""
        others = list(range(1, len(self._machines)))
        if not 1 <= ranks <= len(self._machines):
            return None
        if len(self._machines) <= EXACT_MACHINES:
            groups = [(0, *rest) for rest in combinations(others, ranks - 1)]
        else:
            quick = sorted(others, key=lambda place: self._promise((0, place)))
            roomy = sorted(others, key=lambda place: -self._machines[place].memory_bytes)
            groups = [(0, *sorted(best_first[: ranks - 1])) for best_first in (quick, roomy)]
        best = None
        for total_s, places in self._by_promise(groups, None):
            if best and total_s >= best.figures.total_s:
                break
            found = self.best(places)
            if found and (best is None or found.figures.total_s < best.figures.total_s):
                best = found
        return best

    def _groups_with(self, newest: int, best: _Found | None) -> Iterator[Places]:
        """Groups of the head, this machine and machines before it."""
        if newest < EXACT_MACHINES:
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

    def _by_promise(self, groups: Iterable[Places], floor: Figures | None) -> list[tuple[float, Places]]:
        """The groups that may keep within the floor, with what a usual request takes at least, the shortest first."""
        promising = []
        for places in dict.fromkeys(groups):
            total_s = self._promise(places, floor)
            if total_s < inf:
                promising.append((total_s, places))
        return sorted(promising)

    def _promise(self, places: Places, floor: Figures | None = None) -> float:
        """What a usual request takes at least with these machines, if nothing takes too long against the floor."""
        network, means = self._network(places)
        machines = [self._machines[place] for place in places]
        bounds: list[Figures] = []
        may_cut = self._cuts.may_cut_vocabulary
        if not self._memory.may_hold(machines, may_cut_vocabulary=may_cut):
            return inf
        if "tensor" in self._splits and means:
            bounds.append(self.cost.bound(machines, network, means, cut_vocabulary=may_cut))
        if "pipeline" in self._splits and network.reached:
            bounds.append(self.cost.bound(machines, network, (), layered=True))
        bounds = [self._corrected(places, bound) for bound in bounds]
        if bounds and "prompts" in self._splits and (alone := self.best((0,))):
            bounds.append(bounds[0].answered(alone.figures.token_s, self._answer_tokens))
        kept = (bound.total_s for bound in bounds if floor is None or bound.within(floor, TOLERANCE))
        return min(kept, default=inf)

    def steady(self, found: _Found, kept: KeptCuts, alone: _Found | None, ranks: int | None) -> _Found:
        """What is kept of the last group, or of the one that was found, if it is nearly as good as that, and may be
        used at all."""
        splits = ("tensor",) if ranks else AVAILABLE_SPLITS
        for places in (kept.last, found.places):
            cut = kept.by_places.get(places) if places is not None else None
            if (
                places is None
                or cut is None
                or ranks not in (None, len(places))
                or cut.split not in splits
                or {*places} & {*self._wrong}
            ):
                continue
            again = self._again(places, cut)
            if again is None or again.figures.total_s > STEADY * found.figures.total_s:
                continue
            if places == found.places or alone is None or again.figures.within(alone.figures, TOLERANCE):
                return again
        return found

    # --- one group ------------------------------------------------------------------------------------------

    def best(self, places: Places) -> _Found | None:
        """The best way for these machines to run the model; None if there is none."""
        return min(self._ways(places), key=lambda found: found.figures.total_s, default=None)

    def _ways(self, places: Places) -> list[_Found]:
        """All ways that were tried for these machines to run the model."""
        if places not in self._found:
            ways = self._predicted(places)
            self._found[places] = [it._replace(figures=self._corrected(places, it.figures)) for it in ways]
        return self._found[places]

    def _again(self, places: Places, cut: KeptCut) -> _Found | None:
        """A group with a cut that it had before; None if that cannot be any more."""
        network, means = self._network(places)
        if cut.split not in self._splits or not means:
            return None
        machines = [self._machines[place] for place in places]
        if cut.split == "prompts":
            beside = self._memory.beside(machines)
            parts = self._cuts.as_before(beside, cut.shares, cut.experts, beside=True)
            return self._assisted(places, cut.shares, parts)
        parts = self._cuts.as_before(machines, cut.shares, cut.experts)
        if not parts:
            return None
        figures = self._corrected(places, self.cost.tensor(parts, network, means))
        return _Found(places, "tensor", cut.shares, parts, figures)

    def _for_prompts(self, places: Places) -> list[_Found]:
        """All ways that were tried for these machines to read prompts, while the head decodes answers alone."""
        if "prompts" not in self._splits or len(places) == 1:
            return []
        machines = self._memory.beside([self._machines[place] for place in places])
        exact = places[-1] < EXACT_MACHINES
        tried = self._cuts.divided(machines, all_wishes=exact, beside=True) if machines else ()
        return [found for each in tried if (found := self._assisted(places, *each)) is not None]

    def _assisted(
        self, places: Places, shares: tuple[float, ...], parts: tuple[Placement, ...]
    ) -> _Found | None:
        """None if that cannot be, or never pays. Its answers are corrected as those of the head alone are. A group that
        was slower than predicted at answers is thought to be so at prompts."""
        network, means = self._network(places)
        alone = self.best((0,))
        if alone is None or not parts or not means:
            return None
        error = max(1.0, self._known_error(places))
        figures = self.cost.assisted(alone.parts, alone.figures, parts, network, means, error)
        return figures and _Found(places, "prompts", shares, parts, figures)

    def _predicted(self, places: Places) -> list[_Found]:
        divided = list(self._tensor(places))
        quickest_s = min((found.figures.total_s for found in divided), default=inf)
        return [*divided, *self._pipeline(places, quickest_s)]

    def _error(self, places: Places, token_s: float) -> float:
        """How many times as long as predicted a token took with these machines."""
        predicted_s = min((found.figures.token_s for found in self._predicted(places)), default=token_s)
        return token_s / predicted_s

    def _corrected(self, places: Places, figures: Figures) -> Figures:
        return figures.slower(self._known_error(places), self._answer_tokens)

    def _known_error(self, places: Places) -> float:
        """What is known of these machines; else the worst that is known of some of them."""
        if (error := self._errors.get(places)) is not None:
            return error
        worst = max((it for part, it in self._errors.items() if set(part) <= set(places)), default=1.0)
        return max(LEAST_ERROR, min(MOST_ERROR, worst))

    def _tensor(self, places: Places) -> Iterator[_Found]:
        network, means = self._network(places)
        alone = len(places) == 1
        if alone or ("tensor" in self._splits and means):
            machines = [self._machines[place] for place in places]
            for shares, parts in self._cuts.divided(machines, all_wishes=places[-1] < EXACT_MACHINES):
                figures = self.cost.tensor(parts, network, means)
                yield _Found(places, "tensor", () if alone else shares, parts, figures)

    def _pipeline(self, places: Places, quickest_s: float) -> Iterator[_Found]:
        """Only if it may be quicker than that."""
        network, _ = self._network(places)
        if len(places) == 1 or "pipeline" not in self._splits or not network.reached:
            return
        machines = [self._machines[place] for place in places]
        if self.cost.bound(machines, network, (), layered=True).total_s >= quickest_s:
            return
        for layers, parts in self._cuts.layered(machines):
            if figures := self.cost.pipeline(parts, network):
                yield _Found(places, "pipeline", (), parts, figures, layers)

    def _network(self, places: Places) -> tuple[Network, list[Means]]:
        """The links among these machines, and how they can make sums."""
        links = {} if self._wrong.keys() & places else self._links
        network = Network(self._machines, links, places)
        return network, [it for it in self._means if network.reached and network.can(it.topology)]

    # --- what is said ---------------------------------------------------------------------------------------

    def rank_plans(self, found: _Found) -> Iterator[RankPlan]:
        bytes_of = [self._sizes.held_of(part.portion) for part in found.parts]
        for rank, (machine, portion, held) in enumerate(found.parts):
            exact = self._memory.held(portion, machine, exact=True)
            other_bytes = self._machines[found.places[rank]].memory_bytes - machine.memory_bytes
            yield RankPlan(
                machine.name,
                found.places[rank],
                bytes_of[rank] / sum(bytes_of),
                other_bytes + (exact.needed_bytes if isinstance(exact, Held) else held.needed_bytes),
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
            ways = [*self._ways(places), *(self._for_prompts(places) if chosen.split == "prompts" else ())]
            found = min(ways, key=lambda way: way.figures.total_s, default=None)
            why = "" if found else self._why_not(places)
            yield Unused(machine.name, link, found and found.figures, len(places), why)

    def nothing(self, ranks: int | None) -> NoGroup:
        there = len(self._machines)
        if ranks is not None and not 1 <= ranks <= there:
            why = f"`ranks={ranks}` was asked for: must be from 1 to {there}, the number of machines"
        else:
            why = self._why_not(tuple(range(ranks or there)))
        return NoGroup(why, self._memory.whole_bytes(), sum(it.memory_bytes for it in self._machines))

    def _why_not(self, places: Places) -> str:
        """Why these machines together can do nothing."""
        for place in self._wrong.keys() & places:
            return self._wrong[place]
        if not Network(self._machines, self._links, places).reached:
            return "the head does not reach it"
        return self._cuts.why_not([self._machines[place] for place in places])
