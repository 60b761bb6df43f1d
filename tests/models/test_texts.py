"""Packed texts are the same as the list that they are made of, and each consists of whole characters."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.models.texts import Texts

texts = st.lists(st.text(max_size=8), max_size=20)


@given(texts)
@settings(max_examples=200, deadline=None)
def test_as_the_list_of_them(given: list[str]) -> None:
    packed = Texts.of(given)
    assert len(packed) == len(given)
    assert list(packed) == given
    assert [packed[i] for i in range(-len(given), len(given))] == given * 2
    for index in (len(given), -len(given) - 1):
        with pytest.raises(IndexError):
            packed[index]
    for text in ("", "no such", *given):
        assert (text in packed) == (text in given)


@given(texts, st.data())
@settings(max_examples=200, deadline=None)
def test_borders_within_characters_are_refused(given: list[str], data: st.DataObject) -> None:
    whole = "".join(given).encode()
    borders = sorted(data.draw(st.lists(st.integers(0, len(whole)), max_size=8)))
    parts = [whole[a:b] for a, b in zip([0, *borders], [*borders, len(whole)], strict=True)]
    bad = [i for i, part in enumerate(parts) if not _is_text(part)]
    if not bad:
        assert list(Texts(whole, [len(part) for part in parts])) == [part.decode() for part in parts]
        return
    with pytest.raises(ValueError, match=f"item {bad[0]} is not valid UTF-8"):
        Texts(whole, [len(part) for part in parts])


@pytest.mark.parametrize("parts", [[b"\xff"], [b"a", b"\xc3"], [b"\xc3", b"\xa9"], [b"", b"\xed\xa0\x80"]])
def test_bytes_that_are_no_text_are_refused(parts: list[bytes]) -> None:
    bad = next(i for i, part in enumerate(parts) if not _is_text(part))
    with pytest.raises(ValueError, match=f"item {bad} is not valid UTF-8"):
        Texts(b"".join(parts), [len(part) for part in parts])


def test_a_lone_surrogate_has_no_bytes() -> None:
    with pytest.raises(UnicodeEncodeError):
        Texts.of(["a", "\ud800"])


def _is_text(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True
