"""Readers are woken where there may be something to read, and else left alone."""

from __future__ import annotations

import time
from pathlib import Path

from shoal.kernels.arrays import Bytes
from shoal.kernels.huge_pages import Arena
from shoal.offload.window.readers import READERS, Readers, Region
from shoal.offload.window.window import Line, Passage, Read
from shoal.partition.spec import BlockId

NBYTES = 4096


class Source:
    """A file without checksums."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def check(self, block: BlockId, memory: Bytes) -> None:
        pass

    def condemn(self) -> None:
        pass


class Looked(Line):
    """Counts how often readers look for something to read."""

    looks = 0

    def next_read(self, most_bytes: int) -> Read | None:
        self.looks += 1
        return super().next_read(most_bytes)


def test_nobody_is_woken_for_nothing(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"x" * NBYTES)
    line, passage = Looked(), Passage(BlockId("head"), 0, 0, NBYTES)
    region = Region(line, Arena().take(NBYTES), whole=False)
    readers = Readers(Source(path), [region])
    try:
        until_s = time.monotonic() + 20
        while line.looks < READERS and time.monotonic() < until_s:
            time.sleep(0.001)
        for _ in range(20):
            readers.change(lambda: None)
            readers.give_back(region, [])
            time.sleep(0.001)  # for whoever was woken
        readers.change(lambda: line.extend([passage]))
        assert readers.lease(region, lambda: passage).here
        assert line.looks <= READERS + 3, "one that reads and looks once more, and one woken by who waits"
    finally:
        readers.close()
