"""A draft model: a small model that guesses what a large one with the same vocabulary says next, greedily.

Knows how to compute guesses, and how to keep the small model's KV in step with what was accepted: a wrong guess is
overwritten, and pages are shared between texts as in any pool. `speculation` decides how deep to guess and finds out
which guesses were right.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from shoal.engine.learn.step_cost import StepCost
from shoal.engine.order import Order, Segment
from shoal.engine.rank import Rank
from shoal.engine.sequence import Sequence
from shoal.kernels.arrays import Floats
from shoal.offload.kv.prefix_cache import Holding, PrefixCache
from shoal.partition.spec import grows_to, length_class

from .draft import Draft
from .speculation import model_depth

GRADES = 10  # confidence in tenths


@dataclass(eq=False)
class _Followed:
    """How far the small model has come with a sequence: KV of its first `computed` tokens, then of `ahead`."""

    holding: Holding = field(default_factory=Holding)
    computed: int = 0
    ahead: list[int] = field(default_factory=list)


class Drafter:
    """Guesses for the sequences of one engine, in its thread. The small model knows ids below `vocab`: others are never
    guessed, and texts that have one are not read."""

    def __init__(self, rank: Rank, *, vocab: int, chunk_tokens: int, clock: Callable[[], float]) -> None:
        self._rank = rank
        self._ropes = rank.executor.model.spec.ropes
        self._vocab = vocab
        self._chunk_tokens = chunk_tokens
        self._clock = clock
        self._cache = PrefixCache(rank.kv.table, rank.kv.page_tokens)
        self._followed: dict[Sequence, _Followed] = {}
        self._cost = StepCost()

    def offer(self, decoding: list[Sequence], spare: int, cost: StepCost) -> None:
        """Offer guesses to the guessers of these sequences, if that pays. `cost`: of the large model's steps."""
        for sequence in [s for s in self._followed if not s.running]:
            left = self._followed.pop(sequence)
            self._cache.release(left.holding, sequence.tokens, left.computed)
        if not (spare and decoding):
            return
        depth, least = 1, 0.0  # the first time, to measure what a round costs
        if self._cost.measured:
            depth, least = model_depth([s.guesser for s in decoding], spare, cost, self._cost)
        if not depth:
            return
        ready = self._catch_up(decoding)
        self._guess(ready, depth, least)

    def _catch_up(self, decoding: list[Sequence]) -> dict[Sequence, Floats]:
        """Read what is new, at most `chunk_tokens` in all. → logits (vocab,) after each text read to its end"""
        segments: list[Segment] = []
        reading: list[Sequence] = []
        budget = self._chunk_tokens
        for sequence in decoding:
            followed = self._settle(sequence)
            start = followed.computed
            end = min(len(sequence.tokens), start + budget)
            ids = sequence.tokens[start:end]
            if ids and max(ids) < self._vocab and self._cache.extend(followed.holding, end):
                budget -= end - start
                wanted = int(end == len(sequence.tokens))
                holding = followed.holding
                segments.append(Segment(ids, start, holding.pages, wanted, holding.length))
                reading.append(sequence)
        logits = iter(self._run(segments) if segments else ())
        for sequence, segment in zip(reading, segments, strict=True):
            self._followed[sequence].computed += len(segment.tokens)
        return {s: next(logits) for s, it in zip(reading, segments, strict=True) if it.rows_wanted}

    def _guess(self, ready: dict[Sequence, Floats], depth: int, least: float) -> None:
        """Guess one more token of every text in each round, as long as a round promises `least` right guesses."""
        drafts: dict[Sequence, list[tuple[int, int]]] = {sequence: [] for sequence in ready}  # tokens, grades
        chances = dict.fromkeys(ready, 1.0)
        for count in range(depth):
            for sequence, logits in ready.items():
                token, grade = _likeliest(logits)
                drafts[sequence].append((token, grade))
                chances[sequence] *= sequence.guesser.model_chance(grade)
            ready = {s: row for s, row in ready.items() if self._room(s, count + 1)}
            if count + 1 == depth or sum(chances[sequence] for sequence in ready) < least:
                break
            segments = []
            for sequence in ready:
                followed, (token, _) = self._followed[sequence], drafts[sequence][-1]
                start, holding = len(sequence.tokens) + count, followed.holding
                segments.append(Segment([token], start, holding.pages, 1, holding.length))
                followed.ahead.append(token)
            ready = dict(zip(ready, self._run(segments), strict=True))
        for sequence, draft in drafts.items():
            tokens, grades = zip(*draft, strict=True)
            sequence.guesser.offer(Draft(tokens, grades))

    def _settle(self, sequence: Sequence) -> _Followed:
        """How far the small model has come, counting those of its last guesses that were accepted; for a new sequence,
        as far as its prefix cache knows the text."""
        followed, length = self._followed.get(sequence), len(sequence.tokens)
        if followed is not None and length > grows_to(self._ropes, followed.holding.length):
            self._cache.release(followed.holding, sequence.tokens, followed.computed)
            followed = None
        if followed is None:
            followed = self._followed[sequence] = _Followed()
            followed.holding.length = length_class(self._ropes, length)
            followed.computed = self._cache.adopt(followed.holding, sequence.tokens, 0)
            self._rank.run(Order(moves=self._cache.take_moves()))
        for guess in followed.ahead:
            # The last token is always read again, because the logits after it are needed.
            if followed.computed + 1 >= len(sequence.tokens) or sequence.tokens[followed.computed] != guess:
                break
            followed.computed += 1
        followed.ahead.clear()
        self._cache.publish(followed.holding, sequence.tokens, followed.computed)
        return followed

    def _room(self, sequence: Sequence, ahead: int) -> bool:
        """Pages for so many guesses after the text, if it may get so long."""
        length = len(sequence.tokens) + ahead
        return length < sequence.limit and self._cache.extend(self._followed[sequence].holding, length)

    def _run(self, segments: list[Segment]) -> list[Floats]:
        """One step of the small model: logits (vocab,) of the rows wanted."""
        began_s = self._clock()
        logits = self._rank.run(Order(segments)).logits[:, : self._vocab]
        self._cost.note(sum(len(segment.tokens) for segment in segments), self._clock() - began_s)
        return list(logits)


def _likeliest(logits: Floats) -> tuple[int, int]:
    """The likeliest token, and how likely it is in tenths (0 to 9)."""
    token = int(logits.argmax())
    with np.errstate(over="ignore", invalid="ignore"):  # infinite logits give NaN
        share = 1 / float(np.exp(logits - logits[token]).sum())
    return token, min(int(share * GRADES), GRADES - 1) if share == share else 0
