"""The bar of a batch: one line, however narrow the terminal is, with the most useful first."""

from __future__ import annotations

import io
import re

import pytest
from rich.console import Console

from shoal.cli.terminal import output


@pytest.mark.parametrize("columns", [30, 40, 60, 80, 119, 120, 200])
def test_the_most_useful_stays_on_a_narrow_terminal(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = io.StringIO()
    screen = Console(file=drawn, force_terminal=True, width=columns, color_system=None, highlight=False)
    monkeypatch.setattr(output, "console", lambda *, stderr: screen)
    with output.counts_bar("answering", 25_000) as update:
        drawn.truncate(0)
        update(12_345, ["4 min 12 s left", "50.1 requests/s", "2,113 tokens/s"])
        screen.print("")
    lines = [line for line in drawn.getvalue().replace("\r", "\n").split("\n") if "12,345" in line]
    assert lines
    for line in lines:
        assert len(re.sub(r"\x1b\[[?\d;]*[A-Za-z]", "", line).rstrip()) <= columns
        assert "…" not in line
        assert ("4 min 12 s left" in line) == (columns >= 40)
        assert ("2,113 tokens/s" in line) == (columns >= 80)
    assert "left, 50.1 requests/s, 2,113 tokens/s" in drawn.getvalue() or columns < 80
