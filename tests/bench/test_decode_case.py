"""The case that attention of decodes is measured with: three ways to read as much, of which none is timed here."""

from __future__ import annotations

import numpy as np
import pytest
from inputs.decode_case import DecodeCase
from kernel_speed import seconds

CASE = DecodeCase(batch=2, context=100, heads=4, kv_heads=2, dim=64, cold_bytes=8 << 20)


@pytest.mark.parametrize("name", ["bf16", "i8"])
def test_every_row_attends(name: str) -> None:
    attend = CASE.native(name)
    outs = [np.asarray(attend()) for _ in range(CASE.layers(name))]
    assert all(out.shape == (2, 4 * 64) and np.isfinite(out).all() for out in outs)


def test_memory_is_read_whole() -> None:
    assert 0 < seconds(CASE.memory(2), 1) < 60


def test_torch_reads_as_much() -> None:
    pytest.importorskip("torch")
    attend, nbytes = CASE.torch()
    assert nbytes == CASE.kv_bytes("bf16")
    assert getattr(attend(), "shape", None) == (2, 4, 1, 64)
