"""How deep JSON is nested and what it may take, without decoding it."""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path
from typing import Any

import pytest

from shoal.daemon.errors import DaemonError
from shoal.daemon.throughput.profile_files import parse_profile
from shoal.models.json_bounds import MAX_NESTING, check_nesting, decoded_bytes
from shoal.models.regular_files import object_of, read_advice


def nested(depth: int) -> bytes:
    return b"[" * depth + b"]" * depth


def test_only_what_is_nested_too_deep_is_refused() -> None:
    check_nesting(nested(MAX_NESTING))
    check_nesting(b",".join([nested(MAX_NESTING)] * 50_000))
    check_nesting(b"]" * 100 + nested(MAX_NESTING))
    for deep in (nested(MAX_NESTING + 1), b"[" * 100_000, b'{"a":[' * 40, b'"\\\\"' + nested(65)):
        with pytest.raises(ValueError, match="is nested too deep: must be at most 64 deep"):
            check_nesting(deep)


def test_brackets_in_texts_do_not_count() -> None:
    for text in ("[" * 1000, '"[' * 1000, "\\[" * 1000, '\\"[{' * 1000, "\\" * 999 + "[" * 70, "é[" * 1000):
        check_nesting(json.dumps([text, {text: text}, text], ensure_ascii=False).encode())
    check_nesting(b'["\\u005b' + b"[" * 100_000)  # which never ends


def test_random_values_are_measured_as_they_are() -> None:
    source = random.Random(3)
    pieces = ['"', "\\", "[", "}", "a", ":", ",", "\\\\", '\\"', "\u20ac"]

    def value(depth: int) -> Any:
        if not depth:
            return "".join(source.choices(pieces, k=source.randrange(30)))
        inner = value(depth - 1)
        return source.choice(([inner, value(0)], {value(0): inner, "x" * 9: value(0)}))

    for _ in range(300):
        depth = source.choice([MAX_NESTING - 1, MAX_NESTING, MAX_NESTING + 1, MAX_NESTING + 2])
        text = json.dumps(value(depth), ensure_ascii=source.random() < 0.5).encode()
        if depth <= MAX_NESTING:
            check_nesting(text)
        else:
            with pytest.raises(ValueError, match="deep"):
                check_nesting(text)


def _bytes_of(value: Any) -> int:
    """Of the value's objects, without the characters of texts."""
    parts = [*value, *value.values()] if isinstance(value, dict) else value if isinstance(value, list) else []
    characters = len(value) if isinstance(value, str) else 0
    return sys.getsizeof(value) - characters + sum(map(_bytes_of, parts))


@pytest.mark.parametrize(
    "value",
    [[], [{}] * 900, [[]] * 900, [{"role": "user"}] * 900, [2000] * 9000, [0.5] * 900, [""] * 900, "[]" * 9],
)
def test_objects_take_no_more_than_is_said(value: Any) -> None:
    text = json.dumps(value).encode()
    assert _bytes_of(json.loads(text)) <= decoded_bytes(text) + 128


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32-le"])
def test_json_is_utf_8(encoding: str) -> None:
    """In other encodings a quote has other bytes, so nesting could not be measured."""
    for text in ('{"a":"\u2200","b":', '{"a":"\\"","b":'):
        data = (text + "[" * 100_000 + "]" * 100_000 + "}").encode(encoding)
        with pytest.raises(ValueError, match=r"is not valid JSON|is nested too deep"):
            object_of(data)
        with pytest.raises(DaemonError, match=r"is no JSON|is nested too deep"):
            parse_profile(data, "profile.json")
    assert object_of(b'\xef\xbb\xbf{"a":1}') == {"a": 1}


def test_a_configuration_that_is_nested_too_deep_is_refused_at_any_depth(tmp_path: Path) -> None:
    for depth in (MAX_NESTING, 500, 980, 100_000):
        with pytest.raises(ValueError, match="is nested too deep"):
            object_of(b'{"a":' + nested(depth) + b"}")
        (file := tmp_path / "generation_config.json").write_bytes(b'{"a":' + nested(depth) + b"}")
        assert read_advice(file) == (
            {},
            [f"{file}: is nested too deep: must be at most 64 deep; it is not used"],
        )
