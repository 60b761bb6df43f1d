"""Whether a text only repeats itself, as a model without a way out of a loop does until its context ends.

Knows tokens and how long their text is. Does not know who wants to be told.
"""

from __future__ import annotations

# 50 equal lines of 80 characters: more than drawings, tables and lists of zeros usually have.
REPEATED_BYTES = 4000
REPEATED_TOKENS = 2048  # of digits and signs, which are a byte or two each
REPEATED_TIMES = 5
LONGEST_TOKENS = 512  # of the piece that is repeated
LOOK_TOKENS = 64  # how often it is looked at, which takes less than a millisecond


class Repetition:
    """Finds the end of a text to be one piece over and over: the very same tokens at least REPEATED_TIMES, in all at
    least REPEATED_BYTES of text, or REPEATED_TOKENS, or half of the context."""

    def __init__(self, context_tokens: int) -> None:
        self._enough_tokens = min(REPEATED_TOKENS, context_tokens // 2)
        self._ids: list[int] = []
        self._sizes: list[int] = []

    def push(self, token_id: int, nbytes: int) -> bool:
        """Add a token with so many bytes of text; it counts as one at least. True when the text only repeats itself."""
        self._ids.append(token_id)
        self._sizes.append(nbytes or 1)
        return len(self._ids) % LOOK_TOKENS == 0 and self._repeats()

    def _repeats(self) -> bool:
        """The failure function of Knuth, Morris and Pratt, over the text read backwards, gives the shortest period of
        each of its ends; the time is proportional to their length."""
        enough = self._enough()
        if not enough:
            return False
        back = self._ids[: -max(enough, REPEATED_TIMES * LONGEST_TOKENS) - 1 : -1]
        border, length = [0], 0  # of each end of the text: the longest part that it begins and ends with
        for index in range(1, len(back)):
            while length and back[index] != back[length]:
                length = border[length - 1]
            length += back[index] == back[length]
            border.append(length)
            period = index + 1 - length
            if index + 1 >= enough and REPEATED_TIMES * period <= index + 1 and period <= LONGEST_TOKENS:
                return True
        return False

    def _enough(self) -> int:
        """How many of the last tokens are enough text; 0 = all are not."""
        nbytes = 0
        for count, size in enumerate(reversed(self._sizes), 1):
            nbytes += size
            if nbytes >= REPEATED_BYTES or count >= self._enough_tokens:
                return count
        return 0
