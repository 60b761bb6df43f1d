"""The errors of predictions: against floors that move, with cells that are void."""

from __future__ import annotations

from dataclasses import replace

import pytest
from harness.cells import Cell, Floors, Foretold, Measured, percentile, summary, verdict

CELL = Cell("m.gguf", "keep", 2, 1, 128, 32)
FORETOLD = Foretold(CELL, "memory", 2.0, 0.1, (8.0, 12.0), 1000, "memory", Floors(40, 2))


def measured(token_s: float, before: float, after: float, peak: int = 1000) -> Measured:
    return Measured(CELL, 2.0, token_s, peak, Floors(before, 2), Floors(after, 2))


def test_a_slower_machine_is_no_error_of_the_prediction() -> None:
    found = verdict(FORETOLD, measured(0.2, 20, 20, 1030))
    assert found.token == pytest.approx(0)
    assert found.absolute == pytest.approx(1)
    assert found.within
    assert not found.void
    assert found.memory == pytest.approx(0.03)
    assert not verdict(FORETOLD, measured(0.2, 40, 40)).within


def test_only_what_reads_goes_with_the_floors() -> None:
    """Half of a token reads memory, which is half as quick now; the prompts compute."""
    found = replace(FORETOLD, parts={"memory": 0.05, "compute": 0.05}, prompt_parts={"compute": 2.0})
    there = verdict(found, measured(0.15, 20, 20))
    assert there.token == pytest.approx(0)
    assert there.ttft == pytest.approx(0)
    streamed = replace(found, binding="disk", parts={"disk": 0.1, "memory": 0.05})
    assert verdict(streamed, measured(0.1, 20, 20)).token == pytest.approx(0)


def test_a_machine_that_changes_makes_a_cell_void() -> None:
    assert verdict(FORETOLD, measured(0.1, 40, 30)).void
    assert not verdict(FORETOLD, measured(0.1, 40, 37)).void
    other = Measured(CELL, 2.0, 0.1, 1, Floors(40, 2.0), Floors(10, 2.1))
    assert not replace(FORETOLD, binding="disk").void(other)
    assert not replace(FORETOLD, parts={"compute": 0.1, "memory": 0.01}).void(measured(0.1, 40, 30))


def test_what_counts() -> None:
    verdicts = [verdict(FORETOLD, measured(0.1 * factor, 40, 40)) for factor in (0.9, 1.0, 1.1, 1.5)]
    verdicts.append(verdict(FORETOLD, measured(9.0, 40, 10)))
    found = summary(verdicts, "token")
    assert found["cells"] == 4
    assert found["void"] == 1
    assert found["median"] == pytest.approx(0.1)
    assert found["90th percentile"] == pytest.approx(0.5)
    assert found["bias"] == pytest.approx(0.125)
    assert found["bands"] == 0.75
    assert summary([], "token") == {"cells": 0, "void": 0}
    assert percentile([], 0.9) == 0
