"""The bench of a star's round trip: that it runs, and says what it says it does."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "bench" / "round_trip.py"


def test_it_measures_all_three_in_turn() -> None:
    command = [sys.executable, str(SCRIPT), "--ranks", "2,3", "--bytes", "1000", "--rounds", "1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    header, _, *rows = [line.strip("| ").split(" | ") for line in done.stdout.splitlines()]
    assert header[:5] == ["ranks", "bytes", "tcp, µs", "ssl, µs", "shoal, µs"]
    assert [row[:2] for row in rows] == [["2", "1,000"], ["3", "1,000"]]
    for row in rows:
        tcp, _, ours = (float(cell.replace(",", "")) for cell in row[2:5])
        assert min(tcp, ours) > 0
