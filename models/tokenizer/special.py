"""Cutting a text at its special tokens.

Knows that the leftmost special token wins, and the longest of those that begin there (as in `tokenizers`), and
which of them are plain text when control tokens are not to be recognised. Does not know how the text between them
is merged into tokens: the merger does.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from typing import Protocol

from shoal.models.errors import TokenizerError

from .vocabulary import SPECIAL_KINDS, TokenKind, Vocabulary

_SPACES = re.compile(r"[ \t\n\v\f\r]*")


class Merger(Protocol):
    """Text without special tokens → ids."""

    def encode(self, text: str) -> list[int]: ...


class SpecialSplitter:
    """Text → ids: special tokens by their text, the merger for what stands between them.

    add_bos, add_eos: whether they stand around a text. strip_after: special tokens that swallow the white space
    after them. Raises TokenizerError if BOS or EOS is wanted and the vocabulary names none.
    """

    def __init__(
        self,
        vocabulary: Vocabulary,
        merger: Merger,
        *,
        add_bos: bool,
        add_eos: bool,
        strip_after: frozenset[int] = frozenset(),
    ) -> None:
        self._merger = merger
        self._prefix = _one("BOS", vocabulary.bos_id) if add_bos else []
        self._suffix = _one("EOS", vocabulary.eos_id) if add_eos else []
        self._space_prefix = vocabulary.add_space_prefix
        self._strip_after = strip_after
        self._always = _Finder(vocabulary, {TokenKind.USER_DEFINED})
        self._parsed = _Finder(vocabulary, {TokenKind.USER_DEFINED, *SPECIAL_KINDS})

    def encode(self, text: str, add_special: bool, parse_special: bool) -> list[int]:
        ids = [*self._prefix] if add_special else []
        at = 0
        for start, end, token_id in (self._parsed if parse_special else self._always).find(text):
            self._merge(text[at:start], ids)
            ids.append(token_id)
            at = end
            if token_id in self._strip_after and (spaces := _SPACES.match(text, end)):
                at = spaces.end()
        self._merge(text[at:], ids)
        return ids + self._suffix if add_special else ids

    def _merge(self, text: str, ids: list[int]) -> None:
        """Append the ids of a fragment, which stands at the beginning or after a special token."""
        if text:
            ids += self._merger.encode(" " + text if self._space_prefix else text)


def _one(name: str, token_id: int | None) -> list[int]:
    if token_id is None:
        raise TokenizerError(f"the model wants a {name} token around texts but its files name none")
    return [token_id]


class _Finder:
    """Where tokens of some kinds stand in a text, in time proportional to its length however many tokens there are."""

    def __init__(self, vocabulary: Vocabulary, kinds: Collection[int]) -> None:
        self._ids = {vocabulary.tokens[i]: i for i, kind in enumerate(vocabulary.kinds) if kind in kinds}
        lengths: dict[str, set[int]] = {}
        for token in self._ids:
            lengths.setdefault(token[0], set()).add(len(token))
        self._lengths = {first: sorted(of, reverse=True) for first, of in lengths.items()}
        firsts = "".join(map(re.escape, self._lengths))
        self._first = re.compile(f"[{firsts}]") if firsts else None

    def find(self, text: str) -> Iterator[tuple[int, int, int]]:
        """(start, end, id) of each token, left to right."""
        if self._first is None:
            return
        done = 0
        for candidate in self._first.finditer(text):
            start = candidate.start()
            if start < done:
                continue
            for length in self._lengths[text[start]]:
                token_id = self._ids.get(text[start : start + length])
                if token_id is not None:
                    done = start + length
                    yield start, done, token_id
                    break
