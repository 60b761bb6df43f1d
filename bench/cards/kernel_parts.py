"""Triton's kernels against torch's operations on a graphics card, each alone: in a graph of CUDA, so the host's part of
a call is not measured, over matrices, or K and V, that do not fit into the card's cache together.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from functools import partial
from statistics import median
from typing import Any, NamedTuple

import numpy as np

from shoal.kernels.arrays import Bytes
from shoal.kernels.attention_operands import KvPages, Rotation, Scoring, Segments, kv_layout
from shoal.kernels.matrix import Linears, Matrix
from shoal.kernels.types import IQ4_NL, Q4_0, Q4_1, Q4_K, Q5_K, Q6_K, Q8_0, WeightType
from shoal.partition.memory_layout import PAGE_TOKENS, KvLayout

ROUNDS = 5
KINDS = (Q4_K, Q6_K, Q5_K, Q4_0, Q8_0, Q4_1, IQ4_NL)  # what is wanted most comes first


class Tried(NamedTuple):
    """Matrices of one form, and rows of inputs."""

    copies: int
    rows: int
    cols: int
    inputs: tuple[int, ...]
    kinds: tuple[WeightType, ...]


class Answering(NamedTuple):
    """Texts with one row each, as long as the other, in `layers` of K and V."""

    texts: int
    tokens: int
    kind: str
    layers: int


REAL = Tried(6, 14336, 4096, (1, 2, 4, 16, 64, 512), KINDS)
DRY = Tried(2, 32, 256, (1, 2), (Q4_K,))
HEADS = 32, 8, 128  # of q, of K and V; their numbers
REAL_LOOKS = [
    Answering(texts, tokens, kind, 6)
    for kind in ("f16", "i8")
    for texts, tokens in ((16, 4096), (1, 4096), (1, 32768), (64, 1024))
]
DIFFERENT = 7  # pages
DRY_LOOKS = [Answering(2, 100, "f16", 1)]


def compared(name: str, *, dry: bool, seconds: float) -> dict[str, Any]:
    """Seconds of one product by kernels, type and rows, of as many as there is time for. `dry`: in the CPU's memory, by
    Triton's interpreter."""
    ends_s = time.monotonic() + seconds
    if dry:
        os.environ["TRITON_INTERPRET"] = "1"  # before it is imported
    tried = DRY if dry else REAL
    device, wrong = _device(name, dry), {}
    all = {"torch": _torch, "triton": _triton}
    homes: dict[str, Any] = {}
    from shoal.devices.device_home import DeviceHome

    for which, make in all.items():
        try:
            homes[which] = DeviceHome(device, make())
        except (ImportError, RuntimeError) as error:
            wrong[which] = f"{type(error).__name__}: {error}"[:200]
    products, late = [], []
    for kind in tried.kinds:
        for rows in tried.inputs:
            if time.monotonic() < ends_s:
                products.append(_product(homes, kind, rows, tried, wrong, dry))
            else:
                late.append(f"{kind.name} by {rows}")
    looks = []
    for its in DRY_LOOKS if dry else REAL_LOOKS:
        if time.monotonic() < ends_s:
            looks.append(_look(homes, its, wrong, dry))
        else:
            late.append(f"{its.kind} K and V of {its.texts} × {its.tokens:,}")
    found = {"products": products, "looks": looks, "failed with": wrong, "no time for": late}
    if dry or late or "triton" not in homes:
        return found
    return found | {"programs": _programs(homes["triton"], wrong, ends_s)}


def _programs(home: Any, wrong: dict[str, str], ends_s: float) -> list[dict[str, Any]]:
    """One row by matrices of few rows, with columns split among more and more programs."""
    from shoal.devices.in_triton import triton_kernels

    products = []
    for cols in (4096, 14336):
        for programs in (264, 528, 1056, 1848):
            if time.monotonic() > ends_s:
                return products
            triton_kernels.PROGRAMS = programs
            tried = Tried(12, 4096, cols, (1,), (Q4_K,))
            made = _product({f"triton with {programs}": home}, Q4_K, 1, tried, wrong, dry=False)
            products.append(made | {"cols": cols})
    return products


def _torch() -> Any:
    from shoal.devices.torch_kernels import TorchKernels

    return TorchKernels()


def _triton() -> Any:
    from shoal.devices.in_triton.triton_kernels import TritonKernels

    return TritonKernels()


def _device(name: str, dry: bool) -> Any:
    if dry:
        from fakes.torch_on_host import TorchOnHost

        return TorchOnHost("sim:kernels", 1 << 30)
    from shoal.devices.cuda_device import CudaDevice

    return CudaDevice(name, 0, None)


def _product(
    homes: dict[str, Any], kind: WeightType, rows: int, tried: Tried, wrong: dict[str, str], dry: bool
) -> dict[str, Any]:
    numbers = np.random.default_rng(1).standard_normal((rows, tried.cols), np.float32)
    w = _matrix(kind, tried)
    seconds, found = {}, {}
    for which, home in homes.items():
        try:
            x, all = home.place(numbers), [Linears([home.keep_matrix(w)]) for _ in range(tried.copies)]
            found[which] = home.fetch(home.linears(x, all[0])[0])  # and kernels are made ready
            calls = [partial(home._kernels.linears, x.inside, it, None, 0.0) for it in all]
            seconds[which] = _each_s(calls, dry)
        except Exception as error:  # what one cannot compute costs the other nothing
            wrong[f"{which}, {kind.name} by {rows}"] = f"{type(error).__name__}: {error}"[:200]
    flops = 2.0 * rows * w.rows * w.cols
    return {
        "type": kind.name,
        "rows": rows,
        "nbytes": w.nbytes,
        "flops": flops,
        "seconds": seconds,
        "off": _off(found, homes),
    }


def _look(homes: dict[str, Any], its: Answering, wrong: dict[str, str], dry: bool) -> dict[str, Any]:
    """Attention of answers' rows, whose texts lie in pages in any order."""
    heads, kv_heads, dim = HEADS
    layout, source = kv_layout(its.kind, dim), np.random.default_rng(4)
    each = -(-its.tokens // PAGE_TOKENS)
    pages = source.permutation(its.texts * each).reshape(its.texts, each)
    angles = source.standard_normal((2, its.texts, dim // 2), np.float32)
    rows = [
        source.standard_normal((its.texts, count * dim), np.float32) for count in (heads, kv_heads, kv_heads)
    ]
    some = [_page(its, layout, source) for _ in range(DIFFERENT)]
    seconds, found = {}, {}
    what = f"{its.kind} K and V of {its.tokens:,}"
    for which, home in homes.items():
        try:
            data = home.pages((pages.size, its.layers, kv_heads, layout.head_bytes))
            for number in range(pages.size):
                home.page_in(data, number, some[number % len(some)])
            layers = [KvPages(layout, heads, home.layer_of(data, layer)) for layer in range(its.layers)]
            segments = Segments.build([(1, its.tokens - 1, mine.tolist()) for mine in pages])
            turning = Rotation(dim, False, *(np.ascontiguousarray(it) for it in angles))
            scoring, (q, k, v) = Scoring(turning, dim**-0.5), (home.place(it) for it in rows)
            found[which] = home.fetch(home.attention(layers[0], segments, q, k, v, scoring))
            placed = scoring._replace(rotation=turning.prepared[home])
            inside = segments.prepared[home].inside, q.inside, k.inside, v.inside
            calls = [partial(home._kernels.attention, kv, segments, *inside, placed) for kv in layers]
            seconds[which] = _each_s(calls, dry)
        except Exception as error:  # what one cannot compute costs the other nothing
            wrong[f"{which}, {what} by {its.texts}"] = f"{type(error).__name__}: {error}"[:200]
    nbytes = its.texts * its.tokens * kv_heads * layout.head_bytes // PAGE_TOKENS
    flops = 4.0 * its.texts * its.tokens * heads * dim
    return {
        "type": what,
        "rows": its.texts,
        "nbytes": nbytes,
        "flops": flops,
        "seconds": seconds,
        "off": _off(found, homes),
    }


def _page(its: Answering, layout: KvLayout, source: np.random.Generator) -> Bytes:
    """Of all layers, with numbers as models have them."""
    page = np.zeros((its.layers, HEADS[1], layout.head_bytes), np.uint8)
    numbers, scales = page[..., : layout.scales_at], page[..., layout.scales_at :]
    if layout.kind.scaled:
        numbers[...] = source.integers(-127, 128, numbers.shape, np.int8).view(np.uint8)
        shape = *scales.shape[:-1], scales.shape[-1] // 4
        scales[...] = source.uniform(0.005, 0.02, shape).astype(np.float32).view(np.uint8)
    else:
        shape = *numbers.shape[:-1], numbers.shape[-1] // 2
        numbers[...] = source.standard_normal(shape, np.float32).astype(np.float16).view(np.uint8)
    return page


def _off(found: dict[str, Any], homes: dict[str, Any]) -> float:
    """How far what both found is apart, of the largest."""
    if not len(found) == len(homes) > 1:
        return float("nan")
    one, other = found.values()
    return float(np.abs(one - other).max() / np.abs(one).max())


def _matrix(kind: WeightType, tried: Tried) -> Matrix:
    from shoal.kernels.stored_rows import from_stored

    generator = np.random.default_rng(2)
    count = tried.rows * tried.cols // kind.block_weights
    blocks = generator.integers(0, 256, (count, kind.block_bytes), np.uint8)
    for start in kind.halves:
        scales = generator.uniform(0, 0.01, (count, 1)).astype(np.float16)
        blocks[:, start : start + 2] = scales.view(np.uint8)
    return from_stored(kind, tried.rows, tried.cols, blocks)


def _each_s(calls: Sequence[Callable[[], object]], dry: bool) -> float:
    """Of one call, one after the other."""
    if dry:
        began_s = time.perf_counter()
        for call in calls:
            call()
        return (time.perf_counter() - began_s) / len(calls)
    import torch

    cuda: Any = torch.cuda
    graph = cuda.CUDAGraph()
    cuda.synchronize()
    with cuda.graph(graph):
        kept = [call() for call in calls]
    took = []
    for _ in range(ROUNDS):
        began, ended = (cuda.Event(enable_timing=True) for _ in range(2))
        began.record()
        graph.replay()
        ended.record()
        cuda.synchronize()
        took.append(began.elapsed_time(ended) / 1e3 / len(calls))
    del kept
    return median(took)
