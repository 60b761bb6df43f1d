"""SentencePiece BPE: it equals the plain definition, also where scores are equal; its file; its spaces and bytes."""

from __future__ import annotations

import time
from contextlib import suppress
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from fakes.vocabularies import field, model_file
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.models.errors import TokenizerError
from shoal.models.texts import Texts
from shoal.models.tokenizer.spm import SentencePieceBpe
from shoal.models.tokenizer.spm_file import read_model
from shoal.models.tokenizer.tokenizer import Tokenizer
from shoal.models.tokenizer.vocabulary import Vocabulary, inverse

BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
WORDS = [
    "▁",
    "▁a",
    "a",
    "b",
    "ab",
    "ba",
    "aa",
    "aaa",
    "▁▁",
    "▁ab",
    "é",
    "日",
    "ab▁",
    "b▁b",
    "▁the",
    "t",
    "h",
    "e",
    "th",
]


def metadata(words: list[str], of_words: list[float], **changes: Any) -> dict[str, Any]:
    fields: dict[str, Any] = {
        "model": "llama",
        "tokens": ["<unk>", "<s>", "</s>", *BYTES, *words],
        "token_type": np.array([2, 3, 3] + [6] * 256 + [1] * len(words), dtype=np.int32),
        "scores": np.array([0.0] * 259 + of_words, dtype=np.float32),
        **changes,
    }
    return {f"tokenizer.ggml.{name}": value for name, value in fields.items() if value is not None}


def plain_merge(text: str, scores: dict[str, float]) -> list[str]:
    """The definition: the neighbours with the best score are merged again and again, of equals the leftmost."""
    symbols = list(text)
    while True:
        pairs = [a + b for a, b in pairwise(symbols)]
        known = [(scores[pair], -i) for i, pair in enumerate(pairs) if pair in scores]
        if not known:
            return symbols
        at = -max(known)[1]
        symbols[at : at + 2] = [pairs[at]]


vocabularies = st.dictionaries(
    st.text(alphabet="ab▁é", min_size=1, max_size=5), st.integers(-4, 0).map(float), min_size=1, max_size=40
)


@given(scores=vocabularies, text=st.text(alphabet="ab é▁日", max_size=40), prefix=st.booleans())
@settings(max_examples=800, deadline=None)
def test_equal_to_the_plain_definition(scores: dict[str, float], text: str, prefix: bool) -> None:
    scores.setdefault("▁", -9.0)  # without it bytes would spell the mark, which decodes to itself
    tokenizer = Tokenizer.from_gguf(metadata(list(scores), list(scores.values()), add_space_prefix=prefix))
    spelled = ((" " if prefix and text else "") + text).replace(" ", "▁")
    expected: list[str] = []
    for piece in plain_merge(spelled, scores):
        expected += [piece] if piece in scores else [f"<0x{byte:02X}>" for byte in piece.encode()]
    assert [tokenizer.id_to_token(i) for i in tokenizer.encode(text, add_special=False)] == expected
    assert tokenizer.decode(tokenizer.encode(text), skip_special=True) == text.replace("▁", " ")


def test_plain_text_never_becomes_a_control_or_byte_token() -> None:
    words = ["<", "s", ">", "<s", "s>", "0", "x", "4", "1", "<0", "x4", "1>", "<0x4"]
    tokenizer = Tokenizer.from_gguf(metadata(words, [0.0] * len(words), add_space_prefix=False))
    ids = tokenizer.encode("<s><0x41>", add_special=False, parse_special=False)
    assert [tokenizer.id_to_token(i) for i in ids] == ["<s", ">", "<0x4", "1>"]
    assert tokenizer.encode("<s>", add_special=False) == [1]


def test_special_tokens_begin_anew_with_the_space_prefix() -> None:
    tokenizer = Tokenizer.from_gguf(metadata(WORDS, [-float(i) for i in range(len(WORDS))]))
    ids = tokenizer.encode("a<s>a</s> a")
    assert [tokenizer.id_to_token(i) for i in ids] == ["<s>", "▁a", "<s>", "▁a", "</s>", "▁", "▁a"]
    assert tokenizer.decode([1, *ids[1:2]], skip_special=True) == "a"


def test_user_defined_runs_of_spaces_are_taken_from_the_text() -> None:
    words = ["▁", "a", "  ", "\n\n"]
    types = [2, 3, 3] + [6] * 256 + [1, 1, 4, 4]
    tokenizer = Tokenizer.from_gguf(metadata(words, [0.0] * 4, token_type=types, add_space_prefix=False))
    ids = tokenizer.encode("a   a\n\n\n", add_special=False, parse_special=False)
    assert [tokenizer.id_to_token(i) for i in ids] == ["a", "  ", "▁", "a", "\n\n", "<0x0A>"]
    assert tokenizer.decode(ids) == "a   a\n\n\n"


def test_phi3_special_tokens_swallow_white_space_behind_them() -> None:
    words = ["▁", "a", "\n", "<|user|>", "<|end|>", "<|endoftext|>"]
    types = [2, 3, 3] + [6] * 256 + [1, 1, 1, 4, 3, 3]
    plain = metadata(words, [0.0] * 6, token_type=types, add_space_prefix=False)
    text = "<|user|>\n a<|end|> \n<|endoftext|> a"
    swallowed = Tokenizer.from_gguf({**plain, "general.name": "My Phi3 tune"}).encode(text, add_special=False)
    kept = Tokenizer.from_gguf({**plain, "general.name": "Other"}).encode(text, add_special=False)
    first = 259
    assert swallowed == [first + 3, first + 1, first + 4, first + 5, first, first + 1]
    assert kept == [
        first + 3,
        first + 2,
        first,
        first + 1,
        first + 4,
        first,
        first + 2,
        first + 5,
        first,
        first + 1,
    ]


def test_unknown_characters_without_byte_tokens_are_one_unknown_token_per_run() -> None:
    tokens = ["<unk>", "a", "▁"]
    vocab = Vocabulary(Texts.of(tokens), bytes([2, 1, 1]), byte_level=False, unk_id=0)
    assert SentencePieceBpe(vocab, inverse(tokens), [0.0] * 3).encode("a日本a é") == [1, 0, 1, 2, 0]
    alone = Vocabulary(Texts.of(["a"]), bytes([1]), byte_level=False)
    with pytest.raises(TokenizerError, match="no unknown token"):
        SentencePieceBpe(alone, {"a": 0}, [0.0])


@pytest.mark.parametrize("text", ["a" * 100_000, " " * 100_000, "ab a " * 20_000, "ab" * 50_000], ids=len)
def test_long_prompts_do_not_take_quadratic_time(text: str) -> None:
    tokenizer = Tokenizer.from_gguf(metadata(WORDS, [-float(i) for i in range(len(WORDS))]))
    started = time.perf_counter()
    tokenizer.encode(text)
    assert time.perf_counter() - started < 5  # 0.3 s on an idle machine; quadratic time would be minutes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scores": [0.0]}, "has 1 entries for"),
        ({"scores": np.full(259 + len(WORDS), np.nan)}, "not finite"),
        ({"scores": ["x"] * (259 + len(WORDS))}, "not a list of numbers"),
        ({"add_space_prefix": 1}, "instead of true or false"),
    ],
)
def test_damaged_metadata_is_refused_in_one_line(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(TokenizerError, match=message) as caught:
        Tokenizer.from_gguf(metadata(WORDS, [0.0] * len(WORDS), **changes))
    assert "\n" not in str(caught.value)


def test_a_model_file_is_read() -> None:
    model = read_model(model_file(trainer=field(3, 2) + field(41, -1)))
    assert model.tokens == ("<unk>", "<s>", "</s>", "▁", "a", "▁a")
    assert model.scores == (0.0, 0.0, 0.0, -3.0, -4.0, -1.0)
    assert list(model.kinds) == [2, 3, 3, 1, 1, 1]
    assert (model.bos_id, model.eos_id, model.unk_id) == (None, 2, 0)
    assert model.add_space_prefix
    assert not read_model(model_file(normalizer=field(3, 0) + field(4, 0))).add_space_prefix


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "not a BPE model"),
        (model_file(trainer=field(3, 1)), "not a BPE model"),
        (model_file(normalizer=b""), "rewrites white space"),
        (model_file(normalizer=field(4, 0) + field(2, b"map")), "maps characters"),
        (model_file()[:-3], "damaged"),
        (b"\xff" * 40, "damaged"),
        (field(1, 7) + model_file(), "damaged"),
        (field(1, field(1, b"\xff")) + model_file(), "damaged"),
        (field(1, field(1, "x") + field(3, 99)) + model_file(), "damaged"),
    ],
)
def test_other_model_files_are_refused_in_one_line(data: bytes, message: str) -> None:
    with pytest.raises(TokenizerError, match=message) as caught:
        read_model(data)
    assert "\n" not in str(caught.value)


@given(data=st.binary(max_size=60), cut=st.integers(0, 120))
@settings(max_examples=300, deadline=None)
def test_no_bytes_crash_the_reader(data: bytes, cut: int) -> None:
    for damaged in (data, model_file()[:cut] + data):
        with suppress(TokenizerError):
            read_model(damaged)
