"""Tokenizer files made to fill the memory or to take for ever: bounded, with one clear line, and nobody else waits."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from tokenizers import Tokenizer as Reference
from tokenizers import decoders, models, pre_tokenizers

from shoal.models.errors import ModelError
from shoal.models.texts import Texts
from shoal.models.tokenizer import holders
from shoal.models.tokenizer.detokenizer import Detokenizer
from shoal.models.tokenizer.ordinary_files import is_ordinary
from shoal.models.tokenizer.tokenizer import Tokenizer

HUGE = 4294967295


def ordinary() -> dict[str, Any]:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    library = Reference(models.BPE({char: i for i, char in enumerate(alphabet)}, []))
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    library.add_special_tokens(["<s>", "</s>"])
    file: dict[str, Any] = json.loads(library.to_str())
    return file


def replacing(content: str, times: int) -> dict[str, Any]:
    step = {"type": "Replace", "pattern": {"String": "a"}, "content": content}
    return {"type": "Sequence", "normalizers": [step] * times}


def joining(steps: list[dict[str, Any]]) -> dict[str, Any]:
    return {"type": "Sequence", "decoders": [{"type": "Fuse"}, *steps]}


def template(single: list[dict[str, Any]], ids: list[int]) -> dict[str, Any]:
    pair = [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}]
    special = {"<s>": {"id": "<s>", "ids": ids, "tokens": ["<s>"] * len(ids)}}
    return {"type": "TemplateProcessing", "single": single, "pair": pair, "special_tokens": special}


TEXT, BEGIN = {"Sequence": {"id": "A", "type_id": 0}}, {"SpecialToken": {"id": "<s>", "type_id": 0}}
CATASTROPHE = r"(a+)+$|(a|aa)+b"
DEEP: Any = {"type": "NFC"}
for _ in range(100):
    DEEP = {"type": "Sequence", "normalizers": [DEEP]}

CHANGES: dict[str, Callable[[dict[str, Any]], object]] = {
    "huge id": lambda f: f["model"]["vocab"].update({"zz": HUGE}),
    "huge added id": lambda f: f["added_tokens"][0].update(id=HUGE),
    "huge id added twice": lambda f: (
        f["model"]["vocab"].update({"<s>": HUGE}),
        f["added_tokens"][0].update(id=HUGE),
    ),
    "huge id around": lambda f: f.update(post_processor=template([BEGIN, TEXT], [HUGE])),
    "doubling": lambda f: f.update(normalizer=replacing("aa", 40)),
    "multiplying": lambda f: f.update(normalizer=replacing("a" * 1000, 4)),
    "one large replacement": lambda f: f.update(normalizer=replacing("b" * 10_000_000, 1)),
    "prepending": lambda f: f.update(
        normalizer={"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "a" * 100_000}] * 1000}
    ),
    "deep": lambda f: f.update(normalizer=DEEP),
    "many compatibility forms": lambda f: f.update(
        normalizer={
            "type": "Sequence",
            "normalizers": [{"type": "NFKD"}, *replacing("\ufdfa", 1)["normalizers"]] * 40,
        }
    ),
    "regex in a normalizer": lambda f: f.update(
        normalizer={"type": "Replace", "pattern": {"Regex": CATASTROPHE}, "content": "b"}
    ),
    "regex in a split": lambda f: f.update(
        pre_tokenizer={
            "type": "Split",
            "pattern": {"Regex": CATASTROPHE},
            "behavior": "Isolated",
            "invert": False,
        }
    ),
    "splits": lambda f: f.update(
        pre_tokenizer={
            "type": "Sequence",
            "pretokenizers": [
                {
                    "type": "Split",
                    "pattern": {"Regex": r"(\w|\w\w|x?)*y"},
                    "behavior": "Isolated",
                    "invert": False,
                }
            ]
            * 100,
        }
    ),
    "text repeated": lambda f: f.update(post_processor=template([TEXT] * 100_000, [256])),
    "tokens repeated": lambda f: f.update(post_processor=template([BEGIN] * 100_000, [256] * 1000)),
    "merges of nothing": lambda f: f["model"].update(merges=[["no", "thing"]]),
    "many merges": lambda f: f["model"].update(merges=[["a", "b"]] * 300_000),
    "a token of a megabyte": lambda f: f["model"]["vocab"].update({"a" * 1_000_000: 300}),
    "a long prefix": lambda f: f["model"].update(continuing_subword_prefix="x" * 1_000_000),
    "a long suffix": lambda f: f["model"].update(end_of_word_suffix="x" * 1_000_000),
    "many added tokens": lambda f: f.update(
        added_tokens=[{**f["added_tokens"][0], "id": 256 + i, "content": "a" * i + "b"} for i in range(2000)]
    ),
    "long words": lambda f: f.update(
        model={
            "type": "WordPiece",
            "unk_token": "!",
            "continuing_subword_prefix": "##",
            "max_input_chars_per_word": 10**9,
            "vocab": {"!": 0, "a": 1, "##a": 2},
        }
    ),
    "no unknown token": lambda f: f.update(
        model={"type": "Unigram", "unk_id": HUGE, "vocab": [["a", -1.0]], "byte_fallback": False}
    ),
    "infinite scores": lambda f: f.update(
        model={
            "type": "Unigram",
            "unk_id": 0,
            "vocab": [["?", 0.0], ["a", 1e308], ["aa", -1e308], ["a", 1e308]],
        }
    ),
    "a decoder that doubles": lambda f: f.update(decoder=joining(replacing("aa", 40)["normalizers"])),
    "a decoder with a regex": lambda f: f.update(
        decoder=joining([{"type": "Replace", "pattern": {"Regex": CATASTROPHE}, "content": "b"}])
    ),
    "a decoder that panics": lambda f: f.update(
        decoder={"type": "Strip", "content": "a", "start": 1000, "stop": 1000}
    ),
    "padding": lambda f: f.update(
        padding={
            "strategy": {"Fixed": 10**10},
            "direction": "Right",
            "pad_to_multiple_of": None,
            "pad_id": HUGE,
            "pad_type_id": 0,
            "pad_token": "<s>",
        }
    ),
}


@pytest.mark.parametrize("name", CHANGES)
def test_no_file_takes_much_memory_or_time(name: str, tmp_path: Path) -> None:
    file = ordinary()
    CHANGES[name](file)
    (tmp_path / "tokenizer.json").write_text(json.dumps(file))
    ends, gaps = threading.Event(), [0.0]

    def watch() -> None:  # whether others get the interpreter's lock
        last = time.monotonic()
        while not ends.wait(0.01):
            gaps[0] = max(gaps[0], time.monotonic() - last)
            last = time.monotonic()

    watcher = threading.Thread(target=watch)
    watcher.start()
    before = psutil.Process().memory_info().rss
    started, said = time.monotonic(), ""
    for use in (
        lambda made: made.encode("a" * 40 + "b " * 10),
        lambda made: made.encode("aab" * 30_000),
        lambda made: made.decode([ordinary()["model"]["vocab"]["a"]] * 60),
        lambda made: [Detokenizer(made).push(i) for i in [64, 65, 66] * 5],
    ):
        try:
            use(Tokenizer.from_hf(tmp_path))
        except ModelError as error:
            said += str(error)
    ends.set()
    watcher.join()
    assert "\n" not in said
    assert time.monotonic() - started < 60
    assert psutil.Process().memory_info().rss - before < 200 << 20
    assert gaps[0] < 3


@pytest.mark.parametrize("where", ["vocab", "merges", "x", "prefix"])
def test_what_takes_more_memory_than_its_bytes_tell_is_not_ordinary(where: str) -> None:
    """Lists in lists take sixty times their bytes, and a prefix that cuts a character ends the process."""
    file = ordinary()
    if where == "prefix":
        file["model"]["continuing_subword_prefix"] = "é"
    elif where == "x":
        file["x"] = 1
    else:
        file["model"][where] = json.loads(f"[{','.join(['[' * 60 + ']' * 60] * 100)}]")
    assert not is_ordinary(json.dumps(file, separators=(",", ":")).encode())


def test_what_people_use_is_ordinary() -> None:
    assert is_ordinary(json.dumps(ordinary()).encode())


# Each would keep the interpreter's lock for 4 s to minutes, for a text of 65,536 characters that cannot be cut.
SLOW: dict[str, Callable[[dict[str, Any]], object]] = {
    "words of a thousand characters": lambda f: f.update(
        model={
            "type": "WordPiece",
            "unk_token": "!",
            "continuing_subword_prefix": "##",
            "max_input_chars_per_word": 1000,
            "vocab": {"!": 0, "a": 1, "##a": 2, **{f"##{i}": 3 + i for i in range(300)}},
        }
    ),
    "pieces that begin alike": lambda f: f.update(
        model={
            "type": "Unigram",
            "unk_id": 0,
            "vocab": [["?", 0.0], *(["a" * i, -1.0] for i in range(1, 3000))],
        }
    ),
    "a space that takes spaces": lambda f: f["added_tokens"].append(
        {**f["added_tokens"][0], "id": 258, "content": " ", "lstrip": True, "rstrip": True}
    ),
}


@pytest.mark.parametrize("name", SLOW)
def test_what_takes_the_square_of_a_text_is_not_ordinary(name: str) -> None:
    file = ordinary()
    SLOW[name](file)
    assert not is_ordinary(json.dumps(file).encode())


def normalizing(*steps: Any) -> dict[str, Any]:
    made = [{"type": step} if isinstance(step, str) else step for step in steps]
    return {**ordinary(), "normalizer": {"type": "Sequence", "normalizers": made}}


def replace(old: str, new: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": {"String": old}, "content": new}


@pytest.mark.parametrize(
    ("steps", "text", "in_child"),
    [
        (["NFKD"], "\ufdfa" * 20_000, True),  # one makes eighteen
        (["NFKC", "Lowercase"], "\ufdfa" * 20_000, True),
        ([replace("a", "bbbb"), replace("b", "cccc")], "a" * 20_000, True),
        (["NFKD", replace(" ", "____")], "\ufdfa" * 10_000, True),
        (["NFKD", replace("a", "bbbb")], "a" * 20_000, False),
        (["NFC"], "\uac01" * 40_000, False),
        (["NFKD"], "\u4e00" * 40_000, False),
        (["NFKD"], "\ufdfa" * 1000, False),
        (["ByteLevel"], "\u4e00" * 40_000, False),
    ],
)
def test_what_a_normalizer_makes_long_is_tokenised_in_a_child(
    steps: list[Any], text: str, in_child: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = json.dumps(normalizing(*steps))
    assert is_ordinary(file.encode())
    (tmp_path / "tokenizer.json").write_text(file)
    used: list[int] = []
    encode = holders.encode_in_child

    def noted(data: bytes, text: str, parse_special: bool, limit: int, chars: int) -> list[int]:
        used.append(chars)
        return encode(data, text, parse_special, limit, chars)

    monkeypatch.setattr(holders, "encode_in_child", noted)
    made = Tokenizer.from_hf(tmp_path).encode(text)
    assert made == Reference.from_str(file).encode(text).ids
    assert bool(used) == in_child


@pytest.mark.parametrize(
    "steps", [["ByteLevel"] * 2, ["NFKD", "NFKD"], ["ByteLevel", "NFC", "ByteLevel"], ["BertNormalizer"] * 2]
)
def test_what_makes_more_of_what_it_has_made_is_not_ordinary(steps: list[Any]) -> None:
    plain = {"clean_text": True, "handle_chinese_chars": True, "strip_accents": None, "lowercase": True}
    made = [{"type": step, **(plain if step == "BertNormalizer" else {})} for step in steps]
    assert not is_ordinary(json.dumps(normalizing(*made)).encode())
    assert is_ordinary(json.dumps(normalizing(made[0])).encode())


def test_tokens_that_other_files_add_are_looked_at_too() -> None:
    data = json.dumps(ordinary()).encode()
    assert is_ordinary(data, [{"content": " "}, {"content": "<x>", "rstrip": True, "special": True}])
    for fields in ({"content": "\t\n", "lstrip": True}, {"content": "a" * 10_000}, {"content": None}):
        assert not is_ordinary(data, [fields])


# --- vocabularies of GGUF files ------------------------------------------------------------------------


def gguf(model: str, tokens: list[str], **keys: Any) -> Tokenizer:
    given = {"model": model, "tokens": tokens, **keys}
    return Tokenizer.from_gguf({f"tokenizer.ggml.{key}": value for key, value in given.items()})


BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())
PIECES = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a"]


@pytest.mark.parametrize(
    ("model", "tokens", "keys"),
    [
        ("gpt2", BYTES, {"merges": ["no thing"]}),
        ("gpt2", BYTES, {"merges": ["a"]}),
        ("gpt2", BYTES, {"merges": ["", " ", "  "]}),
        ("gpt2", [*BYTES, "a"], {"merges": []}),
        ("gpt2", [*BYTES, ""], {"merges": []}),
        ("gpt2", [*BYTES, "", ""], {"merges": []}),
        ("gpt2", [*BYTES, "a" * 1_000_000], {"merges": []}),
        ("gpt2", [*BYTES, "<" + "x" * 1_000_000], {"merges": [], "token_type": [1] * 256 + [3]}),
        ("gpt2", ["a"], {"merges": [], "eos_token_id": HUGE}),
        ("gpt2", [], {"merges": []}),
        ("llama", PIECES, {"scores": [float("nan")] * len(PIECES)}),
        ("llama", PIECES, {"scores": [float("inf")] * len(PIECES)}),
        ("llama", PIECES, {"scores": [1e38, -1e38] * (len(PIECES) // 2) + [0.0] * (len(PIECES) % 2)}),
        ("llama", PIECES, {"scores": [0.0]}),
        ("llama", [*PIECES, "a" * 1_000_000], {"scores": [0.0] * (len(PIECES) + 1)}),
        ("llama", [*PIECES, "a"], {"scores": [0.0] * (len(PIECES) + 1)}),
        ("llama", [*PIECES, ""], {"scores": [0.0] * (len(PIECES) + 1)}),
        ("llama", PIECES, {"scores": [0.0] * len(PIECES), "token_type": [99] * len(PIECES)}),
        ("llama", ["a"], {"scores": [0.0], "unknown_token_id": -5}),
    ],
)
def test_odd_vocabularies_of_gguf_files_are_read_or_refused(
    model: str, tokens: list[str], keys: dict[str, Any]
) -> None:
    started, said = time.process_time(), ""
    for form in (list, Texts.of):
        try:
            made = gguf(model, form(tokens), **keys)  # type: ignore[arg-type]
            ids = made.encode("a cat <x" * 1000)
            assert all(0 <= token_id < made.vocab_size for token_id in ids)
            made.decode([*range(made.vocab_size), HUGE, -1])
        except ModelError as error:
            said += str(error)
    assert "\n" not in said
    assert len(said) < 800
    assert time.process_time() - started < 10
