"""How fast blocks pass is counted while as many bytes come as go, by the readers that a model's window has."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from shoal.kernels.arrays import Bytes
from shoal.offload.direct_io import DirectFile
from shoal.offload.errors import StoreError
from shoal.offload.window.passing_speed import passing_speed

BLOCK = 64 << 10
READ_S = 0.004


@pytest.fixture
def path(tmp_path: Path) -> Path:
    made = tmp_path / "file"
    made.write_bytes(bytes(8 * BLOCK))
    return made


def test_a_slow_disk_is_as_slow_as_it_is(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A ring of two blocks has two reads in flight at most; each takes 4 ms."""
    read: list[int] = []

    def slow(file: DirectFile, offset: int, into: Bytes) -> None:
        time.sleep(READ_S)
        read.append(offset // BLOCK)

    monkeypatch.setattr(DirectFile, "read", slow)
    began: list[int] = []
    found = passing_speed(path, 0.4, BLOCK, 2 * BLOCK, 4 * BLOCK, lambda: began.append(len(read)))
    assert 0.2 * BLOCK / READ_S < found < 2.05 * BLOCK / READ_S
    assert set(read) == {0, 1, 2, 3}, "no more of the file than was asked for"
    assert len(began) == 1
    assert 1 <= began[0] <= 3, "when the first block has come"


def test_a_file_of_one_block_tells_nothing(path: Path) -> None:
    assert passing_speed(path, 0.01, 8 * BLOCK, 8 * BLOCK, 1 << 40) == 0
    assert passing_speed(path, 0.01, BLOCK, 2 * BLOCK, 2 * BLOCK - 1) == 0


def test_a_read_that_fails_is_said(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(file: DirectFile, offset: int, into: Bytes) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(DirectFile, "read", broken)
    with pytest.raises(StoreError, match="Input/output error"):
        passing_speed(path, 0.1, BLOCK, 2 * BLOCK, 8 * BLOCK)
