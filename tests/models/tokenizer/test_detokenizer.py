"""Text token by token equals text at once."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.models.tokenizer.detokenizer import Detokenizer
from shoal.models.tokenizer.tokenizer import Tokenizer

BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
WORDS = ["▁", "▁the", "a", "é", "▁▁", "日", "\n", "😀", "<tool>"]


def sentence_piece(add_space_prefix: bool) -> Tokenizer:
    tokens = ["<unk>", "<s>", "</s>", *BYTES, *WORDS]
    return Tokenizer.from_gguf(
        {
            "tokenizer.ggml.model": "llama",
            "tokenizer.ggml.tokens": tokens,
            "tokenizer.ggml.token_type": [2, 3, 3] + [6] * 256 + [1] * (len(WORDS) - 1) + [4],
            "tokenizer.ggml.scores": [0.0] * len(tokens),
            "tokenizer.ggml.add_space_prefix": add_space_prefix,
        }
    )


WITH_PREFIX, WITHOUT_PREFIX = sentence_piece(True), sentence_piece(False)
THE = WITH_PREFIX.token_to_id("▁the")

# Bytes of whole and of broken characters are drawn more often than arbitrary bytes, so that runs of them are UTF-8.
some_ids = st.lists(
    st.one_of(
        st.integers(0, WITH_PREFIX.vocab_size + 2),
        st.sampled_from([3 + byte for byte in "é日😀\u0301".encode()]),
    ),
    max_size=30,
)


@given(ids=some_ids, tokenizer=st.sampled_from([WITH_PREFIX, WITHOUT_PREFIX]))
@settings(max_examples=500, deadline=None)
def test_the_pieces_are_the_whole(ids: list[int], tokenizer: Tokenizer) -> None:
    detokenizer = Detokenizer(tokenizer)
    pieces = [detokenizer.push(token_id) for token_id in ids] + [detokenizer.flush()]
    assert "".join(pieces) == tokenizer.decode(ids, skip_special=True)


@given(text=st.text(max_size=20), tokenizer=st.sampled_from([WITH_PREFIX, WITHOUT_PREFIX]))
@settings(max_examples=200, deadline=None)
def test_no_piece_holds_half_a_character(text: str, tokenizer: Tokenizer) -> None:
    detokenizer = Detokenizer(tokenizer)
    ids = tokenizer.encode(text, parse_special=False)
    pieces = [detokenizer.push(token_id) for token_id in ids]
    assert "\ufffd" not in "".join(pieces).replace("\ufffd", "", text.count("\ufffd"))
    # A space mark in the text itself comes back as a space: SentencePiece spells both in the same way.
    assert "".join(pieces) == text.replace("▁", " ")


@given(prompt=some_ids, ids=some_ids, tokenizer=st.sampled_from([WITH_PREFIX, WITHOUT_PREFIX]))
@settings(max_examples=300, deadline=None)
def test_after_a_prompt_it_goes_on_as_the_whole_would(
    prompt: list[int], ids: list[int], tokenizer: Tokenizer
) -> None:
    prompt = [
        token_id for token_id in prompt if token_id not in range(3, 259)
    ]  # texts end in whole characters
    detokenizer = Detokenizer(tokenizer, prompt)
    generated = "".join(detokenizer.push(token_id) for token_id in ids) + detokenizer.flush()
    before = tokenizer.decode(prompt, skip_special=True)
    assert before + generated == tokenizer.decode(prompt + ids, skip_special=True)


def test_the_first_word_keeps_its_space_only_behind_text() -> None:
    assert THE is not None
    assert Detokenizer(WITH_PREFIX).push(THE) == "the"
    assert Detokenizer(WITH_PREFIX, [1]).push(THE) == "the"
    assert Detokenizer(WITH_PREFIX, [1, THE]).push(THE) == " the"
    assert Detokenizer(WITHOUT_PREFIX).push(THE) == " the"


def test_control_tokens_are_silent_and_user_defined_ones_are_not() -> None:
    detokenizer = Detokenizer(WITHOUT_PREFIX)
    tool = WITHOUT_PREFIX.token_to_id("<tool>")
    assert tool is not None
    assert [detokenizer.push(token_id) for token_id in (1, tool, 2, 0)] == ["", "<tool>", "", ""]


def test_an_unfinished_character_comes_out_at_the_end() -> None:
    detokenizer = Detokenizer(WITHOUT_PREFIX)
    assert [detokenizer.push(3 + byte) for byte in "😀".encode()[:3]] == ["", "", ""]
    assert detokenizer.flush() == "\ufffd"
    assert detokenizer.flush() == ""
