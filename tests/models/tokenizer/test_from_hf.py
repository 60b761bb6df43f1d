"""Tokenizers of Hugging Face directories: the ids and texts of transformers; damaged files are refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from fakes.vocabularies import MERGES, VOCAB, model_file, texts
from hypothesis import given, settings
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from shoal.models.errors import TokenizerError
from shoal.models.tokenizer.tokenizer import Tokenizer

CONTROL = ["<|begin|>", "<|eot_id|>", "<|user|>"]


def byte_level() -> tokenizers.Tokenizer:
    """Like Llama 3 and Qwen: byte-level, the post-processor adds BOS, added tokens come after the vocabulary."""
    library = tokenizers.Tokenizer(models.BPE(VOCAB, [tuple(merge.split(" ")) for merge in MERGES]))
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    library.add_special_tokens([AddedToken(text, normalized=False) for text in CONTROL])
    library.add_tokens([AddedToken("<think>", normalized=False)])
    bos = library.token_to_id("<|begin|>")
    library.post_processor = processors.TemplateProcessing(
        single="<|begin|> $A", pair="<|begin|> $A $B", special_tokens=[("<|begin|>", bos)]
    )
    return library


def sentence_piece_like() -> tokenizers.Tokenizer:
    """Like Llama 2 and Gemma: the normaliser marks spaces, and unknown characters become tokens for their bytes."""
    words = ["▁", "a", "b", "▁a", "ab", "▁ab", "é", "\n", "h", "t", "e", "th", "▁th", "the", "▁the"]
    tokens = ["<unk>", "<s>", "</s>", *[f"<0x{byte:02X}>" for byte in range(256)], *words]
    merges = [("▁", "a"), ("a", "b"), ("▁a", "b"), ("t", "h"), ("▁", "th"), ("th", "e"), ("▁th", "e")]
    vocab = {text: i for i, text in enumerate(tokens)}
    library = tokenizers.Tokenizer(
        models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    library.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    library.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    library.add_special_tokens([AddedToken(text, normalized=False) for text in ("<unk>", "<s>", "</s>")])
    library.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A $B </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    return library


def directory(path: Path, library: tokenizers.Tokenizer | None, **files: Any) -> Path:
    """A model directory with these files; a file's name has "__" instead of the dot before its suffix."""
    path.mkdir(parents=True, exist_ok=True)
    if library is not None:
        library.save(str(path / "tokenizer.json"))
    for name, content in files.items():
        target = path / ".".join(name.rsplit("__", 1))
        if isinstance(content, bytes):
            target.write_bytes(content)
        else:
            target.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


@pytest.fixture(scope="module")
def pair(
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[[str], tuple[Tokenizer, PreTrainedTokenizerFast]]:
    made = {}
    for name, library, bos, eos in (
        ("byte", byte_level(), "<|begin|>", "<|eot_id|>"),
        ("spm", sentence_piece_like(), "<s>", "</s>"),
    ):
        config = {"bos_token": bos, "eos_token": eos, "add_bos_token": False}
        path = directory(tmp_path_factory.mktemp(name), library, tokenizer_config__json=config)
        made[name] = (Tokenizer.from_hf(path), PreTrainedTokenizerFast.from_pretrained(path))
    return made.__getitem__


@pytest.mark.parametrize("name", ["byte", "spm"])
@given(text=texts)
@settings(max_examples=150, deadline=None)
def test_ids_and_text_are_those_of_transformers(pair: Any, name: str, text: str) -> None:
    ours, theirs = pair(name)
    for special in ("", "<|begin|>", "<|user|>x", "<think>", "<s>", "</s> a"):
        whole = special + text
        ids = ours.encode(whole)
        assert ids == theirs.encode(whole)
        assert ours.encode(whole, add_special=False) == theirs.encode(whole, add_special_tokens=False)
        assert ours.encode(whole, parse_special=False) == theirs.encode(whole, split_special_tokens=True)
        for skip in (False, True):
            assert ours.decode(ids, skip_special=skip) == theirs.decode(
                ids, skip_special_tokens=skip, clean_up_tokenization_spaces=False
            )


def test_facts_of_the_vocabulary(pair: Any) -> None:
    tokenizer, _ = pair("byte")
    assert tokenizer.vocab_size == len(VOCAB) + 4
    assert tokenizer.id_to_token(tokenizer.bos_id) == "<|begin|>"
    assert tokenizer.stop_ids == {tokenizer.eos_id}
    assert tokenizer.is_special(tokenizer.token_to_id("<|user|>"))
    assert tokenizer.token_bytes(tokenizer.token_to_id("<think>")) == b"<think>"
    tokenizer, _ = pair("spm")
    assert tokenizer.token_bytes(tokenizer.token_to_id("<0xC3>")) == b"\xc3"
    assert tokenizer.token_bytes(tokenizer.token_to_id("▁the")) == b" the"


@pytest.mark.parametrize(
    ("files", "ends"),
    [
        ({}, {"<|eot_id|>"}),
        ({"generation_config__json": {"eos_token_id": 5}}, {"<|eot_id|>", 5}),
        ({"generation_config__json": {"eos_token_id": [5, 7]}}, {"<|eot_id|>", 5, 7}),
        ({"config__json": {"eos_token_id": [6]}}, {"<|eot_id|>", 6}),
        (
            {"config__json": {"eos_token_id": 6}, "generation_config__json": {"eos_token_id": 5}},
            {"<|eot_id|>", 5},
        ),
        ({"special_tokens_map__json": {"eos_token": {"content": "<|user|>"}}}, {"<|eot_id|>", "<|user|>"}),
        ({"generation_config__json": {"eos_token_id": 10**6}}, {"<|eot_id|>"}),  # of a padded embedding
    ],
)
def test_end_tokens_come_from_all_files(tmp_path: Path, files: dict[str, Any], ends: set[str | int]) -> None:
    tokenizer = Tokenizer.from_hf(directory(tmp_path, byte_level(), **files))
    assert tokenizer.stop_ids == {tokenizer.token_to_id(end) if isinstance(end, str) else end for end in ends}


@pytest.mark.parametrize(
    ("files", "template"),
    [
        ({}, None),
        ({"tokenizer_config__json": {"chat_template": "a"}}, "a"),
        ({"tokenizer_config__json": {"chat_template": "a"}, "chat_template__jinja": "b"}, "b"),
        (
            {
                "tokenizer_config__json": {
                    "chat_template": [
                        {"name": "tool_use", "template": "t"},
                        {"name": "default", "template": "d"},
                    ]
                }
            },
            "d",
        ),
        ({"tokenizer_config__json": {"chat_template": [{"name": "rag", "template": "r"}]}}, "r"),
    ],
)
def test_chat_templates(tmp_path: Path, files: dict[str, Any], template: str | None) -> None:
    assert Tokenizer.from_hf(directory(tmp_path, byte_level(), **files)).chat_template == template


def test_a_sentence_piece_file_serves_where_there_is_no_tokenizer_json(tmp_path: Path) -> None:
    added = {"2": {"content": "</s>", "special": True}, "6": {"content": "<|user|>", "special": True}}
    config = {"eos_token": "</s>", "added_tokens_decoder": added}
    tokenizer = Tokenizer.from_hf(
        directory(tmp_path, None, tokenizer__model=model_file(), tokenizer_config__json=config)
    )
    assert [tokenizer.id_to_token(i) for i in tokenizer.encode("a a<|user|>a")] == [
        "<s>",
        "▁a",
        "▁a",
        "<|user|>",
        "▁a",
    ]
    assert tokenizer.stop_ids == {2}
    config["add_bos_token"] = False
    config["add_eos_token"] = True
    tokenizer = Tokenizer.from_hf(directory(tmp_path, None, tokenizer_config__json=config))
    assert [tokenizer.id_to_token(i) for i in tokenizer.encode("a")] == ["▁a", "</s>"]


@pytest.mark.parametrize(
    ("library", "files", "message"),
    [
        (None, {}, "has no tokenizer.json and no tokenizer.model"),
        (None, {"tokenizer__json": "{"}, "is not a tokenizer"),
        (None, {"tokenizer__json": b"\xff\xfe"}, "is not a tokenizer"),
        (
            None,
            {
                "tokenizer__json": {
                    "version": "1.0",
                    "model": {"type": "BPE", "vocab": {"a": 0}, "merges": [["a", "z"]]},
                }
            },
            "is not",
        ),
        (None, {"tokenizer__model": b"\xff"}, "tokenizer.model is damaged"),
        (byte_level(), {"tokenizer_config__json": "["}, "is not valid JSON"),
        (byte_level(), {"tokenizer_config__json": "[" * 100_000}, "is nested too deep"),
        (byte_level(), {"tokenizer_config__json": []}, "must hold a JSON object, holds a list"),
        (byte_level(), {"tokenizer_config__json": b"\xff"}, "is not valid JSON: .utf-8. codec"),
        (byte_level(), {"tokenizer_config__json": {"chat_template": 7}}, "is a int instead of a text"),
        (
            None,
            {"tokenizer__model": model_file(), "tokenizer_config__json": {"added_tokens_decoder": {"x": 1}}},
            "added_tokens_decoder",
        ),
        (
            None,
            {
                "tokenizer__model": model_file(),
                "tokenizer_config__json": {"added_tokens_decoder": {"99": {"content": "x"}}},
            },
            "has id 99",
        ),
    ],
)
def test_damaged_directories_are_refused_in_one_line(
    tmp_path: Path, library: tokenizers.Tokenizer | None, files: dict[str, Any], message: str
) -> None:
    with pytest.raises(TokenizerError, match=message) as caught:
        Tokenizer.from_hf(directory(tmp_path, library, **files))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("ends", [-1, [-1], 99_999, [99_999, 1 << 40]])
@pytest.mark.parametrize("name", ["generation_config", "config"])
def test_ends_outside_the_vocabulary_are_not_used(tmp_path: Path, ends: Any, name: str) -> None:
    tokenizer = Tokenizer.from_hf(
        directory(tmp_path, byte_level(), **{f"{name}__json": {"eos_token_id": ends}})
    )
    count = len(ends) if isinstance(ends, list) else 1
    assert len(tokenizer.warnings) == count
    assert all(f"of {name}.json is outside the vocabulary" in said for said in tokenizer.warnings)
    assert all(0 <= end < tokenizer.vocab_size for end in tokenizer.stop_ids)


@pytest.mark.parametrize(
    ("given", "ends"),
    [
        ("5", set()),
        (True, set()),
        (1.5, set()),
        (float("inf"), set()),
        ({}, set()),
        ([[5]], set()),
        (5.0, {5}),
        ([1, None], {1}),
        ([5.0, "7", 6], {5, 6}),
    ],
)
@pytest.mark.parametrize("name", ["generation_config", "config"])
def test_ends_that_are_no_ids_are_not_used(tmp_path: Path, given: Any, ends: set[int], name: str) -> None:
    files = {f"{name}__json": {"eos_token_id": given}}
    if name == "generation_config":
        files["config__json"] = {"eos_token_id": [8]}  # where the other names none
        ends = ends or {8}
    tokenizer = Tokenizer.from_hf(directory(tmp_path, byte_level(), **files))
    (warning,) = tokenizer.warnings
    assert f"eos_token_id={given!r} of {name}.json must be token ids" in warning
    assert tokenizer.stop_ids == {tokenizer.token_to_id("<|eot_id|>"), *ends}


MARK = b"\xef\xbb\xbf"


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({"generation_config__json": b""}, "generation_config.json: is not valid JSON"),
        ({"generation_config__json": b'{"eos_token_id": 5'}, "generation_config.json: is not valid JSON"),
        ({"generation_config__json": b'{"a": "\xff"}'}, "generation_config.json: is not valid JSON"),
        ({"generation_config__json": "[" * 100_000}, "generation_config.json: is nested too deep"),
        ({"generation_config__json": []}, "generation_config.json: must hold a JSON object, holds a list"),
        ({"generation_config__json": b"null"}, "generation_config.json: must hold a JSON object"),
        ({"generation_config__json": MARK + b"{}"}, "generation_config.json: begins with a byte order mark"),
        ({"tokenizer_config__json": MARK + b"{}"}, "tokenizer_config.json: begins with a byte order mark"),
        (
            {"special_tokens_map__json": MARK + b"{}"},
            "special_tokens_map.json: begins with a byte order mark",
        ),
        ({"config__json": MARK + b"{}"}, "config.json: begins with a byte order mark"),
        ({"special_tokens_map__json": {"pad_token": 5}}, "special_tokens_map.json: pad_token=5 is not used"),
        ({"tokenizer_config__json": {"eos_token": 5}}, "tokenizer_config.json: eos_token=5 is not used"),
        ({"tokenizer_config__json": {"bos_token": True}}, "bos_token=True is not used"),
        ({"tokenizer_config__json": {"unk_token": ["<unk>"]}}, "unk_token=['<unk>'] is not used"),
        ({"tokenizer_config__json": {"eos_token": {"content": 5}}}, "eos_token={'content': 5} is not used"),
        ({"tokenizer_config__json": {"additional_special_tokens": 5}}, "additional_special_tokens=5 is used"),
        ({"tokenizer_config__json": {"extra_special_tokens": ["a", 5]}}, "extra_special_tokens=['a', 5] is"),
    ],
)
def test_what_only_advises_is_a_warning(tmp_path: Path, files: dict[str, Any], said: str) -> None:
    tokenizer = Tokenizer.from_hf(directory(tmp_path, byte_level(), **files))
    (warning,) = tokenizer.warnings
    assert said in warning
    assert str(tmp_path) in warning
    assert "\n" not in warning
    assert tokenizer.encode("ab")


def test_a_mark_before_the_file_changes_nothing(tmp_path: Path) -> None:
    files = {"generation_config__json": MARK + b'{"eos_token_id": 5}'}
    tokenizer = Tokenizer.from_hf(directory(tmp_path, byte_level(), **files))
    assert 5 in tokenizer.stop_ids
    (tmp_path / "tokenizer.json").write_bytes(MARK + (tmp_path / "tokenizer.json").read_bytes())
    again = Tokenizer.from_hf(tmp_path)
    assert again.encode("some text") == tokenizer.encode("some text")
    assert len(again.warnings) == 2


def test_what_is_usual_is_no_warning(tmp_path: Path) -> None:
    config = {
        "add_bos_token": True,
        "bos_token": None,
        "eos_token": {"content": "<|eot_id|>", "lstrip": False},
        "extra_special_tokens": {},
        "additional_special_tokens": ["<|user|>", {"content": "<|eot_id|>"}],
        "image_token": "<|user|>",
    }
    tokenizer = Tokenizer.from_hf(directory(tmp_path, byte_level(), tokenizer_config__json=config))
    assert tokenizer.warnings == ()
