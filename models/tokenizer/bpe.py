"""Byte-level BPE: text between special tokens → ids, by the `tokenizers` library.

Knows the pre-tokenizer rules (how a text is cut into words before merging) by the names that GGUF files
give them. The rules are the published ones of each model, written so that the library's regex engine cuts
as llama.cpp does. Does not know special tokens, BOS, files, or how ids become text again.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any

import tokenizers
from tokenizers import models, pre_tokenizers

from shoal.models.errors import TokenizerError, one_line
from shoal.models.texts import Texts

from .vocabulary import BYTE_OF_CHAR

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# Case by case instead of (?i:...): case folding would also take "ſ" for an "s".
_CONTRACTION = r"'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD]"
_TAIL = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = rf"{_CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{_TAIL}"
_QWEN2 = rf"{_CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}|{_TAIL}"
_QWEN35 = (
    rf"{_CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}"
    r"| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Words by case: capitals then small letters, or capitals alone.
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED_TAIL = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_GPT4O = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+(?:{_CONTRACTION})?"
    rf"|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*(?:{_CONTRACTION})?|\p{{N}}{{1,3}}|{_CASED_TAIL}"
)
_TEKKEN = rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*|\p{{N}}|{_CASED_TAIL}"
_DEEPSEEK3 = (
    r"\p{N}{1,3}",
    "[一-龥぀-ゟ゠-ヿ]+",
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
)
_DEEPSEEK_LETTERS = (
    "A-Za-zµÀ-ÖØ-öø-ƺƼ-ƿǄ-ʓʕ-ʯͰ-ͳͶͷͻ-ͽͿΆΈ-ΊΌΎ-ΡΣ-ϵϷ-ҁҊ-ԯԱ-ՖႠ-ჅᎠ-Ᏽᏸ-ᏽᲐ-ᲺᲽ-Ჿᴀ-ᴫᵫ-ᵷᵹ-ᶚḀ-ἕἘ-Ἕἠ-ὅὈ-Ὅ"
    "ὐ-ὗὙὛὝὟ-ώᾀ-ᾴᾶ-ᾼιῂ-ῄῆ-ῌῐ-ΐῖ-Ίῠ-Ῥῲ-ῴῶ-ῼℂℇℊ-ℓℕℙ-ℝℤΩℨK-ℭℯ-ℴℹℼ-ℿⅅ-ⅉⅎↃↄⰀ-ⱻⱾ-ⳤⳫ-ⳮⳲⳳꙀ-ꙭꚀ-ꚛꜢ-ꝯꝱ-ꞇꞋ-"
    "ꞎꭰ-ꮿﬀ-ﬆﬓ-ﬗＡ-Ｚａ-ｚ𐐀-𐑏𐒰-𐓓𐓘-𐓻𐲀-𐲲𐳀-𐳲𑢠-𑣟𞤀-𞥃"
)
_DEEPSEEK = (
    r"[\r\n]",
    rf"\s?[{_DEEPSEEK_LETTERS}]+",
    r"\s?[!-/:-~！-／：-～‘-‟　-。]+",
    r"\s+$",
    "[一-龥ࠀ-一가-퟿]+",
    r"\p{N}+",
)


@dataclass(frozen=True)
class PreTokenizer:
    """How one family of models cuts text into words.

    splits: regexes applied one after the other, each within the pieces of the one before.
    whole_words: a word that is a token is taken whole, whatever the merges say (`ignore_merges`).
    add_bos: whether a text begins with BOS when the file does not say.
    """

    splits: tuple[str, ...]
    whole_words: bool = False
    add_bos: bool = False


_FAMILIES: tuple[tuple[tuple[str, ...], PreTokenizer], ...] = (
    (("gpt-2", "olmo", "mpt", "phi-2", "exaone4", "trillion"), PreTokenizer((_GPT2,))),
    (("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone"), PreTokenizer((r"\p{N}", _GPT2))),
    (
        ("llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "lfm2"),
        PreTokenizer((_LLAMA3,), whole_words=True, add_bos=True),
    ),
    (("dbrx", "smaug-bpe"), PreTokenizer((_LLAMA3,))),
    (("qwen2", "deepseek-r1-qwen", "stablelm2", "megrez", "hunyuan", "solar-open"), PreTokenizer((_QWEN2,))),
    (("qwen35",), PreTokenizer((_QWEN35,))),
    (("gpt-4o", "llama4"), PreTokenizer((_GPT4O,))),
    (("tekken",), PreTokenizer((_TEKKEN,), whole_words=True, add_bos=True)),
    (("deepseek-v3",), PreTokenizer(_DEEPSEEK3)),
    (("deepseek-llm",), PreTokenizer(_DEEPSEEK)),
    (("default",), PreTokenizer((r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]"))),
)
PRE_TOKENIZERS: Mapping[str, PreTokenizer] = {name: rule for names, rule in _FAMILIES for name in names}


@contextmanager
def library_errors(doing: str) -> Iterator[None]:
    """Translate what the `tokenizers` library raises, its Rust panics included, into TokenizerError."""
    try:
        yield
    except BaseException as error:
        # A panic is an exception of pyo3's that derives from BaseException and that no module exports.
        if isinstance(error, Exception) or type(error).__name__ == "PanicException":
            raise TokenizerError(f"{doing}: {one_line(error)}") from error
        raise


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
            if absent := [char for char in BYTE_OF_CHAR if char not in ids]:
                # Bytes without a token are dropped, but their neighbours must not merge with each other.
                gap = tokenizers.Regex(f"[{''.join(map(re.escape, absent))}]")
                words.append(pre_tokenizers.Split(gap, "removed"))
            self._library.pre_tokenizer = pre_tokenizers.Sequence(words)
        if pairs.bad is not None:
            raise TokenizerError(f"the merge {pairs.bad[:60]!r} is not two texts with a space between them")

    def encode(self, text: str) -> list[int]:
        """Ids of a text without special tokens."""
        with library_errors("this text cannot be tokenised"):
            ids: list[int] = self._library.encode(text, add_special_tokens=False).ids
        return ids
