"""Byte-level BPE: text between special tokens → ids, by the `tokenizers` library.

Does not know the rules by which a text is cut into words before merging (`word_rules`), special tokens, BOS, files, or
how ids become text again.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

import tokenizers
from tokenizers import models, pre_tokenizers

from shoal.models.errors import TokenizerError
from shoal.models.texts import Texts

from .holders import encode_in_child, library_errors
from .long_texts import word_cut
from .vocabulary import BYTE_OF_CHAR
from .word_rules import PreTokenizer


class _Pairs(Sequence[tuple[str, str]]):
    """Merges as pairs of texts, made one by one; the library copies them, so a list of them would be wasted memory.

    bad: the merge that ended the iteration because it is not a pair.
    """

    def __init__(self, merges: Texts) -> None:
        self._merges = merges
        self.bad: str | None = None

    def __len__(self) -> int:
        return len(self._merges)

    def __getitem__(self, index: Any) -> Any:
        return next(islice(self, index, None))

    def __iter__(self) -> Iterator[tuple[str, str]]:
        for merge in self._merges:
            cut = merge.find(" ", 1)  # a left part may itself begin with a space
            if cut < 0:
                self.bad = merge
                return
            yield merge[:cut], merge[cut + 1 :]


class ByteLevelBpe:
    """Merges by rank over GPT-2's byte alphabet.

    ids: token text → id. merges: "left right" in rank order. Raises TokenizerError if a merge names a text
    that is not in the vocabulary.
    """

    def __init__(self, ids: dict[str, int], merges: Texts, rule: PreTokenizer) -> None:
        pairs = _Pairs(merges)
        with library_errors("the merges do not fit the vocabulary"):
            bpe = models.BPE(ids, pairs, ignore_merges=rule.whole_words)
            self._library = tokenizers.Tokenizer(bpe)
            words: list[pre_tokenizers.PreTokenizer] = [
                pre_tokenizers.Split(tokenizers.Regex(split), "isolated") for split in rule.splits
            ]
            words.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False))
            absent = [char for char in BYTE_OF_CHAR if char not in ids]
            if absent:
                # Bytes without a token are dropped, but their neighbours must not merge with each other.
                gap = tokenizers.Regex(f"[{''.join(map(re.escape, absent))}]")
                words.append(pre_tokenizers.Split(gap, "removed"))
            self._library.pre_tokenizer = pre_tokenizers.Sequence(words)
        if pairs.bad is not None:
            raise TokenizerError(f"the merge {pairs.bad[:60]!r} is not two texts with a space between them")

        self.cut = word_cut()
        self.uncounted: bytes | None = bytes(BYTE_OF_CHAR[char] for char in absent)

    def encode(self, text: str) -> list[int]:
        """Ids of a text without special tokens."""
        with library_errors("this text cannot be tokenised"):
            ids: list[int] = self._library.encode(text, add_special_tokens=False).ids
        return ids

    def encode_long(self, text: str, limit: int) -> list[int]:
        """The same for a text that cannot be cut. Raises TextTooLarge, TooManyTokens or Overloaded."""
        return encode_in_child(self._library.to_str().encode(), text, True, limit)
