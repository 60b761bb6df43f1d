"""Which kernels compute on a card: Triton's where they are there, right and quicker than torch's operations, as tried
on the card itself when it is opened. SHOAL_DEVICE_KERNELS=torch does without Triton, =triton without trying.

Imports torch only with a card, and Triton only where it is installed. Their first use compiles them, which takes some
seconds and a C compiler; Triton keeps what it has compiled.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from functools import partial
from statistics import median
from typing import Any, NamedTuple

import numpy as np

from shoal.kernels.arrays import Floats
from shoal.kernels.attention_operands import KvPages, Rotation, Scoring, Segments, kv_layout
from shoal.kernels.errors import HomeFull, HomeLost
from shoal.kernels.matrix import Linears, Matrix
from shoal.kernels.stored_rows import from_stored
from shoal.kernels.types import Q4_K, Q6_K, WeightType
from shoal.partition.memory_layout import PAGE_TOKENS

from .device import OpenDevice
from .device_home import DeviceHome
from .errors import NoSuchDevice
from .on_device import OnDevice

TRIED_KINDS = (Q4_K, Q6_K)
TRIED_ROWS, TRIED_COLS = 4096, 2048
FEW, SOME = 1, 64  # rows of inputs
TRIED_KV = ("f16", "i8")
TRIED_PAGES, TRIED_HEADS = 32, (32, 8, 128)  # of a text; heads of q, of K and V, and their numbers
_CALLS = 8  # in a row, of which only the end is waited for
_CLOSE = 2e-3  # of the largest number of a row: more rows than one are rounded to float16


VARIABLE = "SHOAL_DEVICE_KERNELS"


Trial = Callable[[DeviceHome], tuple[Floats, float]]
"""What is found there, and seconds."""


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
        from .in_triton.triton_kernels import ATTENTION, MANY, ONE_ROW, WITH, TritonKernels, too_old
    except (ImportError, OSError, RuntimeError) as error:  # RuntimeError: it finds no driver that it can use
        return ChosenKernels(TorchKernels(), f"triton cannot be imported: {_line(error)}")
    if asked:
        return ChosenKernels(TritonKernels(), "")
    if why := too_old():
        return ChosenKernels(TorchKernels(), why)
    torch = DeviceHome(device, TorchKernels())
    trials = {ONE_ROW: _products(FEW), MANY: _products(SOME), ATTENTION: _looks()}
    used, said = [], []
    for use, tried in trials.items():
        kernels = TritonKernels({use})
        lacks = _lacks(torch, DeviceHome(device, kernels), tried)
        lacks = f"triton's kernels cannot be had: {kernels.refused}" if kernels.refused else lacks
        used += [] if lacks else [use]
        said += [f"torch computes {WITH[use]}: {lacks}"] if lacks else []
    return ChosenKernels(TritonKernels(used) if used else TorchKernels(), "; ".join(said))


def _products(rows: int) -> dict[str, Trial]:
    """Of weights of each type by so many rows."""
    x = np.random.default_rng(1).standard_normal((rows, TRIED_COLS), np.float32)
    return {kind.name: partial(_tried, _matrix(kind), x) for kind in TRIED_KINDS}


def _looks() -> dict[str, Trial]:
    """Of answers' rows, over K and V of each type."""
    return {f"{kind} K and V": partial(_looked, kind) for kind in TRIED_KV}


def _lacks(torch: DeviceHome, triton: DeviceHome, trials: Mapping[str, Trial]) -> str:
    """Why Triton's kernels are not for these; "" if they are."""
    theirs_s = ours_s = 0.0
    for what, trial in trials.items():
        try:
            true, took_s = trial(torch)
            theirs_s += took_s
            found, took_s = trial(triton)
        except HomeLost:
            raise
        except HomeFull as error:
            return f"there is no room to try triton: {error}"
        except Exception as error:  # whatever a compiler may say
            return f"triton's kernels cannot be made: {_line(error)}"
        ours_s += took_s
        off = float((np.abs(found - true).max(1) / np.abs(true).max(1)).max())
        if not off <= _CLOSE:
            return f"triton's are {off:.1e} away from it with {what}"
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


def _tried(w: Matrix, x: Floats, home: DeviceHome) -> tuple[Floats, float]:
    """The products, and how long they took, by the device's clock."""
    all, there = Linears([home.keep_matrix(w)]), home.place(x)
    return _timed(home, lambda: home.linears(there, all)[0])


def _looked(kind: str, home: DeviceHome) -> tuple[Floats, float]:
    """What two texts' rows find, with TRIED_PAGES pages and with half of them; and how long that took."""
    heads, kv_heads, dim = TRIED_HEADS
    layout, source = kv_layout(kind, dim), np.random.default_rng(3)
    texts = range(TRIED_PAGES), range(TRIED_PAGES, TRIED_PAGES + TRIED_PAGES // 2)
    pages = home.pages((texts[-1].stop, 1, kv_heads, layout.head_bytes))
    kv = KvPages(layout, heads, home.layer_of(pages, 0))
    most = 2 * PAGE_TOKENS  # rows of prompts, which torch stores
    angles = source.standard_normal((2, most, dim // 2), np.float32)

    def attended(segments: Segments) -> Callable[[], Any]:
        rows = segments.tokens
        turning = Rotation(dim, False, *(np.ascontiguousarray(it[:rows]) for it in angles))
        q, k, v = (
            home.place(source.standard_normal((rows, its * dim), np.float32))
            for its in (heads, kv_heads, kv_heads)
        )
        return lambda: home.attention(kv, segments, q, k, v, Scoring(turning, dim**-0.5))

    for its in texts:
        for begun in range(0, len(its), 2):
            some = its[: begun + 2]
            rows = (len(some) - begun) * PAGE_TOKENS
            attended(Segments.build([(rows, begun * PAGE_TOKENS, some)]))()
    answers = Segments.build((1, len(its) * PAGE_TOKENS - 1, its) for its in texts)
    return _timed(home, attended(answers))


def _timed(home: DeviceHome, call: Callable[[], Any]) -> tuple[Floats, float]:
    found: Floats = home.fetch(call())  # the first time, kernels are made
    took = []
    for _ in range(3):
        begun_s = home.device.now_s
        made = [call() for _ in range(_CALLS)]
        home.device.wait(made[-1].memory.ready)
        took.append((home.device.now_s - begun_s) / _CALLS)
    return found, median(took)


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:200]
