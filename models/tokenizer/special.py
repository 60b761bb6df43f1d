"""Cutting a text at its special tokens.

Knows that the leftmost special token wins, and the longest of those that begin there (as in `tokenizers`), which of
them are plain text when control tokens are not to be recognised, and which take the white space beside them. Does not
know how the text between them is merged into tokens: the merger does.
"""

from __future__ import annotations

import re
from array import array
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Protocol

from shoal.models.errors import TokenizerError, TooManyTokens

from .long_texts import ANY_NUMBER, PIECE_CHARS, STRETCH_CHARS, encode_in_turn, pieces
from .vocabulary import SPECIAL_KINDS, TokenKind, Vocabulary

MAX_SPECIAL_CHARS = 4096
_SPLITTING = SPECIAL_KINDS | {TokenKind.USER_DEFINED}
# Unicode's White_Space, which is what `tokenizers` takes for white space; Python's \s has four characters more.
_SPACE = "[\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]"
_SPACES = re.compile(f"{_SPACE}*")
_WORD = re.compile(r"\w")


class Merger(Protocol):
    """Text without special tokens → ids.

    uncounted: bytes of a text that may be in no token; None if that is not known. cut: where texts can be cut without
    changing any id. encode_long: of a text that cannot be cut; raises TextTooLarge or TooManyTokens.
    """

    uncounted: bytes | None
    cut: re.Pattern[str] | None

    def encode(self, text: str) -> list[int]: ...

    def encode_long(self, text: str, limit: int) -> list[int]: ...


@dataclass(frozen=True)
class Edges:
    """What a special token wants of the text around it: it takes the white space before (`lstrip`) or after it
    (`rstrip`), or is only recognised where no letter touches it (`single_word`)."""

    lstrip: bool = False
    rstrip: bool = False
    single_word: bool = False


class SpecialSplitter:
    """Text → ids: special tokens by their text, the merger for what stands between them.

    longest_bytes, uncounted: as in `Parts`. add_bos, add_eos: whether they stand around a text. edges: by token id, of
    those that want something. Raises TokenizerError if BOS or EOS is wanted and the vocabulary names none, or if a
    special token is too long.
    """

    def __init__(
        self,
        vocabulary: Vocabulary,
        merger: Merger,
        *,
        add_bos: bool,
        add_eos: bool,
        edges: Mapping[int, Edges] = MappingProxyType({}),
    ) -> None:
        self._merger = merger
        self._prefix = _one("BOS", vocabulary.bos_id) if add_bos else []
        self._suffix = _one("EOS", vocabulary.eos_id) if add_eos else []
        self._space_prefix = vocabulary.add_space_prefix
        self._edges = edges
        dropping = merger.uncounted is None or any(edge.lstrip or edge.rstrip for edge in edges.values())
        self.longest_bytes = None if dropping else vocabulary.tokens.longest_bytes
        self.uncounted = merger.uncounted or b""
        self._is_special = vocabulary.is_special
        self._finder = SpecialFinder(
            {vocabulary.tokens[i]: i for i, kind in enumerate(vocabulary.kinds) if kind in _SPLITTING}
        )

    def encode(self, text: str, add_special: bool, parse_special: bool, limit: int = ANY_NUMBER) -> list[int]:
        ids = [*self._prefix] if add_special else []
        at = 0
        for start, end, token_id in self._finder.find(text):
            # A control token that is plain text hides the tokens within it all the same, as in `tokenizers`.
            if not parse_special and self._is_special(token_id):
                continue
            if edges := self._edges.get(token_id):
                if edges.single_word and (_WORD.match(text, end) or _WORD.match(text[start - 1 : start])):
                    continue
                if edges.lstrip:
                    start = max(at, _before_spaces(text, start))
                if edges.rstrip:
                    end = _after_spaces(text, end)
            self._merge(text[at:start], ids, limit)
            ids.append(token_id)
            if len(ids) > limit:
                raise TooManyTokens(len(ids))
            at = end
        self._merge(text[at:], ids, limit)
        return ids + self._suffix if add_special else ids

    def _merge(self, text: str, ids: list[int], limit: int) -> None:
        """Append the ids of a fragment, which stands at the beginning or after a special token."""
        if not text:
            return
        text = " " + text if self._space_prefix else text
        if len(text) <= PIECE_CHARS:
            ids += encode_in_turn(self._merger.encode, text)
        else:
            for piece in pieces(text, self._merger.cut):
                long = len(piece) > STRETCH_CHARS
                if long:
                    ids += self._merger.encode_long(piece, limit)
                else:
                    ids += encode_in_turn(self._merger.encode, piece)
                if len(ids) > limit:
                    raise TooManyTokens(len(ids))


def _one(name: str, token_id: int | None) -> list[int]:
    if token_id is None:
        raise TokenizerError(f"the model wants a {name} token around texts but its files name none")
    return [token_id]


def _before_spaces(text: str, end: int) -> int:
    while end and _SPACES.fullmatch(text, end - 1, end):
        end -= 1
    return end


def _after_spaces(text: str, start: int) -> int:
    spaces = _SPACES.match(text, start)
    return spaces.end() if spaces else start


def longest_of(texts: Iterable[str]) -> int:
    """The length of the longest special token. Raises TokenizerError if it is so long that the search for it, which may
    compare all of it at every character of a text, would take long."""
    longest = max(map(len, texts), default=0)
    if longest > MAX_SPECIAL_CHARS:
        raise TokenizerError(
            f"a special token has {longest} characters; at most {MAX_SPECIAL_CHARS} are allowed"
        )
    return longest


class SpecialFinder:
    """Where tokens stand in a text: the leftmost, and of those the longest; no two overlap.

    The time is proportional to the text, whatever the tokens are. They are sorted. The last one that does not come
    after the text from some place on either begins that text, or shares its beginning with the tokens that do. Those
    are among its ancestors: the parent of a token is the longest other token that it begins with. `_jumps` skip
    ancestors so that few have to be looked at (Myers, "An applicative random-access stack", 1983).

    ids: token text → id. Raises TokenizerError if a token has more than MAX_SPECIAL_CHARS characters.
    """

    def __init__(self, ids: Mapping[str, int]) -> None:
        self._texts = sorted(text for text in ids if text)
        self._ids = array("q", (ids[text] for text in self._texts))
        self._longest = longest_of(self._texts)
        # By position in `_texts`; -1 = none.
        self._parents, self._jumps = self._ancestors()
        firsts = "".join(map(re.escape, dict.fromkeys(text[0] for text in self._texts)))
        self._first = re.compile(f"[{firsts}]") if firsts else None

    def find(self, text: str) -> Iterator[tuple[int, int, int]]:
        """(start, end, id) of each token, left to right."""
        if self._first is None:
            return
        done = 0
        for candidate in self._first.finditer(text):
            start = candidate.start()
            if start >= done and (found := self._longest_at(text, start)) >= 0:
                done = start + len(self._texts[found])
                yield start, done, self._ids[found]

    def _longest_at(self, text: str, start: int) -> int:
        """The position in `_texts` of the longest token that begins at `start`; -1 if there is none."""
        texts, jumps = self._texts, self._jumps
        node = bisect_right(texts, text[start : start + self._longest]) - 1
        while node >= 0 and not text.startswith(texts[node], start):
            jump = jumps[node]
            node = jump if jump >= 0 and not text.startswith(texts[jump], start) else self._parents[node]
        return node

    def _ancestors(self) -> tuple[array[int], array[int]]:
        parents, jumps = array("l"), array("l")
        depths, line = array("l"), list[int]()  # line: the ancestors of the token before, the oldest first
        for node, text in enumerate(self._texts):
            while line and not text.startswith(self._texts[line[-1]]):
                line.pop()
            parent = line[-1] if line else -1
            jump = jumps[parent] if parent >= 0 else -1
            if jump >= 0 and depths[parent] - depths[jump] == depths[jump] - _depth(depths, jumps[jump]):
                jumps.append(jumps[jump])
            else:
                jumps.append(parent)
            parents.append(parent)
            depths.append(_depth(depths, parent) + 1)
            line.append(node)
        return parents, jumps


def _depth(depths: array[int], node: int) -> int:
    return depths[node] if node >= 0 else -1
