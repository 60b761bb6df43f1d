"""Any tokenizer.json gives the ids and texts that the `tokenizers` library gives, whole and token by token."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors

from shoal.models.errors import TokenizerError
from shoal.models.tokenizer import hf_library
from shoal.models.tokenizer.detokenizer import Detokenizer
from shoal.models.tokenizer.stop_strings import StopMatcher
from shoal.models.tokenizer.tokenizer import Tokenizer

BYTES = [f"<0x{byte:02X}>" for byte in [*"é日😀".encode(), 0xFF]]
LETTERS = ["a", "b", "é", "日", "▁", " ", ".", "'", "|", "😀", "\u0301", "\ufffd"]

texts = st.lists(st.sampled_from([*LETTERS, "<s>", "<x>", "a b", "ab", "n't", "  ", "\n"]), max_size=12).map(
    "".join
)
words = st.one_of(
    st.sampled_from(
        [*LETTERS, *BYTES, "##a", "##", "a</w>", "a</w>b", "▁a", "▁▁", " a", "a ", "<pad>", " n't", " ."]
    ),
    st.text(alphabet="ab▁é#|</w> ", min_size=1, max_size=4),
)
JOINERS: dict[str, Any] = {
    "none": None,
    "word_piece": decoders.WordPiece(),
    "word_piece_plain": decoders.WordPiece("@@", cleanup=False),
    "metaspace": decoders.Metaspace(),
    "metaspace_never": decoders.Metaspace(prepend_scheme="never"),
    "bytes": decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()]),
    "fuse": decoders.Fuse(),
    "strip": decoders.Strip(" ", 1, 0),
    "strip_right": decoders.Strip("a", 0, 1),
    "fuse_strip": decoders.Sequence([decoders.Fuse(), decoders.Strip(" ", 2, 0)]),
    "bytes_strip": decoders.Sequence(
        [decoders.Replace("a", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 0, 1)]
    ),
    "bpe": decoders.BPEDecoder(),
    "ctc": decoders.CTC(),
    "ctc_word_piece": decoders.Sequence(
        [decoders.CTC(cleanup=False), decoders.WordPiece("b", cleanup=False)]
    ),
    "ctc_metaspace": decoders.Sequence([decoders.CTC(), decoders.Metaspace(), decoders.BPEDecoder("b")]),
    "replace": decoders.Replace(Regex("[ab]+"), "_"),
    "replace_fused": decoders.Sequence([decoders.Fuse(), decoders.Replace("aa", "_")]),
    "byte_level_strip": decoders.Sequence([decoders.ByteLevel(), decoders.Strip(" ", 1, 0)]),
}
SPLITS = [
    None,
    pre_tokenizers.Whitespace(),
    pre_tokenizers.WhitespaceSplit(),
    pre_tokenizers.Metaspace(),
    pre_tokenizers.BertPreTokenizer(),
    pre_tokenizers.ByteLevel(add_prefix_space=True),
    pre_tokenizers.Sequence([pre_tokenizers.Punctuation(), pre_tokenizers.Digits()]),
]
NORMALIZERS = [None, normalizers.Lowercase(), normalizers.NFD(), normalizers.Replace(" ", "▁")]


@st.composite
def libraries(draw: st.DrawFn, joiner: Any) -> tokenizers.Tokenizer:
    """A small tokenizer of any kind."""
    tokens = draw(st.lists(words, min_size=1, max_size=14, unique=True))
    vocab = {text: i for i, text in enumerate(["[UNK]", *(text for text in tokens if text != "[UNK]")])}
    kind = draw(st.sampled_from(["WordLevel", "WordPiece", "Unigram", "BPE"]))
    if kind == "WordLevel":
        model = models.WordLevel(vocab, unk_token="[UNK]")
    elif kind == "WordPiece":
        model = models.WordPiece(vocab, unk_token="[UNK]")
    elif kind == "Unigram":
        scores = st.sampled_from([-1.0, -2.5, -7.0])
        model = models.Unigram(
            [(text, draw(scores)) for text in vocab], unk_id=0, byte_fallback=draw(st.booleans())
        )
    else:
        merges = [(a, b) for a in vocab for b in vocab if a + b in vocab]
        model = models.BPE(vocab, merges, unk_token="[UNK]", fuse_unk=draw(st.booleans()))
    library = tokenizers.Tokenizer(model)
    library.pre_tokenizer = draw(st.sampled_from(SPLITS))
    library.normalizer = draw(st.sampled_from(NORMALIZERS))
    if joiner is not None:
        library.decoder = joiner
    flags = st.fixed_dictionaries(
        {name: st.booleans() for name in ("single_word", "lstrip", "rstrip", "normalized")}
    )
    library.add_special_tokens([AddedToken("<s>", **draw(flags))])
    library.add_tokens([AddedToken("<x>", **draw(flags)), AddedToken("é", **draw(flags))])
    if draw(st.booleans()):
        bos = library.token_to_id("<s>")
        library.post_processor = processors.TemplateProcessing(
            single="<s> $A <s>", pair="$A $B", special_tokens=[("<s>", bos)]
        )
    return library


def ours(library: tokenizers.Tokenizer) -> Tokenizer:
    with tempfile.TemporaryDirectory() as directory:
        library.save(str(Path(directory) / "tokenizer.json"))
        return Tokenizer.from_hf(Path(directory))


def theirs(library: tokenizers.Tokenizer, ids: list[int], skip_special: bool) -> str:
    try:
        text: str = library.decode(ids, skip_special_tokens=skip_special)
    except BaseException as error:  # the library's Strip panics on an empty text
        if type(error).__name__ != "PanicException":
            raise
        return ""
    return text


def assert_ids_and_texts_are_the_library_s(joiner: str, data: st.DataObject) -> None:
    library = data.draw(libraries(JOINERS[joiner]))
    tokenizer = ours(library)
    text = data.draw(texts)
    for parse in (True, False):
        library.encode_special_tokens = not parse
        for add in (True, False):
            ids = library.encode(text, add_special_tokens=add).ids
            assert tokenizer.encode(text, add_special=add, parse_special=parse) == ids
    some = st.lists(st.integers(0, library.get_vocab_size() + 1), max_size=14)
    ids, prompt = data.draw(some), data.draw(some)
    for given_ids in (ids, library.encode(text).ids):
        for skip in (True, False):
            assert tokenizer.decode(given_ids, skip_special=skip) == theirs(library, given_ids, skip)
        detokenizer = Detokenizer(tokenizer)
        pieces = "".join(map(detokenizer.push, given_ids)) + detokenizer.flush()
        assert pieces == theirs(library, given_ids, True)
        assert detokenizer.flush() == ""
    if tokenizer.join is not None:  # an answer is what the library makes of its ids, whatever was before
        detokenizer = Detokenizer(tokenizer, prompt)
        assert "".join(map(detokenizer.push, ids)) + detokenizer.flush() == theirs(library, ids, True)


@pytest.mark.parametrize("joiner", [name for name in JOINERS if name != "replace"])
@given(data=st.data())
@settings(max_examples=120, deadline=None)
def test_ids_and_texts_are_the_library_s(joiner: str, data: st.DataObject) -> None:
    assert_ids_and_texts_are_the_library_s(joiner, data)


@given(data=st.data())
@settings(max_examples=30, deadline=None)
def test_also_where_a_regex_is_replaced(data: st.DataObject) -> None:
    """Fewer of them: children decode these."""
    assert_ids_and_texts_are_the_library_s("replace", data)


@pytest.mark.parametrize(
    "joiner", ["none", "word_piece", "metaspace", "metaspace_never", "fuse", "ctc", "strip"]
)
@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_text_comes_with_its_token(joiner: str, data: st.DataObject) -> None:
    library = data.draw(libraries(JOINERS[joiner]))
    tokenizer = ours(library)
    ids = data.draw(st.lists(st.integers(0, library.get_vocab_size() + 1), max_size=14))
    detokenizer, shown = Detokenizer(tokenizer), ""
    for count, token_id in enumerate(ids, 1):
        shown += detokenizer.push(token_id)
        assert shown == tokenizer.decode(ids[:count], skip_special=True).rstrip("\ufffd")


def word_level(joiner: Any = None, **vocab: int) -> tokenizers.Tokenizer:
    library = tokenizers.Tokenizer(models.WordLevel(vocab or {"a": 0, "b": 1, "[UNK]": 2}, unk_token="[UNK]"))
    if joiner is not None:
        library.decoder = joiner
    return library


def test_the_facts_of_a_vocabulary_without_a_decoder() -> None:
    library = word_level()
    library.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    library.add_special_tokens(["</s>"])
    tokenizer = ours(library)
    assert (tokenizer.vocab_size, tokenizer.stop_ids) == (4, {3})
    assert [tokenizer.id_to_token(i) for i in range(4)] == ["a", "b", "[UNK]", "</s>"]
    assert tokenizer.token_to_id("b") == 1
    assert [tokenizer.token_bytes(i) for i in range(5)] == [b"a", b"b", b"[UNK]", b"", b""]
    assert tokenizer.decode([0, 3]) == "a </s>"


def test_stop_strings_are_found_across_the_borders_of_tokens() -> None:
    tokenizer = ours(word_level())
    detokenizer, matcher = Detokenizer(tokenizer), StopMatcher(["b a"])
    assert [matcher.push(detokenizer.push(i)) for i in (0, 1, 1, 0)] == [
        ("a", False),
        (" ", False),
        ("b ", False),
        ("", True),
    ]


def test_a_character_in_pieces_comes_whole_and_a_broken_run_as_the_library_shows_it() -> None:
    joiner = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    library = word_level(joiner, **{"[UNK]": 0, "<0xC3>": 1, "<0xA9>": 2, "x": 3})
    detokenizer = Detokenizer(ours(library))
    assert [detokenizer.push(i) for i in (1, 2, 3, 1, 2, 1, 3)] == [
        "",
        "",
        "éx",
        "",
        "",
        "",
        "\ufffd" * 3 + "x",
    ]


def test_tokens_that_the_library_panics_on_end_no_answer() -> None:
    tokenizer = ours(word_level(decoders.Strip(" ", 1, 1), **{" ": 0, "a": 1, "[UNK]": 2}))
    assert tokenizer.decode([1]) == "a"
    assert tokenizer.decode([0]) == Detokenizer(tokenizer).push(0) == " "


def test_a_long_answer_does_not_take_quadratic_time() -> None:
    for joiner in (decoders.BPEDecoder("a"), decoders.WordPiece(), decoders.CTC()):
        detokenizer, calls = Detokenizer(ours(word_level(joiner))), 0
        for i in range(5000):
            detokenizer.push(i % 2)
            calls = max(calls, len(detokenizer._text._window))  # type: ignore[union-attr]
        assert calls < 10


def test_ids_out_of_all_bounds_are_refused(tmp_path: Path) -> None:
    model = {"type": "WordLevel", "vocab": {"a": 2**31}, "unk_token": "a"}
    (tmp_path / "tokenizer.json").write_text(json.dumps({"version": "1.0", "model": model}))
    with pytest.raises(TokenizerError, match="has a token 2147483648; ids are below"):
        Tokenizer.from_hf(tmp_path)


def test_tokens_around_texts_must_be_in_the_vocabulary() -> None:
    library = word_level()
    library.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 77)])
    with pytest.raises(TokenizerError, match="puts the token 77 around texts"):
        ours(library)


def test_a_text_that_the_library_refuses_is_refused_in_one_line() -> None:
    tokenizer = ours(tokenizers.Tokenizer(models.WordLevel({"a": 0}, unk_token="[UNK]")))
    assert tokenizer.encode("a") == [0]
    with pytest.raises(TokenizerError, match="cannot be tokenised: WordLevel error"):
        tokenizer.encode("zz")


@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_a_damaged_file_is_refused_in_one_line(data: st.DataObject) -> None:
    whole = word_level(decoders.WordPiece()).to_str().encode()
    at = data.draw(st.integers(0, len(whole) - 1))
    damaged = whole[:at] + data.draw(st.binary(max_size=3)) + whole[at + data.draw(st.integers(0, 3)) :]
    with tempfile.TemporaryDirectory() as directory:
        (Path(directory) / "tokenizer.json").write_bytes(damaged)
        said = ""
        try:
            tokenizer = Tokenizer.from_hf(Path(directory))
            tokenizer.decode(range(tokenizer.vocab_size))
        except TokenizerError as error:
            said = str(error)
    assert "\n" not in said


@pytest.mark.parametrize("merges", [[["a", "b"], ["ab", "c"]], ["a b", "ab c"]])
def test_a_usual_bpe_is_what_the_library_parses(merges: list[Any]) -> None:
    """However its merges are written; also where a token is added that the model does not have."""
    made = tokenizers.Tokenizer(models.BPE({"a": 0, "b": 1, "c": 2, "ab": 3, "abc": 4}, [], unk_token="a"))
    made.normalizer, made.pre_tokenizer = normalizers.NFC(), pre_tokenizers.ByteLevel(use_regex=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(["b", "<s>"])
    made.add_tokens([AddedToken("<x>", lstrip=True, normalized=True)])
    made.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 5)])
    file = json.loads(made.to_str())
    file["model"]["merges"] = merges
    data = json.dumps(file, indent=2).encode()
    found, parsed = hf_library._compact(data), tokenizers.Tokenizer.from_buffer(data)
    assert found is not None
    assert json.loads(found.to_str()) == json.loads(parsed.to_str())
    for text in ("abc<s>ab <x>c", "cab"):
        assert found.encode(text).ids == parsed.encode(text).ids


@pytest.mark.parametrize(
    "change",
    [
        {"merges": [["a", "z"]]},
        {"merges": ["a b", ["a", "b"]]},
        {"merges": {"a b": 1}},
        {"merges": ["#version b"], "vocab": {"#version": 0, "b": 1, "#versionb": 2}},
        {"vocab": {"a": 0.0}},
        {"vocab": {"a": -1}},
        {"type": "WordLevel"},
        {"dropout": True},
        {"continuing_subword_prefix": "##"},
    ],
)
def test_what_is_no_usual_bpe_is_left_to_the_library(change: dict[str, Any]) -> None:
    file = json.loads(tokenizers.Tokenizer(models.BPE({"a": 0, "b": 1, "ab": 2}, [])).to_str())
    assert hf_library._compact(json.dumps(file, indent=2).encode()) is not None
    assert hf_library._compact(json.dumps(file, indent=2).encode("utf-16")) is None
    file["model"] |= change
    assert hf_library._compact(json.dumps(file, indent=2).encode()) is None
