"""How a text is cut into words before merging: the published rules of each family, by the names that GGUF files give
them, and in the words of tokenizer.json.

The rules for GGUF are written so that the `tokenizers` library's regex engine cuts as llama.cpp does.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

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

# The published rules of each family in the words of its tokenizer.json. All are linear in the text.
_ENDINGS = "'s|'t|'re|'ve|'m|'ll|'d"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_CASED = rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{{0}}|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{{0}}"
_REST_CASED = _REST.replace(r"[\r\n]*", r"[\r\n/]*")
REGEXES = frozenset(
    {
        *(split for rule in PRE_TOKENIZERS.values() for split in rule.splits),
        *(
            rf"(?i:{_ENDINGS})|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{digits}|{_REST}"
            for digits in ("", "{1,2}", "{1,3}")
        ),
        rf"(?i:{_ENDINGS})|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}|"
        + _REST.replace(r"\p{L}", r"\p{L}\p{M}"),
        *(
            f"{_CASED.replace('{0}', endings)}|{digits}|{_REST_CASED}"
            for endings in ("", f"(?i:{_ENDINGS})?")
            for digits in (r"\p{N}", r"\p{N}{1,3}")
        ),
        *(r"\p{N}{1,3}", r"\d", r"\d{1,3}", "[0-9]", "[0-9][0-9][0-9]", r"\s+", " ", r"[\r\n]"),
    }
)
