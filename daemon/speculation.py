"""Speculation: how many tokens to guess ahead, for each sequence of a step.

A step that also carries guessed tokens yields as many tokens as the guess was right for, plus one; a row's result
does not depend on what else is in the step, so the tokens are those of one step each. What it costs is the rows.
The depth that maximises expected tokens per second (goodput; SmartSpec, Liu et al. 2024, arXiv 2406.14066) follows from
how often guesses of a grade were right before and from the measured cost of steps; where nothing pays it is 0. Every
guess is scored against what was sampled, also those that were not sent: learning costs nothing.

Pure: knows token ids, counts and seconds handed in. Does not know models, requests or clocks.
"""

from __future__ import annotations

from collections.abc import Sequence as Ordered

from .draft import Draft
from .lookup import PromptLookup
from .step_cost import StepCost

DEPTH = 32  # tokens guessed ahead of one sequence, at most
_DECAY = 0.95  # per observation of a grade: the last twenty or so count
_PRIOR_WEIGHT = 3.0  # observations that the prior stands for


class Acceptance:
    """How often guesses of each grade were right, recent ones counting more."""

    def __init__(self) -> None:
        self._seen: dict[int, tuple[float, float]] = {}  # grade → (right, all), decayed

    def chance(self, grade: int) -> float:
        """Chance that a guess of this grade is right, given that those before it are; inside (0, 1).

        Unseen, agreement over `grade` tokens counts as that many successes against two failures.
        """
        right, total = self._seen.get(grade, (0.0, 0.0))
        prior = (grade - 1) / (grade + 1)
        return (right + _PRIOR_WEIGHT * prior) / (total + _PRIOR_WEIGHT)

    def note(self, grade: int, right: bool) -> None:
        before, total = self._seen.get(grade, (0.0, 0.0))
        self._seen[grade] = (before * _DECAY + right, total * _DECAY + 1)


class Guesser:
    """Guesses what one sequence says next, and learns how good its guesses are. `tokens`: its own list, which grows."""

    def __init__(self, tokens: list[int]) -> None:
        self._lookup = PromptLookup(tokens)
        self._acceptance = Acceptance()
        self._draft = Draft()

    def guess(self, limit: int) -> list[float]:
        """Guess up to `limit` tokens; the chance of each that it and all before it are right, so never rising."""
        self._draft = self._lookup.propose(limit)
        chances: list[float] = []
        so_far = 1.0
        for grade in self._draft.grades:
            so_far *= self._acceptance.chance(grade)
            chances.append(so_far)
        return chances

    def first(self, depth: int) -> tuple[int, ...]:
        """The first `depth` tokens of the last guess."""
        return self._draft.tokens[:depth]

    def score(self, sampled: Ordered[int]) -> None:
        """Hold the last guess against the tokens sampled since, one at least, whether it was sent along or not."""
        for token, grade, truth in zip(self._draft.tokens, self._draft.grades, sampled, strict=False):
            self._acceptance.note(grade, token == truth)
            if token != truth:
                break
        self._draft = Draft()


def drafts(guessing: Ordered[tuple[Guesser, int]], spare: int, cost: StepCost) -> list[tuple[int, ...]]:
    """Tokens to send along for each decoding sequence, given as its guesser and the most that it may get.

    spare: guesses the step has room for. The step is taken to hold these sequences only.
    """
    if spare <= 0 or not guessing:
        return [()] * len(guessing)
    chances = [guesser.guess(min(most, spare, DEPTH)) for guesser, most in guessing]
    chosen = depths(chances, len(guessing), spare, cost)
    return [guesser.first(depth) for (guesser, _), depth in zip(guessing, chosen, strict=True)]


def depths(chances: Ordered[Ordered[float]], rows: int, spare: int, cost: StepCost) -> list[int]:
    """How deep to guess for each sequence so that the step's expected tokens per second are most.

    chances: per decoding sequence, for each depth the chance that the guess is right that far (never rising). rows:
    of the step without guesses, those of other sequences included. spare: guesses the step has room for.
    The n likeliest guesses are the best n, whatever the cost of n; so only n is searched.
    """
    ranked = sorted(
        ((chance, -index, -depth) for index, row in enumerate(chances) for depth, chance in enumerate(row)),
        reverse=True,
    )[: max(0, spare)]
    expected = float(len(chances))
    best, count = expected / cost.seconds(rows), 0
    for n, (chance, _, _) in enumerate(ranked, 1):
        expected += chance
        goodput = expected / cost.seconds(rows + n)
        if goodput > best:
            best, count = goodput, n
    chosen = [0] * len(chances)
    for _, index, _ in ranked[:count]:
        chosen[-index] += 1
    return chosen
