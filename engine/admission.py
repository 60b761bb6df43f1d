"""Admission: who waits, whose turn it is, and whether there is room for one more.

The turn goes by priority, then to what was preempted, then to the client that was given least, then by arrival. A
sequence is admitted when the KV that all are expected to need at once fits (`learn.forecast`). Pure.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence as Ordered

from shoal.offload.kv.prefix_cache import PrefixCache

from .errors import NeverFits, QueueFull
from .learn.fairness import TokenCounters
from .learn.forecast import AnswerLengths, Growth, peak_tokens
from .learn.speeds import Speeds
from .sequence import Sequence

RETRY_S = (0.5, 60.0)  # the shortest and the longest wait that a refused client is told
FIRST_RETRY_S = 5.0  # the wait it is told while no step has been measured


class Admission:
    """At most `sequences` run at once and `queue` more wait. `speeds` says how long a client should wait."""

    def __init__(self, cache: PrefixCache, speeds: Speeds, *, sequences: int, queue: int) -> None:
        self.waiting: list[Sequence] = []
        self.cache = cache
        self.speeds = speeds
        self._sequences = sequences
        self._queue = queue
        self._lengths = AnswerLengths()
        self._counters = TokenCounters()
        self._arrivals = 0

    def enter(self, sequence: Sequence, running: Ordered[Sequence]) -> tuple[Sequence, QueueFull] | None:
        """Put it in the queue. Raises QueueFull, or NeverFits when it could never run.

        Into a full queue one may come whose client has fewer requests than another: → who has to go for it, and why.
        """
        if (error := self.unfit(sequence)) is not None:
            raise error
        displaced = None
        if (before := len(self.waiting) + len(running)) >= self._queue + self._sequences:
            full = QueueFull(before, self._sequences, self._queue, self._retry_after_s(running))
            if (greedy := self._greediest(sequence, running)) is None:
                raise full
            displaced = greedy, full
        self._arrivals += 1
        sequence.number = self._arrivals
        self._counters.enter(sequence.client)
        self.waiting.append(sequence)
        return displaced

    def unfit(self, sequence: Sequence) -> NeverFits | None:
        """Why it could never run, if so."""
        cache = self.cache
        if cache.pages_of(sequence.limit) <= cache.pages:
            return None
        return NeverFits(sequence.prompt_tokens, sequence.limit, cache.pages * cache.page_tokens)

    def _greediest(self, newcomer: Sequence, running: Ordered[Sequence]) -> Sequence | None:
        """The last waiting sequence of the client that has most, if the newcomer has fewer even with this one. Nothing
        of a higher priority goes for it, and nothing that has begun."""
        counts = Counter(one.client for one in (*running, *self.waiting))
        last = max(
            (one for one in self.waiting if not one.preemptions and one.priority <= newcomer.priority),
            key=lambda one: (counts[one.client], one.number),
            default=None,
        )
        if last is None or counts[last.client] <= counts[newcomer.client] + 1:
            return None
        return last

    def leave(self, sequence: Sequence) -> None:
        """Close the account of a sequence that has ended."""
        self._counters.leave(sequence.client)

    def note_length(self, generated: int) -> None:
        """Remember how long an answer became."""
        if generated:
            self._lengths.note(generated)

    def charge(self, sequence: Sequence, prompt_tokens: int, generated: int) -> None:
        """Charge its client with the tokens that were read and generated for it."""
        self._counters.charge(sequence.client, prompt_tokens, generated)

    def turn(self, sequence: Sequence) -> tuple[int, int, float, int]:
        """A key to sort by: whoever is next has the least."""
        if sequence.restarts:
            return -sequence.priority, 0, 0.0, sequence.number
        return -sequence.priority, 1, self._counters.given(sequence.client), sequence.number

    def place(self, sequence: Sequence) -> int:
        """Its place in the queue, 1 = next."""
        own = self.turn(sequence)
        return 1 + sum(self.turn(other) < own for other in self.waiting)

    def fits(self, sequence: Sequence, running: Ordered[Sequence]) -> bool:
        """Whether there is a place for it, and room for the KV that all are expected to need at once."""
        if not running:
            return True
        if len(running) >= self._sequences:
            return False
        cache = self.cache
        size = cache.page_tokens
        shared = cache.used_pages - sum(other.holding.own_pages for other in running)
        growths = [
            self._growth(other, len(other.holding.pages) - other.holding.own_pages) for other in running
        ]
        growths.append(self._growth(sequence, cache.held_pages(sequence.holding, sequence.tokens)))
        return shared * size + peak_tokens(growths) <= cache.pages * size

    def _growth(self, sequence: Sequence, shared_pages: int) -> Growth:
        size = self.cache.page_tokens
        # Half a page more, because the last page is half empty on average.
        own = len(sequence.tokens) - shared_pages * size + size // 2
        return Growth(own, self._expected(sequence))

    def _expected(self, sequence: Sequence) -> int:
        """How many more tokens it will probably generate."""
        expected = self._lengths.expected(sequence.generated) - sequence.generated
        return min(expected, sequence.limit - len(sequence.tokens))

    def _retry_after_s(self, running: Ordered[Sequence]) -> float:
        """How long about half of the present work will take."""
        everything = [*running, *self.waiting]
        prompt_tokens = sum(sequence.remaining for sequence in everything)
        answer_tokens = sum(self._expected(sequence) for sequence in everything)
        backlog_s = self.speeds.backlog_s(prompt_tokens, answer_tokens, self._sequences)
        if backlog_s is None:
            return FIRST_RETRY_S
        return min(max(backlog_s / 2, RETRY_S[0]), RETRY_S[1])
