"""Reading a file to see how fast that is reads no byte twice."""

from __future__ import annotations

from pathlib import Path

import pytest

from shoal.kernels.arrays import Bytes
from shoal.offload import read_speed as speeds
from shoal.offload.direct_io import DirectFile
from shoal.offload.read_speed import read_speed

READ = 4096


@pytest.mark.parametrize("first", [16, 48, 1000])
def test_each_byte_is_read_once(tmp_path: Path, first: int, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(READ * 48))
    read: list[int] = []

    def noted(file: DirectFile, offset: int, into: Bytes) -> None:
        read.append(offset // READ)

    monkeypatch.setattr(speeds.DirectFile, "read", noted)
    assert read_speed(path, 5.0, READ, first * READ) > 0
    assert sorted(read) == [*range(min(first, 48))]


def test_a_file_that_is_too_short_tells_nothing(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(READ))
    assert read_speed(path, 0.01, 2 * READ) == 0
