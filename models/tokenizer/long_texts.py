"""Long texts: how few tokens they can have, and the places where they can be cut without changing any token.

A text that cannot fit is refused before it is tokenised, and others are tokenised piece by piece, so that neither much
memory is taken nor the interpreter's lock kept for long. Does not tokenise.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import pairwise
from typing import Any

from shoal.models.turns import FairLock

from .vocabulary import SPACE_MARK

PIECE_CHARS = 1 << 15  # which take some tens of milliseconds
STRETCH_CHARS = 1 << 16  # what cannot be cut and is longer than this is tokenised in a child process
SHORT_CHARS = 1 << 12  # whatever a normalizer makes of these, it is soon done
NORMALISED_CHARS = 1 << 18  # whose normalised form is longer is tokenised in a child process, too
MOST_CHARS = 1 << 21
TURN_CHARS = 1 << 12  # what is longer is tokenised one after another
ANY_NUMBER = 1 << 62  # of tokens

# Of the largest scripts.
_LETTERS = "A-Za-z\u0430-\u044f\u0410-\u042f\u3041-\u3096\u30a1-\u30fa\u4e00-\u9fa5\uac00-\ud7a3"
_LETTER = re.compile(f"[{_LETTERS}]")
# Where texts are cut into words by one of the published rules, no word goes on from a letter to one of these. The
# apostrophe is not among them, because of contractions.
_AFTER_LETTERS = ' \t\r\n0123456789!"#$%&()*+,-./:;<=>?@[\\]^_`{|}~\u3001\u3002\uff01\uff0c\uff1a\uff1b\uff1f'
# How many bytes of a text one byte of the normalised text stands for at most: three of U+212A (the Kelvin sign) for
# a K, nine of Hangul letters for a syllable of three, four of U+1D400 (a mathematical A) for an A.
_SHRINKING = {"NFC": 4, "NFD": 4, "NFKC": 4, "NFKD": 4, "Lowercase": 4, "Prepend": 1, "ByteLevel": 1}
_CHANGING_LETTERS_ONLY = {"NFC", "NFD", "NFKC", "NFKD", "Lowercase"}
_TO_MARKS = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE_MARK}
_MARK_BEFORE = {"type": "Prepend", "prepend": SPACE_MARK}

_Part = Mapping[str, Any] | None
_TURNS = FairLock()


def encode_in_turn(encode: Callable[[str], list[int]], text: str) -> list[int]:
    """The ids of a text. Of long ones, one is worked on at a time, and clients take turns: the interpreter's lock is
    kept meanwhile, so several at once would not end sooner, and all else would have to wait for each of them."""
    if len(text) <= TURN_CHARS:
        return encode(text)
    with _TURNS.held():
        return encode(text)


def far_beyond(most: int) -> int:
    """Where to stop counting the tokens of a text that may have `most`. Until there the exact number is worth having,
    for the message."""
    return 4 * most + (1 << 16)


def pieces(text: str, cut: re.Pattern[str] | None) -> Iterator[str]:
    """The text in pieces of PIECE_CHARS or more; what `cut` matches is between them. One piece if that is None."""
    start = 0
    while cut is not None and len(text) - start > PIECE_CHARS:
        found = cut.search(text, start + PIECE_CHARS)
        if found is None:
            break
        yield text[start : found.start()]
        start = found.end()
    yield text[start:]


def word_cut(special: Iterable[str] = ()) -> re.Pattern[str] | None:
    """Where texts can be cut that are cut into words by published rules anyway, without cutting a special token."""
    inside = {right for text in special for left, right in pairwise(text) if _LETTER.match(left)}
    right = "".join(re.escape(char) for char in _AFTER_LETTERS if char not in inside)
    return re.compile(f"(?<=[{_LETTERS}])(?=[{right}])") if right else None


def space_cut(
    tokens: Iterable[str], special: Iterable[str] = (), *, dropped: bool = False
) -> re.Pattern[str] | None:
    """Where texts can be cut whose words are told apart only by the SPACE_MARK in their tokens: before a space, unless
    a token goes on there. dropped: a mark is put before every piece, so the space belongs to none."""
    tokens = [*tokens]
    before = {left for text in tokens for left, right in pairwise(text) if right == SPACE_MARK}
    special = [*special]
    if SPACE_MARK not in tokens or any(" " in text or _LETTER.match(text) for text in special):
        return None
    joined = "".join(map(re.escape, before - {SPACE_MARK}))
    unless = f"(?<![{joined}])" if joined else ""
    space = " " if dropped else "(?= )"
    return re.compile(f"(?<=[{_LETTERS}]){unless}{space}(?= ?[A-Za-z])")


def steps_of(part: _Part) -> list[Mapping[str, Any]]:
    """The steps of a normalizer, pre-tokenizer or decoder in order, sequences within sequences unrolled."""
    if part is None:
        return []
    if part.get("type") != "Sequence":
        return [part]
    inner = next(value for key, value in part.items() if key != "type")
    return [step for each in inner for step in steps_of(each)]


def normalised_chars(text: str, normalizer: _Part) -> int:
    """How many characters an ordinary normalizer makes of a text; no more than MOST_CHARS are counted. Compatibility
    forms make 18 of some, replacements four of one, and a text takes the time and memory of its normalised form."""
    for step in steps_of(normalizer):
        match step["type"]:
            case "NFC" | "NFD" | "NFKC" | "NFKD" as form if not text.isascii():
                text = unicodedata.normalize(form, text)
            case "Replace" if "String" in step["pattern"]:
                text = text.replace(step["pattern"]["String"], step["content"])
            case "ByteLevel" if not text.isascii():
                text = text.encode().decode("latin-1")
        if len(text) > MOST_CHARS:
            return MOST_CHARS
    return len(text)


def file_cut(
    normalizer: _Part, pre_tokenizer: _Part, tokens: Iterable[str], special: list[str], swallowing: list[str]
) -> re.Pattern[str] | None:
    """Where texts of an ordinary tokenizer.json can be cut. swallowing: the special tokens that take the white space
    after them."""
    if any(_LETTER.match(text[-1:]) for text in swallowing):
        return None
    before, splits = steps_of(normalizer), steps_of(pre_tokenizer)
    kinds = {step["type"] for step in splits}
    words = any(map(_is_word_rule, splits))
    if words and {step["type"] for step in before} <= _CHANGING_LETTERS_ONLY:
        if not kinds <= {"Split", "ByteLevel", "Digits", "Punctuation"}:
            return None
        spaced = any(step["type"] == "ByteLevel" and step.get("add_prefix_space", True) for step in splits)
        cut = word_cut(special)
        if not spaced or cut is None:
            return cut
        return re.compile(cut.pattern + "(?= )")  # what begins with a space gets no other
    if before in ([_TO_MARKS], [_MARK_BEFORE, _TO_MARKS]) and all(map(_is_space_split, splits)):
        return space_cut(tokens, special, dropped=len(before) == 2)
    if not before and kinds == {"Metaspace"} and splits[0].get("replacement") == SPACE_MARK:
        return space_cut(tokens, special)
    return None


def _is_word_rule(step: Mapping[str, Any]) -> bool:
    """Whether a step cuts texts into words by one of the published rules (`ordinary_files`); those end like this."""
    if step["type"] == "ByteLevel":
        return bool(step.get("use_regex", True))
    return step["type"] == "Split" and str(step["pattern"].get("Regex")).endswith(r"|\s+")


def _is_space_split(step: Mapping[str, Any]) -> bool:
    """Of no effect where spaces have been replaced, as in Gemma's files."""
    return bool(step["type"] == "Split" and step["pattern"].get("String") == " ")


def shrinking(normalizer: _Part, pre_tokenizer: _Part) -> int | None:
    """How many bytes of a text become one at most, before it is merged into tokens; None if that is not known, because
    something is dropped."""
    factor = 1
    for step in steps_of(normalizer):
        if step["type"] == "Replace":
            old, new = step["pattern"].get("String", ""), step["content"]
            if not old or not new:
                return None
            factor *= max(1, -(-len(old.encode()) // len(new.encode())))
        elif step["type"] in _SHRINKING:
            factor *= _SHRINKING[step["type"]]
        else:
            return None
    for step in steps_of(pre_tokenizer):
        dropping = step.get("behavior") == "Removed" and not (step.get("invert") and _is_word_rule(step))
        if dropping or step["type"] not in ("ByteLevel", "Digits", "Metaspace", "Punctuation", "Split"):
            return None
    return factor
