"""Byte-level BPE from GGUF metadata: words are cut as the rules say and merged as `tokenizers` merges them."""

from __future__ import annotations

from typing import Any

import pytest
import regex
import tokenizers
from fakes.vocabularies import MERGES, VOCAB, texts
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers
from transformers.convert_slow_tokenizer import bytes_to_unicode

from shoal.models.errors import TokenizerError
from shoal.models.texts import Texts
from shoal.models.tokenizer.bpe import ByteLevelBpe
from shoal.models.tokenizer.tokenizer import Tokenizer
from shoal.models.tokenizer.word_rules import PRE_TOKENIZERS

CONTROL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
USER_DEFINED = ["<think>", "    "]


def metadata(pre: str = "smollm", **changes: Any) -> dict[str, Any]:
    tokens = [*VOCAB, *CONTROL, *USER_DEFINED]
    fields = {
        "model": "gpt2",
        "pre": pre,
        "tokens": tokens,
        "token_type": [1] * len(VOCAB) + [3] * len(CONTROL) + [4] * len(USER_DEFINED),
        "merges": MERGES,
        "bos_token_id": len(VOCAB) + 1,
        "eos_token_id": len(VOCAB) + 2,
        **changes,
    }
    return {f"tokenizer.ggml.{name}": value for name, value in fields.items() if value is not None}


SMOLLM = Tokenizer.from_gguf(metadata())
START, END, THINK, SPACES = len(VOCAB) + 1, len(VOCAB) + 2, len(VOCAB) + 3, len(VOCAB) + 4


@pytest.mark.parametrize("pre", sorted(PRE_TOKENIZERS))
@given(text=texts)
@settings(max_examples=40, deadline=None)
def test_words_are_cut_as_another_regex_engine_cuts(pre: str, text: str) -> None:
    words = [text]
    for split in PRE_TOKENIZERS[pre].splits:
        pattern = regex.compile(split)
        words = [part for word in words for part in _isolated(pattern, word)]
    library = ByteLevelBpe(VOCAB, Texts.of(MERGES), PRE_TOKENIZERS[pre])._library
    spelled = [word for word, _ in library.pre_tokenizer.pre_tokenize_str(text)]
    byte_of = {char: byte for byte, char in bytes_to_unicode().items()}
    assert [bytes(byte_of[char] for char in word).decode() for word in spelled] == words


def _isolated(pattern: Any, text: str) -> list[str]:
    parts, at = [], 0
    for match in pattern.finditer(text):
        parts += [text[at : match.start()], match[0]]
        at = match.end()
    return [part for part in [*parts, text[at:]] if part]


@given(text=texts)
@settings(max_examples=200, deadline=None)
def test_ids_and_text_are_those_of_the_library(text: str) -> None:
    library = tokenizers.Tokenizer(models.BPE(VOCAB, [tuple(merge.split(" ")) for merge in MERGES]))
    library.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    library.decoder = decoders.ByteLevel()
    library.add_special_tokens([tokenizers.AddedToken(text, normalized=False) for text in CONTROL])
    library.add_tokens([tokenizers.AddedToken(text, normalized=False) for text in USER_DEFINED])
    ids = SMOLLM.encode(text)
    assert ids == library.encode(text).ids
    assert SMOLLM.decode(ids) == text == library.decode(ids, skip_special_tokens=False)


@given(ids=st.lists(st.integers(0, len(VOCAB) + 9), max_size=20))
@settings(max_examples=200, deadline=None)
def test_token_bytes_make_up_the_text(ids: list[int]) -> None:
    data = b"".join(map(SMOLLM.token_bytes, ids))
    assert SMOLLM.decode(ids, skip_special=True) == data.decode(errors="replace")


def test_control_tokens_are_recognised_only_when_asked_for() -> None:
    text = "<|im_start|>user    <think>"
    parsed, plain = SMOLLM.encode(text), SMOLLM.encode(text, parse_special=False)
    assert parsed[0] == START
    assert START not in plain
    assert parsed[-2:] == plain[-2:] == [SPACES, THINK]
    assert SMOLLM.decode(parsed) == SMOLLM.decode(plain) == text
    assert SMOLLM.decode(parsed, skip_special=True) == "user    <think>"
    assert SMOLLM.token_bytes(START) == b""
    assert SMOLLM.is_special(START)
    assert not SMOLLM.is_special(THINK)


def test_the_longest_special_token_wins_and_overlaps_go_to_the_left() -> None:
    tokens = [*VOCAB, "<a>", "<a><b>", "<b><c>", "b>"]
    kinds = [1] * len(VOCAB) + [3, 3, 3, 4]
    tokenizer = Tokenizer.from_gguf(
        metadata(tokens=tokens, token_type=kinds, bos_token_id=None, eos_token_id=None)
    )
    first = len(VOCAB)
    assert tokenizer.encode("<a><b><c>")[0] == first + 1
    assert tokenizer.encode("<b><c><a>") == [first + 2, first]


def test_what_stands_around_a_text() -> None:
    for changes, expected in [
        ({}, [5]),
        ({"add_bos_token": True}, [START, 5]),
        ({"add_bos_token": True, "add_eos_token": True}, [START, 5, END]),
        ({"pre": "llama-bpe"}, [START, 5]),
        ({"pre": "llama-bpe", "add_bos_token": False}, [5]),
    ]:
        tokenizer = Tokenizer.from_gguf(metadata(**changes))
        text = tokenizer.decode([5])
        assert tokenizer.encode(text) == expected
        assert tokenizer.encode(text, add_special=False) == [5]
    assert Tokenizer.from_gguf(metadata(add_bos_token=True)).encode("") == [START]


def test_end_tokens_are_those_named_and_those_known_by_text() -> None:
    assert {SMOLLM.id_to_token(i) for i in SMOLLM.stop_ids} == {"<|endoftext|>", "<|im_end|>"}
    tokens = [*VOCAB, "<|end|>", "<|return|>", "<|call|>", "<|fim_pad|>", "<end>", "<|channel|>"]
    kinds = [1] * len(VOCAB) + [3, 3, 3, 3, 3, 3]
    oss = Tokenizer.from_gguf(
        metadata(
            tokens=tokens, token_type=kinds, bos_token_id=None, eos_token_id=None, eot_token_id=len(VOCAB) + 4
        )
    )
    assert {oss.id_to_token(i) for i in oss.stop_ids} == {"<|return|>", "<|call|>", "<|fim_pad|>", "<end>"}
    assert not oss.is_special(len(VOCAB))  # there "<|end|>" closes a message, and the reader sees it
    assert not oss.is_special(len(VOCAB) + 5)


def test_an_end_token_marked_as_text_is_a_control_token() -> None:
    tokenizer = Tokenizer.from_gguf(metadata(token_type=[1] * len(metadata()["tokenizer.ggml.tokens"])))
    assert tokenizer.is_special(END)
    assert not tokenizer.is_special(START)


def test_bytes_without_a_token_are_dropped_and_nothing_merges_across() -> None:
    shown = bytes_to_unicode()[0x14]
    tokens = [text if text != shown else "gone" for text in metadata()["tokenizer.ggml.tokens"]]
    tokenizer = Tokenizer.from_gguf(metadata(tokens=tokens))
    assert tokenizer.encode("th\x14e") == tokenizer.encode("th") + tokenizer.encode("e")


def test_lone_surrogates_become_replacement_characters() -> None:
    assert SMOLLM.decode(SMOLLM.encode("a\ud800b")) == "a\ufffdb"


def test_ids_outside_the_vocabulary_stand_for_nothing() -> None:
    beyond = SMOLLM.vocab_size + 7
    assert SMOLLM.token_bytes(beyond) == SMOLLM.token_bytes(-1) == b""
    assert SMOLLM.decode([5, beyond, -1]) == SMOLLM.decode([5])
    assert not SMOLLM.is_special(beyond)
    with pytest.raises(TokenizerError, match="there is no token"):
        SMOLLM.id_to_token(beyond)
    assert SMOLLM.token_to_id("no such token") is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": None}, "holds no tokenizer"),
        ({"model": "bert"}, "'bert' is not supported"),
        ({"model": 7}, "instead of a text"),
        ({"pre": "martian"}, "'martian' is not supported; supported are .*smollm"),
        ({"tokens": None}, "has no tokenizer.ggml.tokens"),
        ({"tokens": [], "token_type": []}, "1 to"),
        ({"tokens": ["a", 7]}, "not a list of texts"),
        ({"tokens": "abc"}, "not a list of texts"),
        ({"tokens": ["a", "b", "a"], "token_type": [1, 1, 1]}, "'a' twice"),
        ({"token_type": [1, 2]}, "has 2 entries for"),
        ({"token_type": ["x"]}, "not a list of numbers"),
        ({"token_type": [[1], [1, 2]]}, "not a list of numbers"),
        ({"token_type": 1}, "not a list of numbers"),
        ({"merges": None}, "has no tokenizer.ggml.merges"),
        ({"merges": ["th"]}, "is not two texts"),
        ({"merges": ["qq zz"]}, "merges do not fit"),
        ({"merges": [7]}, "not a list of texts"),
        ({"eos_token_id": "x"}, "instead of a token id"),
        ({"add_bos_token": "yes"}, "instead of true or false"),
        ({"add_bos_token": True, "bos_token_id": None}, "wants a BOS token"),
    ],
)
def test_damaged_metadata_is_refused_in_one_line(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(TokenizerError, match=message) as caught:
        Tokenizer.from_gguf(metadata(**changes))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["bos", "eos", "eot", "eom", "unknown", "padding"])
@pytest.mark.parametrize("value", [-1, 99_999, 1 << 40])
def test_a_special_id_outside_the_vocabulary_is_no_token(name: str, value: int) -> None:
    """Some converters write one for "none"; llama.cpp warns and goes on."""
    sound = Tokenizer.from_gguf(metadata())
    odd = Tokenizer.from_gguf(metadata(**{f"{name}_token_id": value, "add_bos_token": name == "bos"}))
    (said,) = odd.warnings
    assert f"{name}_token_id={value} is outside the vocabulary" in said
    assert odd.encode("the ring") == sound.encode("the ring", add_special=False)
    assert odd.bos_id == (None if name == "bos" else sound.bos_id)
    assert odd.eos_id == (None if name == "eos" else sound.eos_id)


def test_a_chat_template_is_handed_on() -> None:
    assert SMOLLM.chat_template is None
    assert (
        Tokenizer.from_gguf({**metadata(), "tokenizer.chat_template": "{{ x }}"}).chat_template == "{{ x }}"
    )
    with pytest.raises(TokenizerError):
        Tokenizer.from_gguf({**metadata(), "tokenizer.chat_template": 7})
