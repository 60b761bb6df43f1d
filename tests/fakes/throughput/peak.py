"""How much memory Python objects take at most while something is done."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable


def peak_bytes_of(act: Callable[[], object]) -> int:
    """Beside what there was before. Whatever `act` raises comes through."""
    tracemalloc.start()
    try:
        act()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
