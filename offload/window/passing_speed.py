"""How fast blocks pass through a window whose user does nothing with them: by the readers, the policy and the hand-over
that a streamed model's blocks pass by.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from shoal.kernels.arrays import Bytes
from shoal.kernels.huge_pages import Arena
from shoal.partition.spec import BlockId

from .readers import Readers, Region
from .window import Extent, Window


class _Unknown:
    """A file of whose bytes nothing is known."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def check(self, block: BlockId, memory: Bytes) -> None:
        """Whatever they are, they are right."""

    def condemn(self) -> None:
        """Nobody else uses it."""


def _nobody() -> None:
    """Nobody wants to know."""


def passing_speed(
    path: Path,
    seconds: float,
    block_bytes: int,
    ring_bytes: int,
    cycle_bytes: int,
    began: Callable[[], object] = _nobody,
) -> float:
    """Bytes per second at which blocks of `block_bytes` (a multiple of 4 KiB) pass, over and over, from the first
    `cycle_bytes` of a file through a ring of `ring_bytes`, whose size matters: memory that caches hold is filled sooner
    than other memory. `began` is called when they do. 0 if the file has not two blocks. Raises OffloadError."""
    count = min(path.stat().st_size, cycle_bytes) // block_bytes
    if count < 2:
        return 0.0
    cycle = [Extent(BlockId("expert", 0, it), it * block_bytes, block_bytes) for it in range(count)]
    window, memory = Window(ring_bytes, cycle), Arena().take(ring_bytes)
    memory[:] = 0  # every page has to be there
    ring = Region(window, memory, whole=False)
    readers = Readers(_Unknown(path), [ring])
    try:
        passed, began_s = 0, 0.0
        while True:
            passage = readers.lease(ring, partial(window.want, cycle[passed % count].block))
            readers.give_back(ring, [passage])
            now_s = time.perf_counter()
            if not passed:
                began_s = now_s  # from here on as many bytes come as go
                began()
            elif now_s - began_s >= seconds:
                return passed * block_bytes / (now_s - began_s)
            passed += 1
    finally:
        readers.close()
