"""Tables on narrow terminals: no word or number is broken."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from shoal.cli.terminal.output import table

ROWS = [
    ("stream, large window", "yes", "5 min 55 s", "0.0145", "0.0116 to 0.0181"),
    ("Meta-Llama-3-8B-Instruct", "no", "7 min 54 s", "3.02", "2.4 to 3.81"),
]


@pytest.mark.parametrize("width", [26, 30, 36, 40, 50, 60, 80, 120])
def test_words_and_numbers_stay_whole(width: int) -> None:
    made = table("plan", "fits", "first token", "tokens/s", "between", right=("tokens/s",))
    for row in ROWS:
        made.add_row(*row)
    out = io.StringIO()
    Console(file=out, width=width).print(made)
    lines = out.getvalue().splitlines()
    assert all(len(line.rstrip()) <= width for line in lines)
    words = " ".join(lines).split()
    for row in ROWS:
        for word in " ".join(row).split():
            assert word in words
    stacked = "plan" not in words
    assert stacked == (width < 60), words
