"""How fast a device is at what a model asks of it: products with matrices of its shapes, and copies; by trying them, in
its own time.

So nobody has to write down how fast a card or its link is. Knows a home; not which model asks.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple

import numpy as np

from shoal.kernels.matrix import Linears, Matrix
from shoal.partition.throughput.profile import RowsLaw

from .device_home import F32_BYTES, DeviceHome
from .expert_timing import TRIED_BYTES, Shape, part_of

_ROWS = (1, 64, 512)
_CALLS = 3  # one after the other, of which only the end is waited for
MOST_SHAPES = 16
COPIED_NUMBERS = 2048  # of a small copy


class DeviceSpeed(NamedTuple):
    """`products`: for each shape. `flops`: the most that any reached; `memory_bytes_per_s`: likewise, of weights with
    one row. `link_bytes_per_s`: of weights that come. `copy_s`: of a small copy, one way, with the waiting."""

    products: tuple[RowsLaw, ...]
    memory_bytes_per_s: float
    flops: float
    link_bytes_per_s: float
    copy_s: float


def device_speed(home: DeviceHome, shapes: Collection[Shape]) -> DeviceSpeed:
    """With matrices of these shapes, or parts of them. Takes milliseconds on a card. Raises HomeFull and HomeLost."""
    parts = _parts(shapes)
    staging = home.staging(max(it.nbytes for it in parts))
    laws, flops, link = [], 0.0, 0.0
    for shape in parts:
        w = Matrix(shape.type, np.zeros(shape.nbytes, np.uint8), shape.rows, shape.cols)
        come_s = min(_come_s(home, w, staging) for _ in range(2))
        link = max(link, w.nbytes / come_s)
        there = home.stage(w, staging, 0)
        took = [_product_s(home, there, rows) for rows in _ROWS]
        laws.append(RowsLaw(shape.type.name, float(w.nbytes), _ROWS, tuple(it / w.nbytes for it in took)))
        flops = max(flops, *(2.0 * rows * w.rows * w.cols / it for rows, it in zip(_ROWS, took, strict=True)))
    memory = max(1 / law.byte_s[0] for law in laws)
    return DeviceSpeed(tuple(laws), memory, flops, link, min(_copy_s(home) for _ in range(3)))


def tried_for_speed_bytes(shapes: Collection[Shape]) -> int:
    """What that takes of the device's memory, at most."""
    parts = _parts(shapes)
    most = max(it.cols + _CALLS * it.rows for it in parts)
    return max(it.nbytes for it in parts) + F32_BYTES * (_ROWS[-1] * most + COPIED_NUMBERS)


def _parts(shapes: Collection[Shape]) -> list[Shape]:
    return list(dict.fromkeys(part_of(it, TRIED_BYTES) for it in shapes))[:MOST_SHAPES]


def _come_s(home: DeviceHome, w: Matrix, staging: object) -> float:
    device = home.device
    begun_s = device.now_s
    home.stage(w, staging, 0)
    device.wait(staging.memory.ready)  # type: ignore[attr-defined]
    return device.now_s - begun_s


def _product_s(home: DeviceHome, w: Matrix, rows: int) -> float:
    device, all = home.device, Linears([w])
    x = home.keep_vector(np.zeros((rows, w.cols), np.float32))
    took = 0.0
    for calls in (1, _CALLS):  # the first time, kernels are made ready
        begun_s = device.now_s
        made = [home.linears(x, all)[0] for _ in range(calls)]
        device.wait(made[-1].memory.ready)
        took = (device.now_s - begun_s) / calls
        del made
    return max(took, 1e-9)


def _copy_s(home: DeviceHome) -> float:
    begun_s = home.device.now_s
    home.fetch(home.place(np.zeros((1, COPIED_NUMBERS), np.float32)))
    return (home.device.now_s - begun_s) / 2
