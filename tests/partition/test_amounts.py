"""How amounts are said."""

from __future__ import annotations

import pytest

from shoal.partition.amounts import counted, format_bytes


@pytest.mark.parametrize(
    ("count", "said"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1 kB"),
        (96_600_000, "96.6 MB"),
        (999_400_000, "999 MB"),
        (999_600_000, "1 GB"),
        (10**20, "100,000 PB"),
        (1_111_000_000, "1.11 GB"),
        (3_019_898_880, "3.02 GB"),
        (1.5e9, "1.5 GB"),
    ],
)
def test_bytes_have_three_digits(count: float, said: str) -> None:
    assert format_bytes(count) == said


def test_one_is_singular() -> None:
    assert [counted(n, "run") for n in (0, 1, 2, 2000)] == ["0 runs", "1 run", "2 runs", "2,000 runs"]
