"""How much KV the running sequences will need at most, guessed from how long answers were before.

After the Past-Future scheduler (Gong et al. 2025, arXiv 2507.10150): an answer under way is expected to become as long
as recent answers that came at least as far, and the peak of what all of them need together decides whether one more
fits. Guesses may be wrong; the scheduler knows what to do then. Pure.
"""

from __future__ import annotations

from bisect import bisect_right, insort
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

_REMEMBERED = 256  # answers
_FIRST_GUESSES = 8  # answers of so many tokens each, believed until others have been seen
_FIRST_GUESS_TOKENS = 256
_QUANTILE = 0.75  # of the answers that came as far: cautious, since a wrong guess costs more than a wait
_GROWTH = 1.5  # an answer longer than all before is expected to become so much longer


class AnswerLengths:
    """Lengths in tokens of the answers that ended last."""

    def __init__(self) -> None:
        self._recent: deque[int] = deque()
        self._sorted: list[int] = []
        for _ in range(_FIRST_GUESSES):
            self.note(_FIRST_GUESS_TOKENS)

    def note(self, tokens: int) -> None:
        """An answer ended after so many tokens."""
        self._recent.append(tokens)
        insort(self._sorted, tokens)
        if len(self._recent) > _REMEMBERED:
            self._sorted.pop(bisect_right(self._sorted, self._recent.popleft()) - 1)

    def expected(self, so_far: int) -> int:
        """The length an answer will have that has `so_far` tokens and goes on."""
        longer = bisect_right(self._sorted, so_far)
        if longer == len(self._sorted):
            return int(_GROWTH * so_far) + 1
        return self._sorted[longer + int(_QUANTILE * (len(self._sorted) - longer))]


@dataclass(frozen=True, slots=True)
class Growth:
    """A sequence: for how many `tokens` it needs pages of its own now, and how many more it will generate."""

    tokens: int
    left: int


def peak_tokens(sequences: Iterable[Growth]) -> int:
    """The most tokens that they hold together at any time, if all grow equally fast and free their pages at the end."""
    peak = held = 0
    for alive, sequence in enumerate(sorted(sequences, key=lambda s: s.left, reverse=True), 1):
        held += sequence.tokens  # of all sequences that are still there when this one ends
        peak = max(peak, held + alive * sequence.left)
    return peak
