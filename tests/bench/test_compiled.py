"""Triton's kernels fit into a card's registers: compiled for one that is not there. `make test-cards` has others."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

triton = pytest.importorskip("triton", reason="triton is not installed (Linux on x86-64 only)")
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
ROOT = Path(__file__).parent.parent.parent


@pytest.mark.skipif(not (TOOLS / "ptxas").exists(), reason="triton has no assembler here")
def test_nothing_is_spilled(tmp_path: Path) -> None:
    """Types of each family; `bench/cards/compiled.py` has all. Compiled anew: what is kept may be of other kernels."""
    options = "--cards 90 --types Q4_K,Q6_K,Q5_1 --brief"
    command = [sys.executable, "bench/cards/compiled.py", *options.split()]
    environment = os.environ | {"TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stderr
    rows = [line.split() for line in done.stdout.splitlines()]
    assert [row[0] for row in rows].count("one_row") == 4
    for row in rows:
        if row[:3] == ["one_row", "Q4_K", "1"]:
            assert int(row[8]) >= 11, "weights are read 16 bytes at a time"
