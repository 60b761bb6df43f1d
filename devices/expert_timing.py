"""How long a device takes for one expert to come, and to compute with it: found by trying both, in its own time.

So nobody has to write down how fast a card or its link is. Knows a home; not which model asks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from shoal.kernels.arrays import Bytes
from shoal.kernels.compute_home import Staged
from shoal.kernels.matrix import Linears, Matrix
from shoal.kernels.types import WeightType
from shoal.partition.memory_layout import staged_slot_bytes, staged_starts
from shoal.partition.placement import FEW_ROWS, MANY_ROWS, ExpertTimes

from .device_home import DeviceHome

TRIED_BYTES = 16 << 20  # of weights; larger experts are tried in part


class Shape(NamedTuple):
    """Of a matrix."""

    type: WeightType
    rows: int
    cols: int

    @property
    def nbytes(self) -> int:
        return self.type.matrix_bytes(self.rows, self.cols)


def part_of(shape: Shape, most_bytes: int) -> Shape:
    """As many of its rows as take no more, but at least one."""
    return shape._replace(rows=max(1, min(shape.rows, int(shape.rows * most_bytes / shape.nbytes))))


def tried_bytes(expert: Sequence[Shape]) -> int:
    """What trying takes of the device's memory, at most."""
    part = _part(expert)
    numbers = MANY_ROWS * max(it.cols + 2 * it.rows for it in part)
    return staged_slot_bytes(_nbytes(part)) + 4 * numbers


def expert_times(home: DeviceHome, expert: Sequence[Shape]) -> ExpertTimes:
    """Of an expert with these matrices. Takes milliseconds on a card. Raises HomeFull and HomeLost."""
    part = _part(expert)
    matrices = [
        Matrix(kind, np.zeros(kind.matrix_bytes(rows, cols), np.uint8), rows, cols)
        for kind, rows, cols in part
    ]
    *starts, end = staged_starts([it.nbytes for it in matrices])
    device, staging = home.device, home.staging(end)
    coming = [Staged(it, staging, start) for it, start in zip(matrices, starts, strict=True)]
    there = [home.staged(it) for it in coming]

    def computed_s(rows: int, form: Shape, w: Matrix) -> float:
        x = home.keep_vector(np.zeros((rows, form.cols), np.float32))
        begun_s = device.now_s
        device.wait(home.linears(x, Linears([w]))[0].memory.ready)
        return device.now_s - begun_s

    def came() -> float:
        begun_s = device.now_s
        home.stage(coming)
        device.wait(staging.memory.ready)
        return device.now_s - begun_s

    for _ in range(2):  # the first time, kernels are made ready
        came_s = came()
        few_s, many_s = (
            sum(computed_s(rows, form, w) for form, w in zip(part, there, strict=True))
            for rows in (FEW_ROWS, MANY_ROWS)
        )
    locked_s = from_locked(home, [it.data for it in matrices], came)
    whole = _nbytes(expert)
    share = sum(it.nbytes for it in matrices) / whole
    seconds = came_s / share, FEW_ROWS, few_s / share, MANY_ROWS, many_s / share, locked_s / share
    return ExpertTimes(whole, *seconds)


def from_locked(home: DeviceHome, all: Sequence[Bytes], came: Callable[[], float]) -> float:
    """What `came` finds that a copy of these takes, twice, while they are page-locked where they lie; 0: they cannot
    all be."""
    if (locked := home.lock(all)) is None:
        return 0.0
    try:
        return 0.0 if locked.trouble else min(came(), came())
    finally:
        locked.release()


def _part(expert: Sequence[Shape]) -> list[Shape]:
    """Some rows of each matrix."""
    share = min(1.0, TRIED_BYTES / _nbytes(expert))
    return [part_of(it, int(share * it.nbytes)) for it in expert]


def _nbytes(expert: Sequence[Shape]) -> int:
    return sum(it.nbytes for it in expert)
