"""Stop strings are found however the text is cut, and a long list of them costs little."""

from __future__ import annotations

import time
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.models.errors import SamplingError
from shoal.models.tokenizer.stop_strings import StopMatcher


def plain_cut(text: str, stops: list[str]) -> int | None:
    """Where the text ends by definition: the start of the longest stop string at the earliest end."""
    for end in range(1, len(text) + 1):
        starts = [end - len(stop) for stop in stops if text[:end].endswith(stop)]
        if starts:
            return min(starts)
    return None


@given(
    text=st.text(alphabet="abc", max_size=40),
    stops=st.lists(st.text(alphabet="abc", min_size=1, max_size=5), max_size=3),
    cuts=st.lists(st.integers(0, 40), max_size=10),
)
@settings(max_examples=1000, deadline=None)
def test_stop_strings_are_found_however_the_text_is_cut(text: str, stops: list[str], cuts: list[int]) -> None:
    matcher, shown, hit = StopMatcher(stops), "", False
    borders = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    for start, end in pairwise(borders):
        emitted, hit = matcher.push(text[start:end])
        shown += emitted
        assert text.startswith(shown)
        if hit:
            break
    if not hit:
        shown += matcher.flush()
    cut = plain_cut(text, stops)
    assert hit == (cut is not None)
    assert shown == (text if cut is None else text[:cut])


def test_only_a_possible_beginning_is_held_back() -> None:
    matcher = StopMatcher(["\nUser:", "###"])
    assert matcher.push("Hello\nUs") == ("Hello", False)
    assert matcher.push("ual #") == ("\nUsual ", False)
    assert matcher.push("#") == ("", False)
    assert matcher.push("1") == ("##1", False)
    assert matcher.push(" ok\nUser: x") == (" ok", True)


@pytest.mark.parametrize("stop", ["", "x" * 1025])
def test_unusable_stop_strings_are_refused(stop: str) -> None:
    with pytest.raises(SamplingError, match="stop string"):
        StopMatcher(["fine", stop])


@given(
    stops=st.lists(st.text(alphabet="ab", min_size=1, max_size=40), min_size=1, max_size=8),
    repeats=st.lists(st.tuples(st.integers(0, 7), st.integers(0, 40), st.integers(0, 9)), max_size=20),
)
@settings(max_examples=500, deadline=None)
def test_long_strings_that_almost_come_are_found_too(
    stops: list[str], repeats: list[tuple[int, int, int]]
) -> None:
    text = "".join(stops[which % len(stops)][skip % 3 : skip + size] for which, size, skip in repeats)
    matcher, shown, hit = StopMatcher(stops), "", False
    for char in text:
        emitted, hit = matcher.push(char)
        shown += emitted
        if hit:
            break
    cut = plain_cut(text, stops)
    assert hit == (cut is not None)
    assert shown + matcher.flush() == (text if cut is None else text[:cut])


def test_a_long_list_of_long_strings_costs_little_per_piece() -> None:
    stops = [("ab" * 512)[:1023] + chr(0x100 + i) for i in range(64)]
    pieces = [*["ab"] * 400, "c"] * 25
    matcher = StopMatcher(stops)
    started = time.perf_counter()
    assert "".join(matcher.push(piece)[0] for piece in pieces) == "".join(pieces)
    assert time.perf_counter() - started < 5  # 0.2 s on an idle machine, 20 µs a piece
