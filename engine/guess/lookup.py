"""Prompt lookup: what followed the last time the text ended like this.

An index over a sequence's own tokens, prompt and answer alike; a repeated name, a quoted passage or an edited piece
of code is found where it stood before, and what followed there is proposed to follow again (Saxena 2023, "Prompt
Lookup Decoding"). Pure: knows token ids; not models, costs, or whether a proposal is worth computing.

Found by hash chains, as in DEFLATE (RFC 1951, 4): O(1) per token, bounded memory, exact comparison of what is found.
"""

from __future__ import annotations

from array import array

from .draft import Draft

SHORTEST = 2  # tokens that have to agree before anything is proposed
LONGEST = 16  # agreement beyond this is not told apart
_CANDIDATES = 16  # places compared at each proposal, the most recent first
_TABLE = 1 << 13  # chains; collisions cost time, never truth
_NONE = -1


class PromptLookup:
    """Proposes continuations of `tokens`, a list that is only ever appended to; it is read, not copied.

    Memory: 4 bytes a token and 4 for each of the table's places.
    """

    def __init__(self, tokens: list[int]) -> None:
        self._tokens = tokens
        # Chain → the last place whose SHORTEST tokens before it hash to that.
        self._latest = array("i", [_NONE]) * _TABLE
        self._earlier = array("i", [_NONE]) * SHORTEST  # place → the place before it in its chain

    def propose(self, limit: int) -> Draft:
        """Up to `limit` tokens that may come next, empty where the text never ended like this before.

        The longest agreement of those compared wins, of equals the most recent. A token's grade is the length of
        the agreement that it would continue, from SHORTEST to LONGEST.
        """
        self._index()
        tokens = self._tokens
        length = len(tokens)
        if length <= SHORTEST or limit <= 0:
            return Draft()
        best, place = SHORTEST - 1, 0
        candidate = self._latest[_chain(tokens[-2], tokens[-1])]
        for _ in range(_CANDIDATES):
            if candidate == _NONE or best == LONGEST:
                break
            agreed = self._agreement(candidate)
            if agreed > best:
                best, place = agreed, candidate
            candidate = self._earlier[candidate]
        if best < SHORTEST:
            return Draft()
        continuation = tokens[place : place + limit]
        while len(continuation) < limit:  # the text repeats itself with period `length - place`
            continuation += continuation[: limit - len(continuation)]
        return Draft(tuple(continuation), tuple(min(best + i, LONGEST) for i in range(limit)))

    def _index(self) -> None:
        """Enter every place before the end, so that the end finds only what came before it."""
        tokens, latest, earlier = self._tokens, self._latest, self._earlier
        for place in range(len(earlier), len(tokens)):
            chain = _chain(tokens[place - 2], tokens[place - 1])
            earlier.append(latest[chain])
            latest[chain] = place

    def _agreement(self, place: int) -> int:
        """How many tokens before `place` equal the last ones, at most LONGEST."""
        tokens = self._tokens
        most = min(LONGEST, place)
        agreed = 0
        while agreed < most and tokens[place - 1 - agreed] == tokens[-1 - agreed]:
            agreed += 1
        return agreed


def _chain(first: int, second: int) -> int:
    return (first * 40503 + second * 2654435761 >> 7) % _TABLE
