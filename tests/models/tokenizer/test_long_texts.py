"""Long texts: cut without changing any token, and never refused when they fit."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Any
from unittest.mock import patch

import pytest
from fakes.throughput.peak import peak_bytes_of
from fakes.vocabularies import MERGES, VOCAB, texts
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)

from shoal.models.errors import TextTooLarge, TooManyTokens
from shoal.models.texts import Texts
from shoal.models.tokenizer import holders, long_texts, tokenizer
from shoal.models.tokenizer.bpe import ByteLevelBpe
from shoal.models.tokenizer.holders import Here
from shoal.models.tokenizer.long_texts import ANY_NUMBER, pieces
from shoal.models.tokenizer.ordinary_files import is_ordinary
from shoal.models.tokenizer.parts import Stated
from shoal.models.tokenizer.spm import SentencePieceBpe
from shoal.models.tokenizer.tokenizer import Tokenizer as Ours
from shoal.models.tokenizer.tokenizer_json import read_tokenizer_json
from shoal.models.tokenizer.vocabulary import BYTE_OF_CHAR, TokenKind, Vocabulary, inverse
from shoal.models.tokenizer.word_rules import PRE_TOKENIZERS

NO_TOKENS: dict[str, Any] = {"names": [], "added": [], "extra": []}
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPECIAL = ["<|im_start|>", "<s>", "</s>", "user", "<think>", "x_y"]
wordy = st.lists(
    st.one_of(
        texts, st.sampled_from(["the quick ", "a b", "fox, dog", "I've 12", "日本。語", "été!", *SPECIAL])
    ),
    max_size=12,
).map("".join)


@pytest.fixture(autouse=True)
def _tiny_pieces() -> Iterator[None]:
    with (
        patch.object(long_texts, "PIECE_CHARS", 3),
        patch.object(holders, "PIECE_CHARS", 1),
        patch.object(tokenizer, "PIECE_CHARS", 1),
    ):
        yield


@pytest.mark.parametrize("rule", sorted(PRE_TOKENIZERS))
@given(text=wordy)
@settings(max_examples=40)
def test_words_of_gguf_files_are_cut_where_no_token_is(rule: str, text: str) -> None:
    merger = ByteLevelBpe(VOCAB, Texts.of(MERGES), PRE_TOKENIZERS[rule])
    assert [i for piece in pieces(text, merger.cut) for i in merger.encode(piece)] == merger.encode(text)


SPM = [
    "<unk>",
    *(f"<0x{byte:02X}>" for byte in range(256)),
    "▁",
    "a",
    "b",
    "▁a",
    "ab",
    "▁ab",
    "b▁",
    "b▁a",
    "▁▁",
]
SPM += ["t", "h", "e", "th", "▁th", "▁the", "日", "本", "日本", "é"]


@given(
    text=wordy, pieces_of=st.lists(st.sampled_from(["a", "b", " ", "the", "日", "本", "é", "q"]), max_size=40)
)
def test_sentencepiece_is_cut_where_no_token_is(text: str, pieces_of: list[str]) -> None:
    kinds = bytes([TokenKind.UNKNOWN, *[TokenKind.BYTE] * 256, *[TokenKind.NORMAL] * (len(SPM) - 257)])
    vocab = Vocabulary(Texts.of(SPM), kinds, byte_level=False, unk_id=0)
    merger = SentencePieceBpe(vocab, inverse(SPM), [0.0, *(-float(i % 7) for i in range(len(SPM) - 1))])
    for each in (text, "".join(pieces_of)):
        whole = merger.encode(each)
        assert [i for piece in pieces(each, merger.cut) for i in merger.encode(piece)] == whole
        assert merger.encode_long(each, ANY_NUMBER) == whole


def bpe(**settings: Any) -> models.BPE:
    return models.BPE(VOCAB, [tuple(merge.split(" ")) for merge in MERGES], **settings)


def marked() -> models.BPE:
    vocab = {text: i for i, text in enumerate(SPM)}
    merges = [(a, b) for a in SPM[257:] for b in SPM[257:] if a + b in vocab]
    return models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)


def words(rule: str, **flags: Any) -> Any:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(rule), "isolated"),
            pre_tokenizers.ByteLevel(**{"add_prefix_space": False, "use_regex": False} | flags),
        ]
    )


MARKS = normalizers.Replace(" ", "▁")
FILES: dict[str, tuple[Any, Any, Any]] = {
    "gpt2": (bpe(), None, pre_tokenizers.ByteLevel(add_prefix_space=False)),
    "gpt2 with a space": (bpe(), None, pre_tokenizers.ByteLevel(add_prefix_space=True)),
    "llama3": (bpe(ignore_merges=True), None, words(LLAMA3)),
    "qwen": (bpe(), normalizers.NFC(), words(LLAMA3)),
    "lower": (bpe(), normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()]), words(LLAMA3)),
    "gemma": (marked(), MARKS, pre_tokenizers.Split(" ", "merged_with_previous")),
    "llama2": (marked(), normalizers.Sequence([normalizers.Prepend("▁"), MARKS]), None),
    "mistral": (marked(), None, pre_tokenizers.Metaspace(prepend_scheme="first", split=False)),
    "always": (marked(), None, pre_tokenizers.Metaspace(prepend_scheme="always", split=True)),
}


def file(name: str, special: list[str], flags: dict[str, bool] | None = None) -> Tokenizer:
    model, normalizer, pre_tokenizer = FILES[name]
    library = Tokenizer(model)
    if normalizer is not None:
        library.normalizer = normalizer
    if pre_tokenizer is not None:
        library.pre_tokenizer = pre_tokenizer
    library.add_special_tokens([AddedToken(text, normalized=False, **flags or {}) for text in special])
    return library


@pytest.mark.parametrize("name", FILES)
@given(
    text=wordy,
    special=st.lists(st.sampled_from([*SPECIAL, "quick", "a b", "fox"]), unique=True, max_size=3),
    flags=st.fixed_dictionaries({flag: st.booleans() for flag in ("lstrip", "rstrip", "single_word")}),
)
def test_ordinary_files_are_cut_where_no_token_is(
    name: str, text: str, special: list[str], flags: dict[str, bool]
) -> None:
    library = file(name, ["<b>", *special], flags)
    begin = library.token_to_id("<b>")
    library.post_processor = processors.TemplateProcessing(
        single="<b> $A <b> <b>" if special else "$A <b>", pair="$A $B", special_tokens=[("<b>", begin)]
    )
    data = library.to_str().encode()
    assert is_ordinary(data)
    here = Here(data, NO_TOKENS)
    for parse in (True, False):
        library.encode_special_tokens = not parse
        for add in (True, False):
            expected = library.encode(text, add_special_tokens=add).ids
            assert here.encode(text, add, parse, ANY_NUMBER) == expected


@pytest.mark.parametrize("name", [name for name in FILES if name != "mistral"])
def test_published_kinds_of_files_can_be_cut(name: str) -> None:
    cut, _, _ = Here(file(name, ["<|im_start|>"]).to_str().encode(), NO_TOKENS)._cutting()
    assert len([*pieces("the quick brown fox jumps, over the lazy dog", cut)]) > 2


SHRINKING = [
    "\u212a",
    "\uff21",
    "\U0001d400",
    "\u1112\u1161\u11ab",
    "\u03b1\u0313\u0300\u0345",
    "\u1fef",
    "  ",
    "a",
]


@pytest.mark.parametrize("normalizer", ["NFC", "NFD", "NFKC", "NFKD", "Lowercase", "Replace", None])
@given(text=st.lists(st.one_of(st.sampled_from(SHRINKING), texts), max_size=8).map("".join))
def test_a_text_never_has_fewer_tokens_than_is_said(normalizer: str | None, text: str) -> None:
    library = file("gpt2", ["<s>"])
    if normalizer == "Replace":
        library.normalizer = normalizers.Replace("\u212a", "a")
    elif normalizer is not None:
        library.normalizer = getattr(normalizers, normalizer)()
    ours = Ours(read_tokenizer_json(library.to_str().encode(), Stated({}, [], [], [])))
    assert ours._longest_bytes is not None
    assert ours._least_tokens(text) <= len(ours.encode(text))


@pytest.mark.parametrize(
    "normalizer",
    [
        normalizers.Strip(),
        normalizers.StripAccents(),
        normalizers.Replace(Regex(r"\s+"), " "),
        normalizers.Replace("a", ""),
    ],
)
def test_where_text_is_dropped_nothing_is_said(normalizer: Any) -> None:
    library = file("gpt2", [])
    library.normalizer = normalizer
    ours = Ours(read_tokenizer_json(library.to_str().encode(), Stated({}, [], [], [])))
    assert ours._least_tokens("a" * 100) == 0
    assert len(ours.encode("a" * 100, most=100)) <= 100


def gguf(tokens: Sequence[str] = (), merges: Sequence[str] = MERGES) -> Ours:
    tokens = tokens or sorted(VOCAB, key=lambda text: VOCAB[text])
    return Ours.from_gguf(
        {
            "tokenizer.ggml.model": "gpt2",
            "tokenizer.ggml.pre": "llama3",
            "tokenizer.ggml.add_bos_token": False,
            "tokenizer.ggml.tokens": [*tokens],
            "tokenizer.ggml.merges": [*merges],
        }
    )


@pytest.mark.parametrize(
    "text", ["word " * 3_000_000, "a" * 15_000_000, "\n" * 15_000_000, "日本語" * 1_700_000]
)
def test_what_cannot_fit_is_refused_at_once(text: str) -> None:
    ours, started = gguf(), time.process_time()
    with pytest.raises(TooManyTokens):
        ours.encode(text, most=8192)
    assert time.process_time() - started < 2


LACKING = "\x04\x1de"  # SmolLM2's vocabulary lacks a token for the first two


def lacking(name: str) -> Ours:
    """A vocabulary without tokens for some bytes, from a file of this kind."""
    kept = {text: number for number, text in enumerate(filter(_has_tokens, VOCAB))}
    merges = [it for it in MERGES if {it.replace(" ", ""), *it.split(" ")} <= kept.keys()]
    if name == "gguf":
        return gguf([*kept], merges)
    library = Tokenizer(models.BPE(kept, [tuple(it.split(" ", 1)) for it in merges]))
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return Ours(read_tokenizer_json(library.to_str().encode(), Stated({}, [], [], [])))


def _has_tokens(text: str) -> bool:
    return not any(BYTE_OF_CHAR.get(char) in LACKING.encode() for char in text)


@pytest.mark.parametrize("name", ["gguf", "json"])
@given(text=st.lists(st.one_of(st.sampled_from([*LACKING, "word ", "a"]), texts), max_size=8).map("".join))
def test_bytes_without_a_token_may_be_dropped_and_do_not_count(name: str, text: str) -> None:
    ours = lacking(name)
    assert ours._least_tokens(text) <= len(ours.encode(text))
    assert ours._least_tokens(LACKING * 100) == 0
    assert ours._least_tokens(LACKING + "a" * 1000) > 0


@pytest.mark.parametrize("name", ["normalizer", "words", "prefix"])
def test_more_than_single_bytes_may_be_dropped(name: str) -> None:
    kept = {text: number for number, text in enumerate(filter(_has_tokens, VOCAB))}
    prefix = {"continuing_subword_prefix": "##"} if name == "prefix" else {}
    library = Tokenizer(models.WordLevel(kept, "a") if name == "words" else models.BPE(kept, [], **prefix))
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if name == "normalizer":
        library.normalizer = normalizers.NFKC()
    ours = Ours(read_tokenizer_json(library.to_str().encode(), Stated({}, [], [], [])))
    text = ("\uff45" if name == "normalizer" else "z") * 10_000  # a full-width e, which is to become one
    assert len(ours.encode(text)) <= 1
    assert ours._least_tokens(text) == 0


def test_what_cannot_be_cut_is_tokenised_in_a_child(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = gguf()
    whole = ours.encode("é" * 3000)
    for name in ("STRETCH_CHARS", "PIECE_CHARS"):
        monkeypatch.setattr(f"shoal.models.tokenizer.special.{name}", 100)
    assert ours.encode("é" * 3000) == whole
    with pytest.raises(TooManyTokens):
        ours._encoder.encode("é" * 3000, False, True, 10)
    monkeypatch.setattr(holders, "STRETCH_CHARS", 100)
    monkeypatch.setattr(holders, "_TEXT_BYTES", 8 << 20)
    monkeypatch.setattr(holders, "_TEXT_BYTES_PER_CHAR", 0)
    with pytest.raises(TextTooLarge, match="place to cut"):
        ours.encode("é" * 1_000_000)


def test_what_cannot_fit_is_refused_without_a_copy() -> None:
    """With one character of four bytes, a text takes four for each, and so would what it is encoded into."""
    ours, text = gguf(), "\U0001f41f" + "word " * 1_000_000

    def refused() -> None:
        with pytest.raises(TooManyTokens):
            ours.encode(text, most=8192)

    assert peak_bytes_of(refused) < len(text)
