"""SentencePiece BPE: text between special tokens → ids, by merging the best-scored neighbours first.

It is written here because the `tokenizers` library gives every merge a rank of its own, while SentencePiece merges
the leftmost of pairs that have equal scores; on runs of equal characters the two disagree. Knows the scores and the
byte fallback. Does not know special tokens, BOS, files, or how ids become text again. Source of the algorithm:
SentencePiece's bpe_model.cc (llama.cpp has the same).
"""

from __future__ import annotations

import re
from array import array
from collections.abc import Iterable, Mapping
from heapq import heapify, heappop, heappush
from itertools import pairwise

from shoal.models.errors import TextTooLarge, TokenizerError, TooManyTokens

from .long_texts import space_cut
from .vocabulary import SPACE_MARK, TokenKind, Vocabulary

_MERGEABLE = frozenset({TokenKind.NORMAL, TokenKind.USER_DEFINED, TokenKind.UNUSED, TokenKind.UNDEFINED})
_CACHED_WORDS = 1 << 16
_CACHED_WORD_CHARS = 64
_MAX_CHARS = 1 << 18  # that merge with each other; they take 80 MB and some seconds


class SentencePieceBpe:
    """The merger. ids: token text → id. scores: one float per token, higher merges first.

    Control and byte tokens never merge. uncounted: None unless
    every text has tokens of its own, if need be those of its bytes.
    """

    def __init__(self, vocabulary: Vocabulary, ids: Mapping[str, int], scores: Iterable[float]) -> None:
        kinds = vocabulary.kinds
        self._ids: Mapping[str, int] = {text: i for text, i in ids.items() if kinds[i] in _MERGEABLE}
        # Costs instead of scores: the heap pops its least entry.
        self._costs = array("d", (-score for score in scores))
        self._byte_ids = [_byte_id(ids, vocabulary.unk_id, byte) for byte in range(256)]
        self._unk_id = vocabulary.unk_id
        self.uncounted = b"" if self._unk_id not in self._byte_ids else None
        self._words = _word_pattern(self._ids)
        self._cache: dict[str, list[int]] = {}
        self.cut = space_cut(self._ids)

    def encode(self, text: str) -> list[int]:
        """Ids of a text without special tokens. Spaces become "▁" here; the caller adds a space prefix."""
        ids: list[int] = []
        cache = self._cache
        for word in self._words.findall(text.replace(" ", SPACE_MARK)):
            known = cache.get(word)
            if known is None:
                known = self._merge(word)
                if len(word) <= _CACHED_WORD_CHARS:
                    if len(cache) >= _CACHED_WORDS:
                        cache.clear()
                    cache[word] = known
            ids.extend(known)
        return ids

    def encode_long(self, text: str, limit: int) -> list[int]:
        """The same for a text that cannot be cut before spaces: it is cut between characters that no token has side by
        side. Raises TextTooLarge or TooManyTokens."""
        text = text.replace(" ", SPACE_MARK)
        pairs = {a + b for token in self._ids for a, b in pairwise(token)}
        ids: list[int] = []
        start = 0
        for end in range(1, len(text) + 1):
            if end - start > _MAX_CHARS:
                raise TextTooLarge(
                    f"the text has more than {_MAX_CHARS} characters without a place to cut it, as spaces and line "
                    "ends are; put some in"
                )
            # A run of characters that are no tokens is one unknown token, unless bytes stand for them.
            if end == len(text) or (self.uncounted is not None and text[end - 1 : end + 1] not in pairs):
                ids += self._merge(text[start:end])
                start = end
                if len(ids) > limit:
                    raise TooManyTokens(len(ids))
        return ids

    def _merge(self, word: str) -> list[int]:
        ids, costs = self._ids, self._costs
        pieces = list(word)
        count = len(pieces)
        before, after = list(range(-1, count - 1)), [*range(1, count), -1]
        # (cost, left, right, length of the merged text): of equal costs the leftmost pair comes first.
        heap = [
            (costs[token_id], left, left + 1, 2)
            for left in range(count - 1)
            if (token_id := ids.get(pieces[left] + pieces[left + 1])) is not None
        ]
        heapify(heap)
        while heap:
            _, left, right, length = heappop(heap)
            first, second = pieces[left], pieces[right]
            if not first or not second or len(first) + len(second) != length:
                continue  # one of the two has merged with another piece in the meantime
            pieces[left] = merged = first + second
            pieces[right] = ""
            following = after[left] = after[right]
            if following >= 0:
                before[following] = left
                pair = merged + pieces[following]
                if (token_id := ids.get(pair)) is not None:
                    heappush(heap, (costs[token_id], left, following, len(pair)))
            preceding = before[left]
            if preceding >= 0:
                pair = pieces[preceding] + merged
                if (token_id := ids.get(pair)) is not None:
                    heappush(heap, (costs[token_id], preceding, left, len(pair)))
        merged_ids: list[int] = []
        for piece in pieces:
            if piece:
                token_id = ids.get(piece)
                if token_id is not None:
                    merged_ids.append(token_id)
                else:
                    self._fall_back(piece, merged_ids)
        return merged_ids

    def _fall_back(self, piece: str, ids: list[int]) -> None:
        """Append an unknown piece as its bytes, or as one unknown token for a whole run of such pieces."""
        for byte in piece.encode():
            byte_id = self._byte_ids[byte]
            if byte_id != self._unk_id or ids[-1:] != [byte_id]:
                ids.append(byte_id)


def _byte_id(ids: Mapping[str, int], unk_id: int | None, byte: int) -> int:
    for text in (f"<0x{byte:02X}>", chr(byte) if byte < 0x80 else ""):
        if text in ids:
            return ids[text]
    if unk_id is None:
        raise TokenizerError(
            f"the vocabulary has no token <0x{byte:02X}> and no unknown token to stand in for it"
        )
    return unk_id


def _word_pattern(texts: Mapping[str, int]) -> re.Pattern[str]:
    """Pattern of the words that merge independently: the text is cut before "▁" wherever no token spans the cut.

    Words are then merged one by one and remembered, which makes long prompts fast.
    """
    spans = {
        before
        for text in texts
        if text.rfind(SPACE_MARK) > 0
        for before, mark in pairwise(text)
        if mark == SPACE_MARK
    }
    inseparable = "".join(map(re.escape, spans | {SPACE_MARK}))
    return re.compile(rf".(?:[^{SPACE_MARK}]|(?<=[{inseparable}]){SPACE_MARK})*", re.DOTALL)
