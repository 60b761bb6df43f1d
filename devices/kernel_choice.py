"""Which kernels compute on a card: Triton's where they are there, right and quicker than torch's operations, as tried
on the card itself when it is opened. SHOAL_DEVICE_KERNELS=torch does without Triton, =triton without trying.

Imports torch only with a card, and Triton only where it is installed. Their first use compiles them, which takes some
seconds and a C compiler; Triton keeps what it has compiled.
"""

from __future__ import annotations

import os
from statistics import median
from typing import NamedTuple

import numpy as np

from shoal.kernels.arrays import Floats
from shoal.kernels.errors import HomeFull, HomeLost
from shoal.kernels.matrix import Linears, Matrix
from shoal.kernels.stored_rows import from_stored
from shoal.kernels.types import Q4_K, Q6_K, WeightType

from .device import OpenDevice
from .device_home import DeviceHome
from .errors import NoSuchDevice
from .on_device import OnDevice

TRIED_KINDS = (Q4_K, Q6_K)
TRIED_ROWS, TRIED_COLS = 4096, 2048
FEW, SOME = 1, 64  # rows of inputs
_CALLS = 8  # in a row, of which only the end is waited for
_CLOSE = 2e-3  # of the largest number: more rows than one are rounded to float16


VARIABLE = "SHOAL_DEVICE_KERNELS"


class ChosenKernels(NamedTuple):
    """`why` torch computes all or some of it, for whoever asks; "" if it does not."""

    kernels: OnDevice
    why: str


def chosen(device: OpenDevice) -> ChosenKernels:
    """For a card. Raises HomeLost; NoSuchDevice if the variable names no kernels."""
    from .torch_kernels import TorchKernels

    asked = os.environ.get(VARIABLE, "")
    if asked not in ("", "torch", "triton"):
        raise NoSuchDevice(f"{VARIABLE}={asked[:40]} is neither torch nor triton")
    if asked == "torch":
        return ChosenKernels(TorchKernels(), f"{VARIABLE} says torch")
    try:
        from .triton_kernels import TritonKernels, too_old
    except (ImportError, OSError, RuntimeError) as error:  # RuntimeError: it finds no driver that it can use
        return ChosenKernels(TorchKernels(), f"triton cannot be imported: {_line(error)}")
    if asked:
        return ChosenKernels(TritonKernels(), "")
    if why := too_old():
        return ChosenKernels(TorchKernels(), why)
    torch = DeviceHome(device, TorchKernels())
    used, said = [], []
    for rows in (FEW, SOME):
        kernels = TritonKernels()
        lacks = _lacks(torch, DeviceHome(device, kernels), rows)
        lacks = f"triton's kernels cannot be had: {kernels.refused}" if kernels.refused else lacks
        used.append(not lacks)
        said += [f"torch computes with {'one row' if rows == FEW else 'more rows'}: {lacks}"] if lacks else []
    why = "; ".join(said)
    return ChosenKernels(TritonKernels(*used) if any(used) else TorchKernels(), why)


def _lacks(torch: DeviceHome, triton: DeviceHome, rows: int) -> str:
    """Why Triton's kernels are not for so many rows; "" if they are."""
    x = np.random.default_rng(1).standard_normal((rows, TRIED_COLS), np.float32)
    theirs_s = ours_s = 0.0
    for kind in TRIED_KINDS:
        w = _matrix(kind)
        try:
            true, took_s = _tried(torch, w, x)
            theirs_s += took_s
            found, took_s = _tried(triton, w, x)
        except HomeLost:
            raise
        except HomeFull as error:
            return f"there is no room to try triton: {error}"
        except Exception as error:  # whatever a compiler may say
            return f"triton's kernels cannot be made: {_line(error)}"
        ours_s += took_s
        off = float(np.abs(found - true).max() / np.abs(true).max())
        if not off <= _CLOSE:
            return f"triton's are {off:.1e} away from it with {kind.name}"
    if ours_s >= theirs_s:
        return f"it takes {theirs_s * 1e6:.0f} µs where triton takes {ours_s * 1e6:.0f}"
    return ""


def _matrix(kind: WeightType) -> Matrix:
    """Random numbers, whose scales are small."""
    generator = np.random.default_rng(2)
    blocks = generator.integers(
        0, 256, (TRIED_ROWS * TRIED_COLS // kind.block_weights, kind.block_bytes), np.uint8
    )
    for start in kind.halves:
        blocks[:, start : start + 2] = (
            generator.uniform(0, 0.01, (len(blocks), 1)).astype(np.float16).view(np.uint8)
        )
    return from_stored(kind, TRIED_ROWS, TRIED_COLS, blocks)


def _tried(home: DeviceHome, w: Matrix, x: Floats) -> tuple[Floats, float]:
    """The products, and how long they took, by the device's clock."""
    device, all, there = home.device, Linears([home.keep_matrix(w)]), home.place(x)
    found: Floats = home.fetch(home.linears(there, all)[0])  # the first time, kernels are made
    took = []
    for _ in range(3):
        begun_s = device.now_s
        made = [home.linears(there, all)[0] for _ in range(_CALLS)]
        device.wait(made[-1].memory.ready)
        took.append((device.now_s - begun_s) / _CALLS)
    return found, median(took)


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:200]
