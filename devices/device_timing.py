"""How fast a device is at what a model asks of it: products with matrices of its shapes, and copies; by trying them, in
its own time.

So nobody has to write down how fast a card or its link is. Knows a home; not which model asks.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection
from itertools import cycle, islice
from statistics import median
from typing import Any, NamedTuple

import numpy as np

from shoal.kernels.arrays import Bytes
from shoal.kernels.compute_home import Staged
from shoal.kernels.homes import cpu
from shoal.kernels.matrix import Linears, Matrix
from shoal.partition.throughput.profile import CopyContention, RowsLaw

from .device import OpenDevice
from .device_home import F32_BYTES, DeviceHome
from .expert_timing import TRIED_BYTES, Shape, from_locked, part_of

_ROWS = (1, 64, 512)
_CALLS = 3  # one after the other, of which only the end is waited for
_ROUNDS = 3
_TOGETHER_S = 0.05  # for so long copies go on beside computing
# Of this machine's memory: weights come from it meanwhile, and the processor reads it, as it would K and V.
HOST_TRIED_BYTES = 64 << 20
_HOST_COLS, _HOST_PIECES = 4096, 16
MOST_SHAPES = 16
COPIED_NUMBERS = 2048  # of a small copy


class DeviceSpeed(NamedTuple):
    """`products`: for each shape. `flops`: the most that any reached; `memory_bytes_per_s`: likewise, of weights with
    one row. `link_bytes_per_s`: of weights that come. `copy_s`: of a small copy, one way, with the waiting.
    `contention`: what is left of these while copies go on. `locked_bytes_per_s`: of weights that come from where they
    are page-locked; 0: nothing is."""

    products: tuple[RowsLaw, ...]
    memory_bytes_per_s: float
    flops: float
    link_bytes_per_s: float
    copy_s: float
    contention: CopyContention = CopyContention()
    locked_bytes_per_s: float = 0.0


def device_speed(home: DeviceHome, shapes: Collection[Shape]) -> DeviceSpeed:
    """With matrices of these shapes, or parts of them. Takes milliseconds on a card. Raises HomeFull and HomeLost."""
    parts = _parts(shapes)
    staging = home.staging(max(it.nbytes for it in parts))
    laws, flops, link = [], 0.0, 0.0
    for shape in parts:
        w = _weights(shape)
        link = max(link, w.nbytes / min(_come_s(home, w, staging) for _ in range(2)))
        there = home.staged(Staged(w, staging, 0))
        took = [_product_s(home, there, rows) for rows in _ROWS]
        laws.append(RowsLaw(shape.type.name, float(w.nbytes), _ROWS, tuple(it / w.nbytes for it in took)))
        flops = max(flops, *(2.0 * rows * w.rows * w.cols / it for rows, it in zip(_ROWS, took, strict=True)))
    memory = max(1 / law.byte_s[0] for law in laws)
    copy_s = min(_copy_s(home) for _ in range(3))
    largest = max(parts, key=_nbytes)
    w = _weights(largest)
    locked_s = from_locked(home, [w.data], lambda: _come_s(home, w, staging))
    contention = copy_contention(home, largest, link)
    locked = w.nbytes / locked_s if locked_s else 0.0
    return DeviceSpeed(tuple(laws), memory, flops, link, copy_s, contention, locked)


def tried_for_speed_bytes(shapes: Collection[Shape]) -> int:
    """What that takes of the device's memory, at most."""
    parts = _parts(shapes)
    most = max(it.cols + _CALLS * it.rows for it in parts)
    largest = max(it.nbytes for it in parts)
    return largest + max(2 * largest, F32_BYTES * (_ROWS[-1] * most + COPIED_NUMBERS))


def copy_contention(home: DeviceHome, shape: Shape, link_bytes_per_s: float) -> CopyContention:
    """What weights that come, this machine's processor and the device keep of their speed while others work: each alone
    and beside copies, in turn. Where the device has a clock of its own, nothing is shared. Raises HomeFull and
    HomeLost."""
    if _virtual(home.device):
        return CopyContention()
    memory = np.ones(max(1, HOST_TRIED_BYTES // shape.nbytes) * shape.nbytes, np.uint8)  # few caches hold it
    sources = [Matrix(shape.type, it, shape.rows, shape.cols) for it in memory.reshape(-1, shape.nbytes)]
    staging, kept = home.staging(shape.nbytes), Linears([home.keep_matrix(sources[0])])
    x = home.keep_vector(np.zeros((1, shape.cols), np.float32))
    row_bytes = F32_BYTES * _HOST_COLS
    numbers = memory[: len(memory) // row_bytes * row_bytes].view(np.float32).reshape(-1, _HOST_COLS)
    read = cycle([Linears([Matrix.of(it)]) for it in np.array_split(numbers, _HOST_PIECES)])
    here = np.ones((1, _HOST_COLS), np.float32)

    def on_host() -> None:
        cpu().linears(here, next(read))

    def on_device() -> None:
        made: Any = home.linears(x, kept)[0]
        home.device.wait(made.memory.ready)

    copies = max(2, round(_TOGETHER_S * link_bytes_per_s / shape.nbytes))
    coming = [Staged(it, staging, 0) for it in islice(cycle(sources), copies)]

    def come() -> Any:
        home.stage(coming)
        return staging.memory.ready

    both = [_beside(home.device, come, work) for work in (on_host, on_device) for _ in range(_ROUNDS)]
    host, device = both[:_ROUNDS], both[_ROUNDS:]
    return CopyContention(
        _share(median(its.work for its in host)),
        _share(median(its.work for its in device)),
        _share(median(its.copies for its in both)),
    )


class _Kept(NamedTuple):
    work: float
    copies: float


def _beside(device: OpenDevice, come: Callable[[], Any], work: Callable[[], None]) -> _Kept:
    """What some work and copies keep of their speed, alone and then together: copies begin with the work, and outlast
    it unless it keeps less than half."""
    began_s = device.now_s
    device.wait(come())
    came_s = device.now_s - began_s
    work()
    count, began_s = 0, device.now_s
    while device.now_s - began_s < came_s / 2:
        work()
        count += 1
    each_s = (device.now_s - began_s) / count
    count, began_s = max(1, round(came_s / each_s / 2)), device.now_s
    ready = come()
    for _ in range(count):
        work()
    worked_s = device.now_s - began_s
    device.wait(ready)
    lost_s = device.now_s - began_s - came_s  # while that worked, as copies went on alone after it
    return _Kept(count * each_s / worked_s, 1 - lost_s / worked_s)


def _nbytes(shape: Shape) -> int:
    return shape.nbytes


def _share(value: float) -> float:
    return min(1.0, max(0.05, value))


def _virtual(device: OpenDevice) -> bool:
    """Whether its clock stands still while this machine's goes on."""
    began_s = device.now_s
    time.sleep(1e-3)
    return device.now_s - began_s < 5e-4


def _parts(shapes: Collection[Shape]) -> list[Shape]:
    return list(dict.fromkeys(part_of(it, TRIED_BYTES) for it in shapes))[:MOST_SHAPES]


def _weights(shape: Shape) -> Matrix:
    return Matrix(shape.type, np.zeros(shape.nbytes, np.uint8), shape.rows, shape.cols)


def _come_s(home: DeviceHome, w: Matrix, staging: Bytes) -> float:
    device = home.device
    begun_s = device.now_s
    home.stage([Staged(w, staging, 0)])
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
