"""Which texts only repeat themselves: loops do, and nothing that anybody wants to read does."""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.models.tokenizer import repetition
from shoal.models.tokenizer.repetition import (
    LONGEST_TOKENS,
    LOOK_TOKENS,
    REPEATED_BYTES,
    REPEATED_TIMES,
    REPEATED_TOKENS,
    Repetition,
)

CONTEXT = 8192


def found_after(pieces: list[str], context: int = CONTEXT) -> int | None:
    """After how many tokens the text is found to repeat itself; equal pieces are equal tokens."""
    ids: dict[str, int] = {}
    subject = Repetition(context)
    for count, piece in enumerate(pieces, 1):
        if subject.push(ids.setdefault(piece, len(ids)), len(piece.encode())):
            return count
    return None


def words(text: str) -> list[str]:
    """About as a tokenizer cuts it: words with the space before them, runs of a sign, digits one by one."""
    return [found[0] for found in re.finditer(r" ?[^\W\d_]{1,12}|\s{2,8}|([^\w\s])\1{0,7}|[\s\S]", text)]


def letters(text: str) -> list[str]:
    return list(text)


INTRO = "Once upon a time there was a ship, and nobody on it knew where it was bound for. "
LOOPS = {
    "a sentence": INTRO + "The ship was beautiful. " * 400,
    "a word": INTRO + " very" * 3000,
    "a letter": INTRO + "a" * 9000,
    "lines": INTRO + "I do not know.\n\n" * 500,
    "a paragraph": INTRO + (INTRO * 3 + "It was a great ship with a hull of silver. " * 2) * 30,
    "signs": INTRO + "!" * 9000,
    "spaces": INTRO + "\n" * 9000,
    "Chinese": "从前有一艘船。" + "这是一艘很大的船。" * 400,
    "code": "def f(x):\n" + "    if x:\n        return x\n" * 300,
}
WANTED = {
    "a poem with a refrain": (
        ("Row, row, row your boat,\nGently down the stream.\n" * 4 + "And then,\n") * 4
    ),
    "a song of one word": "Na na na na na na na na, hey Jude!\n" * 30,
    "lines for a school": "I will not talk in class.\n" * 100,
    "a ruler": ("-" * 80 + "\n") * 12,
    "a filled box": ("#" * 80 + "\n") * 40,
    "a box of blocks": ("█" * 60 + "\n") * 20,
    "a chess board": ("⬛⬜" * 4 + "\n" + "⬜⬛" * 4 + "\n") * 12,
    "an empty table": "| Day | Task | Done |\n|---|---|---|\n" + "|     |      |      |\n" * 60,
    "a matrix of zeros": ("0 " * 30 + "\n") * 30,
    "a list of zeros": "static const unsigned char table[256] = {\n"
    + ("    " + "0x00, " * 8 + "\n") * 32
    + "};\n",
    "a count": "".join(f"{number}. Item {number}\n" for number in range(1, 600)),
    "a table of numbers": "".join(f"| {i} | {i * i} | {i * i * i} |\n" for i in range(1, 400)),
    "a log": "".join(f"12:{i // 60:02}:{i % 60:02} GET /index.html 200\n" for i in range(300)),
    "a hex dump": "".join(f"{16 * i:08x}  {'00 ' * 16}\n" for i in range(100)),
    "tests": "".join(f"def test_{name}() -> None:\n    assert f('{name}') == 1\n\n\n" for name in range(150)),
    "json": "[" + ", ".join(f'{{"id": {i}, "name": null, "tags": []}}' for i in range(200)) + "]",
    "html": "<table>\n" + "<tr><td></td><td></td><td></td></tr>\n" * 50 + "</table>\n",
    "a drum tab": "|x-x-x-x-|x-x-x-x-|x-x-x-x-|x-x-x-x-|\n|----o---|----o---|----o---|----o---|\n" * 16,
    "source code": Path(repetition.__file__).read_text(),
    "a test": Path(__file__).read_text(),
}


@pytest.mark.parametrize("cut", [words, letters])
@pytest.mark.parametrize("name", LOOPS)
def test_loops_are_found_soon(name: str, cut: Callable[[str], list[str]]) -> None:
    pieces = cut(LOOPS[name])
    after = found_after(pieces)
    assert after is not None
    shown = sum(len(piece.encode()) for piece in pieces[:after])
    assert after <= 2300 or shown < 2 * REPEATED_BYTES
    assert after < len(pieces)


@pytest.mark.parametrize("name", WANTED)
def test_what_people_want_to_read_is_not(name: str) -> None:
    assert found_after(words(WANTED[name])) is None


@given(
    st.integers(1, LONGEST_TOKENS), st.integers(0, 3000), st.integers(1, 9), st.randoms(use_true_random=False)
)
def test_whatever_is_repeated_is_found_once_it_is_enough(
    period: int, before: int, size: int, source: random.Random
) -> None:
    ids = [source.randrange(1000) for _ in range(before)]
    piece = [source.randrange(5) for _ in range(period)]
    enough = max(REPEATED_TIMES * period, min(REPEATED_TOKENS, -(-REPEATED_BYTES // size)))
    subject = Repetition(10**6)
    ids += piece * (enough // period + LOOK_TOKENS)
    after = next(count for count, token in enumerate(ids, 1) if subject.push(token, size))
    assert after <= before + enough + LOOK_TOKENS


@given(st.lists(st.integers(0, 2), min_size=1, max_size=40), st.integers(1, 20))
def test_it_is_exact(ids: list[int], enough_tokens: int) -> None:
    """Against the definition, with small bounds."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (
            ("REPEATED_BYTES", 24),
            ("REPEATED_TIMES", 3),
            ("LONGEST_TOKENS", 6),
            ("LOOK_TOKENS", 1),
        ):
            patch.setattr(repetition, name, value)
        subject = Repetition(2 * enough_tokens)
        for count, token in enumerate(ids, 1):
            text = ids[:count]
            enough = min(8, enough_tokens)  # 24 bytes, 3 a token
            found = any(
                text[-length:-period] == text[-length + period :]
                for period in range(1, 7)
                for length in range(max(enough, 3 * period), max(enough, 18) + 1)
                if length <= count
            )
            assert subject.push(token, 3) == found


def test_in_a_small_context_half_of_it_is_enough() -> None:
    assert found_after(letters("ab" * 300), context=600) == 320
    assert found_after(letters("ab" * 300), context=6000) is None
