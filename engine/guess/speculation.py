"""Speculation: how many tokens to guess ahead, for each sequence of a step.

A step that also carries guessed tokens yields as many tokens as the guess was right for, plus one; a row's result
does not depend on what else is in the step, so the tokens are those of one step each. What it costs is the rows.
The depth that maximises expected tokens per second (goodput; SmartSpec, Liu et al. 2024, arXiv 2406.14066) follows from
how often guesses of a grade were right before and from the measured cost of steps; where nothing pays it is 0. Every
guess is scored against what was sampled, also those that were not sent: learning costs nothing.

Pure: knows token ids, counts and seconds handed in. Does not know models, requests or clocks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from collections.abc import Sequence as Ordered
from itertools import accumulate, takewhile
from operator import mul

from shoal.engine.learn.step_cost import StepCost

from .draft import Draft
from .lookup import PromptLookup

DEPTH = 32  # tokens guessed ahead of one sequence, at most
_DECAY = 0.95  # per observation of a grade: the last twenty or so count
_PRIOR_WEIGHT = 3.0  # observations that the prior stands for
_HOPELESS = 0.02  # chance at which a draft is cut off
_MODEL_PRIOR = 0.7  # chance of a draft model's guess, of any confidence, until measured
_MODEL_RATE = 0.1  # by which one guess of it changes that
_FORGET = 0.01  # share of what was learnt about it that each step forgets, so that it gets another chance


class Acceptance:
    """How often guesses of each grade were right, recent ones counting more. `prior`: chance of a grade unseen."""

    def __init__(self, prior: Callable[[int], float]) -> None:
        self._prior = prior
        self._seen: dict[int, tuple[float, float]] = {}  # grade → (right, all), decayed

    def chance(self, grade: int) -> float:
        """Chance that a guess of this grade is right, given that those before it are; inside (0, 1)."""
        right, total = self._seen.get(grade, (0.0, 0.0))
        return (right + _PRIOR_WEIGHT * self._prior(grade)) / (total + _PRIOR_WEIGHT)

    def note(self, grade: int, right: bool) -> None:
        before, total = self._seen.get(grade, (0.0, 0.0))
        self._seen[grade] = (before * _DECAY + right, total * _DECAY + 1)

    def survival(self, grades: Iterable[int]) -> list[float]:
        """For each guess of a draft the chance that it and all before it are right (never rising). The list ends where
        that becomes hopeless."""
        return list(takewhile(_HOPELESS.__lt__, accumulate(map(self.chance, grades), mul)))


class Guesser:
    """Guesses what one sequence says next, and learns how good the guesses are. `tokens`: the sequence's own list."""

    def __init__(self, tokens: list[int]) -> None:
        self._lookup = PromptLookup(tokens)
        # Agreement over n tokens counts as that many successes against two failures.
        self._found = Acceptance(lambda grade: (grade - 1) / (grade + 1))
        self._modelled = Acceptance(lambda tenths: (tenths + 0.5) / 10)
        self._offered = Draft()
        self._drafts: tuple[Draft, Draft] = (Draft(), Draft())  # of the text, of the draft model
        self._chosen = Draft()
        self.typical_model_chance = _MODEL_PRIOR

    def offer(self, draft: Draft) -> None:
        """Take a draft model's guess of what comes next; each grade is its confidence in tenths."""
        self._offered = draft

    def model_chance(self, grade: int) -> float:
        """Chance that a guess of the draft model is right when its confidence is `grade` tenths."""
        return self._modelled.chance(grade)

    def found(self, limit: int) -> list[float]:
        """The same as `guess`, but from the text alone and without remembering it."""
        return self._found.survival(self._lookup.propose(limit).grades)

    def guess(self, limit: int) -> list[float]:
        """Guess up to `limit` tokens, by whichever source promises more. → their chances, as `Acceptance.survival`"""
        self._drafts = self._lookup.propose(limit), self._offered.first(limit)
        found, modelled = (
            judge.survival(draft.grades)
            for judge, draft in zip((self._found, self._modelled), self._drafts, strict=True)
        )
        self._chosen = self._drafts[sum(modelled) > sum(found)]
        return modelled if self._chosen is self._drafts[1] else found

    def first(self, depth: int) -> tuple[int, ...]:
        """The first `depth` tokens of the last guess."""
        return self._chosen.tokens[:depth]

    def score(self, sampled: Ordered[int]) -> None:
        """Compare the last guesses, also those not sent along, with the tokens sampled since (at least one)."""
        self.typical_model_chance += _FORGET * (_MODEL_PRIOR - self.typical_model_chance)
        found, modelled = self._drafts
        for grade, right in _verdicts(found, sampled):
            self._found.note(grade, right)
        for grade, right in _verdicts(modelled, sampled):
            self._modelled.note(grade, right)
            self.typical_model_chance += _MODEL_RATE * (right - self.typical_model_chance)
        self._offered, self._drafts = Draft(), (Draft(), Draft())


def _verdicts(draft: Draft, sampled: Ordered[int]) -> Iterator[tuple[int, bool]]:
    """The grade of each guess and whether it was right, up to the first wrong one."""
    for token, grade, truth in zip(draft.tokens, draft.grades, sampled, strict=False):
        yield grade, token == truth
        if token != truth:
            return


def drafts(guessing: Ordered[tuple[Guesser, int]], spare: int, cost: StepCost) -> list[tuple[int, ...]]:
    """Tokens to send along for each decoding sequence, given as its guesser and the most that it may get.

    spare: guesses the step has room for. The step is taken to hold these sequences only.
    """
    if spare <= 0 or not guessing:
        return [()] * len(guessing)
    chances = [guesser.guess(min(most, spare, DEPTH)) for guesser, most in guessing]
    chosen, _ = depths(chances, spare, cost)
    return [guesser.first(depth) for (guesser, _), depth in zip(guessing, chosen, strict=True)]


def depths(
    chances: Ordered[Ordered[float]], spare: int, cost: StepCost, before_s: float = 0.0
) -> tuple[list[int], float]:
    """How deep to guess for each sequence so that the step yields the most tokens per second, and how many these are.

    chances: per decoding sequence, for each depth the chance that the guess is right that far (never rising).
    spare: guesses the step has room for. before_s: how long it takes to make the guesses.
    Whatever n rows cost, the n likeliest guesses are the best n, so only n is searched for.
    """
    ranked = sorted(
        ((chance, -index, -depth) for index, row in enumerate(chances) for depth, chance in enumerate(row)),
        reverse=True,
    )[: max(0, spare)]
    rows = len(chances)
    expected = float(rows)
    best, count = expected / (before_s + cost.seconds(rows)), 0
    for n, (chance, _, _) in enumerate(ranked, 1):
        expected += chance
        goodput = expected / (before_s + cost.seconds(rows + n))
        if goodput > best:
            best, count = goodput, n
    chosen = [0] * rows
    for _, index, _ in ranked[:count]:
        chosen[-index] += 1
    return chosen, best


def model_depth(
    guessers: Ordered[Guesser], spare: int, cost: StepCost, draft_cost: StepCost
) -> tuple[int, float]:
    """How many tokens a draft model should guess for each sequence; 0 when the texts' own guesses pay more.

    Also how many tokens a further round has to promise to be worth its time.
    """
    round_s = draft_cost.seconds(len(guessers))
    found = [guesser.found(min(spare, DEPTH)) for guesser in guessers]
    depth, (_, best) = 0, depths(found, spare, cost)
    for tried in (1, 2, 3, 4, 6, 8, 12, 16, 24, DEPTH):
        if tried > spare:
            break
        modelled = [[g.typical_model_chance ** (i + 1) for i in range(tried)] for g in guessers]
        chances = [max(pair, key=sum) for pair in zip(found, modelled, strict=True)]
        _, goodput = depths(chances, spare, cost, tried * round_s)
        if goodput > best:
            best, depth = goodput, tried
    row_s = cost.seconds(len(guessers) + 1) - cost.seconds(len(guessers))
    return depth, best * (round_s + len(guessers) * row_s)
