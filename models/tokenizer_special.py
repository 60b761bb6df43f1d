"""Cutting a text at its special tokens.

Knows the order in which overlapping special tokens win (the longest first, as in llama.cpp) and which are
plain text when control tokens are not to be recognised. Deliberately does not know how the text between
them is merged into tokens: that is the merger's.
"""

from __future__ import annotations

from typing import Protocol

from shoal.models.tokenizer_vocab import TokenKind, Vocabulary

_SPACES = " \t\n\v\f\r"
_STEM_CHARS = 4


class Merger(Protocol):
    """Text without special tokens → ids."""

    def encode(self, text: str) -> list[int]: ...


class SpecialSplitter:
    """Text → ids: special tokens by their text, the merger for what stands between them.

    strip_after: special tokens that swallow the white space behind them.
    """

    def __init__(
        self, vocabulary: Vocabulary, merger: Merger, strip_after: frozenset[int] = frozenset()
    ) -> None:
        self._merger = merger
        self._space_prefix = vocabulary.add_space_prefix
        self._strip_after = strip_after
        kinds, tokens = vocabulary.kinds, vocabulary.tokens
        wanted = {TokenKind.CONTROL, TokenKind.UNKNOWN, TokenKind.USER_DEFINED}
        special = [i for i, kind in enumerate(kinds) if kind in wanted]
        special.sort(key=lambda i: len(tokens[i].encode("utf-8", "replace")), reverse=True)
        # By their first characters, so that a text without these is done with the whole group at once.
        self._stems = {tokens[i][:_STEM_CHARS] for i in special}
        self._special = [(tokens[i], i, kinds[i] != TokenKind.USER_DEFINED) for i in special]

    def encode(self, text: str, parse_special: bool) -> list[int]:
        ids: list[int] = []
        after_special = True
        for fragment in self._split(text, parse_special):
            if isinstance(fragment, int):
                ids.append(fragment)
            else:
                ids += self._merger.encode(
                    " " + fragment if after_special and self._space_prefix else fragment
                )
            after_special = isinstance(fragment, int)
        return ids

    def _split(self, text: str, parse_special: bool) -> list[str | int]:
        """The text as fragments of plain text and ids of special tokens."""
        fragments: list[str | int] = [text] if text else []
        stems = {stem for stem in self._stems if stem in text}
        for token, token_id, control in self._special:
            if token[:_STEM_CHARS] in stems and (parse_special or not control) and token in text:
                fragments = self._split_at(fragments, token, token_id)
        return fragments

    def _split_at(self, fragments: list[str | int], token: str, token_id: int) -> list[str | int]:
        split: list[str | int] = []
        for fragment in fragments:
            if isinstance(fragment, int):
                split.append(fragment)
                continue
            head, *tails = fragment.split(token)
            if head:
                split.append(head)
            for tail in tails:
                split.append(token_id)
                if token_id in self._strip_after:
                    tail = tail.lstrip(_SPACES)
                if tail:
                    split.append(tail)
        return split
