"""Small vocabularies for the tokenizer tests: a trained byte-level BPE, a SentencePiece file, texts to cut."""

from __future__ import annotations

import json
import struct
import unicodedata

import tokenizers
from hypothesis import strategies as st
from tokenizers import models, pre_tokenizers, trainers

CORPUS = [
    "The quick brown fox doesn't jump over the lazy dog, it'll walk. I'VE SEEN 1234567 of them!",
    "def f(x):\n    return {'a': x ** 2}  # comment\n\n\tpass\r\n" * 3,
    "naïve café Straße, Привет мир, γειά σου, 你好世界, こんにちは, 안녕하세요, नमस्ते, مرحبا ١٢٣ 😀🇩🇪",
] * 3

# Engines have tables of different Unicode versions, so the rules are compared on characters that all of them know.
known = st.characters(exclude_categories=["Cs", "Cn"]).filter(lambda char: unicodedata.category(char) != "Cn")
pieces = st.one_of(
    known,
    st.sampled_from(
        [" ", "  ", "\n", "\r\n", "\t", "\u00a0", "\u3000", "\u0085", "'s", "'LL", "'ſ", "1", "234", "½"]
    ),
    st.sampled_from(["the", " fox", "é", "e\u0301", "日本", "!?", "_", "A", "b", "ǅ", "\u200d", "\x00"]),
)
texts = st.lists(pieces, max_size=25).map("".join)


def trained() -> tuple[dict[str, int], list[str]]:
    """(vocabulary, merges) of a small byte-level BPE."""
    library = tokenizers.Tokenizer(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    library.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=420, initial_alphabet=alphabet, show_progress=False)
    )
    vocab: dict[str, int] = library.get_vocab()
    tokens = sorted(vocab, key=lambda text: vocab[text])
    merges = [" ".join(pair) for pair in json.loads(library.to_str())["model"]["merges"]]
    return {text: i for i, text in enumerate(tokens)}, merges


VOCAB, MERGES = trained()

# A SentencePiece file is written field by field.


def varint(value: int) -> bytes:
    value &= (1 << 64) - 1
    low, rest = value & 0x7F, value >> 7
    return bytes([low | 0x80]) + varint(rest) if rest else bytes([low])


def field(number: int, value: int | float | bytes | str) -> bytes:
    if isinstance(value, str):
        value = value.encode()
    if isinstance(value, bytes):
        return varint(number << 3 | 2) + varint(len(value)) + value
    if isinstance(value, float):
        return varint(number << 3 | 5) + struct.pack("<f", value)
    return varint(number << 3) + varint(value)


def model_file(*, trainer: bytes = field(3, 2), normalizer: bytes = field(4, 0)) -> bytes:
    pieces = [
        ("<unk>", 0.0, 2),
        ("<s>", 0.0, 3),
        ("</s>", 0.0, 3),
        ("▁", -3.0, 1),
        ("a", -4.0, 1),
        ("▁a", -1.0, 1),
    ]
    message = b"".join(
        field(1, field(1, text) + field(2, score) + field(3, kind)) for text, score, kind in pieces
    )
    return message + field(2, trainer) + field(3, normalizer)
