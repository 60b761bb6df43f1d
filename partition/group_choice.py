"""What was chosen for a model, and why, as data and in words. `group_search` chooses."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, NamedTuple

from .amounts import counted
from .group_cost import Figures
from .machines import LinkSpeed
from .slicing import CutOfExperts

Split = Literal["tensor", "pipeline", "prompts"]
"""Every layer divided; or the layers among the machines; or every layer divided for prompts, while the head, which has
all of it besides its part, decodes answers alone."""

Places = tuple[int, ...]  # of machines, ascending: those of ranks 0, 1, …

_SAID = 3  # machines that are named in one line
_NUMBERS = {2: "two", 3: "three", 4: "four", 5: "five", 6: "six"}


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

    def describe(self, chosen: Figures, prompts: tuple[int, ...]) -> str:
        """Why it is not used beside what was chosen."""
        name = self.machine
        if self.link:
            trip = f"{_milliseconds(2 * self.link.latency_s)}"
            name += f" ({self.link.kind}, {trip})" if self.link.kind else f" ({trip})"
        if self.with_it is None:
            return f"{name} cannot be used: {self.why_not}"
        loss = _loss(chosen, self.with_it, prompts)
        if loss is None:
            return f"{name} would add nothing"
        if loss.prompt_tokens:
            of = f"the first token of a prompt of {loss.prompt_tokens:,}"
            return f"{name} would delay {of} from {_seconds(loss.now)} to {_seconds(loss.then)}"
        return f"{name} would cut {_rate(loss.now)} → {_rate(loss.then)} tokens/s"


class Choice(NamedTuple):
    """A group, and why it is this one. `shares`, `experts` and `cuts_vocabulary` are what `divide` gets; () for one
    rank or a pipeline.
    `alone`: what the head would do by itself, `freely`: what would have been chosen if no number had been asked for;
    None if that cannot be. `measured`: whether what came out before has corrected what is predicted."""

    split: Split
    ranks: tuple[RankPlan, ...]
    shares: tuple[float, ...]
    experts: CutOfExperts
    figures: Figures
    prompts: tuple[int, ...]  # tokens of the prompts in `figures.first_token_s`
    machines: int  # that there were
    unused: tuple[Unused, ...] = ()
    alone: Figures | None = None
    freely: Figures | None = None
    freely_ranks: int = 0
    cuts_vocabulary: bool = False
    measured: bool = False

    def describe(self) -> str:
        """One line for people."""
        return self._said() + " (corrected by what was measured)" * self.measured

    def _said(self) -> str:
        if self.freely:
            return self._as_asked(self.freely)
        ranks = len(self.ranks)
        if ranks == 1:
            return self._alone()
        every = ("both" if ranks == 2 else f"all {ranks}") if ranks == self.machines else ""
        if self.split == "prompts":
            return self._for_prompts(every or f"{ranks} of {self.machines}")
        layers = ", with layers divided among them" if self.split == "pipeline" else ""
        if every:
            return f"using {every} machines{layers}: {_speed(self.figures)}{self._otherwise()}"
        return f"using {ranks} of {self.machines} machines{layers}: {self._others() or _speed(self.figures)}"

    def _for_prompts(self, which: str) -> str:
        said = f"prompts by {which} machines, answers by this one alone"
        now_s, alone_s = (each.first_token_s[0] if each else 0.0 for each in (self.figures, self.alone))
        first = f"the first token of a prompt of {self.prompts[0]:,} after {_seconds(now_s)}"
        return f"{said}: {first} instead of {_seconds(alone_s)}, {_speed(self.figures)}"

    def _alone(self) -> str:
        tried = [unused for unused in self.unused if unused.with_it]
        if not tried:
            return f"alone: {self._others() or _speed(self.figures)}"
        best = min(tried, key=lambda unused: unused.with_it.total_s if unused.with_it else 0.0)
        assert best.with_it
        number = _NUMBERS.get(best.ranks_with_it, str(best.ranks_with_it))
        loss = _loss(self.figures, best.with_it, self.prompts)
        if loss is None:
            return f"alone: {number} machines would be no faster ({_speed(best.with_it)})"
        if loss.prompt_tokens:
            shorter, longer = _seconds(loss.now), _seconds(loss.then)
            of = f"the first token of a prompt of {loss.prompt_tokens:,}"
            return f"alone: with {number} machines, {of} would come later ({longer} against {shorter})"
        return f"alone: {number} machines would be slower ({_rate(loss.then)} against {_rate(loss.now)} tokens/s)"

    def _others(self) -> str:
        """Why others are not used, for a few of them."""
        said = [unused.describe(self.figures, self.prompts) for unused in self.unused[:_SAID]]
        if (more := len(self.unused) - len(said)) > 0:
            said.append(f"{more} more would not help either")
        return "; ".join(said)

    def _otherwise(self) -> str:
        return f", alone {_rate(self.alone.token_s)}" if self.alone else ", alone it would not fit"

    def _as_asked(self, freely: Figures) -> str:
        said = f"using {counted(len(self.ranks), 'machine')} because a number was asked for: {_speed(self.figures)}"
        if self.freely_ranks == len(self.ranks):
            return said
        other = "alone" if self.freely_ranks == 1 else f"with {self.freely_ranks}"
        if _rate(freely.token_s) != _rate(self.figures.token_s):
            return f"{said}, {other} {_rate(freely.token_s)}"
        loss = _loss(freely, self.figures, self.prompts)
        if loss is None or not loss.prompt_tokens:
            return said
        first = f"the first token of a prompt of {loss.prompt_tokens:,} after {_seconds(loss.then)}"
        return f"{said}, {first}, {other} {_seconds(loss.now)}"


class KeptCut(NamedTuple):
    """What `divide` was given for a group, and what for."""

    shares: tuple[float, ...]
    experts: CutOfExperts
    split: Split = "tensor"


class KeptCuts(NamedTuple):
    """Cuts that were used before, by the places of machines. `last`: what was used when these same machines were there;
    None if they were not."""

    by_places: Mapping[Places, KeptCut] = {}
    last: Places | None = None


class NoGroup(NamedTuple):
    """No group of these machines can run the model. `needed_bytes` of memory would do for one machine alone, the
    machines have `memory_bytes` together."""

    why: str
    needed_bytes: int
    memory_bytes: int

    def describe(self) -> str:
        """One line for people."""
        return f"no group of these machines can run it: {self.why}"


class _Loss(NamedTuple):
    """What would take longer, by most: from `now` to `then` seconds. `prompt_tokens`: of the prompt whose first token
    it is; 0: a token of an answer."""

    now: float
    then: float
    prompt_tokens: int = 0


def _loss(now: Figures, then: Figures, prompts: tuple[int, ...]) -> _Loss | None:
    """Tokens of an answer come first if they lose at all noticeably."""
    if then.token_s > 1.01 * now.token_s:
        return _Loss(now.token_s, then.token_s)
    each = map(_Loss, now.first_token_s, then.first_token_s, prompts)
    worst = max(each, key=lambda loss: loss.then / loss.now)
    if worst.then > 1.01 * worst.now:
        return worst
    return None


def _rate(token_s: float) -> str:
    return f"{1 / token_s:.1f}" if token_s < 1 else f"{1 / token_s:.2g}"


def _speed(figures: Figures) -> str:
    return f"{_rate(figures.token_s)} tokens/s"


def _seconds(seconds: float) -> str:
    return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"


def _milliseconds(seconds: float) -> str:
    return f"{1000 * seconds:.2g} ms" if seconds < 0.1 else f"{1000 * seconds:.0f} ms"
