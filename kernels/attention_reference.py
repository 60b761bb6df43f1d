"""Attention over pages in plain torch, for the reference kernels (`reference`) and for devices.

Knows the arithmetic: rotation, rounding to what is stored, softmax over what a position sees. Does not know how to be
fast, nor promises that a row has the same bits in another batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, from_numpy

from shoal.kernels.arrays import Bytes, Floats
from shoal.kernels.attention_operands import KvPages, Scoring, Segments
from shoal.partition.memory_layout import PAGE_TOKENS, SCORES_TOGETHER, KvLayout

_DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16, "i8": torch.int8}

SMALLEST_CELL = 1e-30
"""A scaled type stores the numbers of a head as zeros if none of them reaches this magnitude."""


def attend(kv: KvPages, segments: Segments, q: Floats, k: Floats, v: Floats, scoring: Scoring) -> Floats:
    """As `ComputeHome.attention`."""
    rotation, scale, window, norms = scoring
    angles = Angles(rotation.dims, rotation.interleaved, from_numpy(rotation.cos), from_numpy(rotation.sin))
    weights = norms and HeadWeights(from_numpy(norms.q), from_numpy(norms.k), norms.eps)
    queries, keys, values = (from_numpy(np.ascontiguousarray(x)) for x in (q, k, v))
    pages = from_numpy(segments.pages)
    mixed = attend_tensors(
        PagesIn(kv.layout, from_numpy(kv.data)),
        segments.table.tolist(),
        pages,
        queries,
        keys,
        values,
        angles,
        weights,
        scale,
        window,
    )
    return mixed.numpy()


def attend_tensors(
    kv: PagesIn,
    table: Sequence[tuple[int, int, int, int]],
    pages: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    angles: Angles,
    norms: HeadWeights | None,
    scale: float,
    window: int | None,
) -> Tensor:
    """The same on tensors of any one device; (T, heads * head_dim). `table` and `pages`: those of `Segments`. Torch may
    have all scores of its operands at once, so of a long text it gets some rows after the other."""
    tokens, dim = len(q), kv.layout.head_dim
    queries, keys, values = (x.view(tokens, -1, dim) for x in (q, k, v))
    if norms is not None:
        queries = F.rms_norm(queries, (dim,), norms.q, norms.eps)
        keys = F.rms_norm(keys, (dim,), norms.k, norms.eps)
    queries, keys = rotate(angles, queries), rotate(angles, keys)
    out = torch.empty_like(queries)
    for first, rows, start, page in table:
        own = slice(first, first + rows)
        mine = pages[page:].long()
        _store(kv, mine, start, keys[own], values[own])
        _look_back(kv, mine, start, queries[own], scale, window, out[own])
    return out.view(tokens, -1)


def _look_back(
    kv: PagesIn,
    pages: Tensor,
    start: int,
    queries: Tensor,
    scale: float,
    window: int | None,
    out: Tensor,
) -> None:
    """One text's rows, from position `start` on. What is read of its pages goes before the next one's comes."""
    rows, heads = queries.shape[:2]
    keys, values = (_read(kv, pages, start + rows, which) for which in (0, 1))
    together = max(1, SCORES_TOGETHER // (heads * (start + rows)))
    for part in range(0, rows, together):
        until = min(part + together, rows)
        seen = start + until
        out[part:until] = _look(queries[part:until], keys[:, :seen], values[:, :seen], scale, window)


def _look(queries: Tensor, keys: Tensor, values: Tensor, scale: float, window: int | None) -> Tensor:
    """What the last positions find, (rows, heads, head_dim). `queries`: theirs, of that shape; `keys`, `values`: of all
    positions, (kv_heads, length, head_dim). Heads that share K and V look as so many rows do, so that nothing is there
    once for each of them."""
    rows, heads = queries.shape[:2]
    kv_heads, length = keys.shape[:2]
    group = heads // kv_heads
    mask = None  # the last position sees all
    if rows > 1 or window is not None:
        mask = torch.ones(rows, length, dtype=torch.bool, device=queries.device).tril_(length - rows)
        if window is not None:
            mask.triu_(length - rows - window + 1)
        mask = mask.repeat(group, 1)
    looking = queries.reshape(rows, kv_heads, group, -1).permute(1, 2, 0, 3).flatten(1, 2)
    found = F.scaled_dot_product_attention(looking[None], keys[None], values[None], mask, scale=scale)[0]
    return found.reshape(kv_heads, group, rows, -1).permute(2, 0, 1, 3).flatten(1, 2)


class PagesIn(NamedTuple):
    """`KvPages` whose `data` is a tensor."""

    layout: KvLayout
    data: Tensor


class Angles(NamedTuple):
    """A `Rotation` of tensors."""

    dims: int
    interleaved: bool
    cos: Tensor
    sin: Tensor


class HeadWeights(NamedTuple):
    """`HeadNorms` of tensors."""

    q: Tensor
    k: Tensor
    eps: float


def numbers_of(kv: KvPages | PagesIn) -> Tensor:
    """(pages, kv_heads, n): keys and values as they are stored, without scales; a view."""
    return _tensor(kv.data)[..., : kv.layout.scales_at].view(_DTYPES[kv.layout.kind.name])


def keys_of(kv: KvPages | PagesIn) -> Tensor:
    """(pages, kv_heads, head_dim, 64), a view."""
    return _part(kv, 0, kv.layout.values_at, kv.layout.head_dim)


def values_of(kv: KvPages | PagesIn) -> Tensor:
    """(pages, kv_heads, 64, wide), a view."""
    return _part(kv, kv.layout.values_at, kv.layout.scales_at, PAGE_TOKENS)


def scales_of(kv: KvPages | PagesIn) -> Tensor:
    """f32 (pages, kv_heads, 2, 64), of keys and of values; a view. For scaled types."""
    scales = _tensor(kv.data)[..., kv.layout.scales_at :].view(torch.float32)
    return scales.view(*kv.data.shape[:2], 2, -1)


def _tensor(data: Bytes | Tensor) -> Tensor:
    return data if isinstance(data, Tensor) else from_numpy(data)


def _part(kv: KvPages | PagesIn, start: int, end: int, rows: int) -> Tensor:
    part = _tensor(kv.data)[..., start:end].view(_DTYPES[kv.layout.kind.name])
    return part.view(*kv.data.shape[:2], rows, -1)


def rotate(angles: Angles, x: Tensor) -> Tensor:
    """x (T, heads, head_dim) with its first `dims` dimensions rotated: a pair (a, b) becomes (a cos - b sin, b cos + a
    sin). Source: RoFormer, arXiv 2104.09864.
    """
    axis = -1 if angles.interleaved else -2
    cos, sin = angles.cos[:, None], angles.sin[:, None]  # (T, 1, dims/2)
    turned, rest = x[..., : angles.dims], x[..., angles.dims :]
    half = angles.dims // 2
    a, b = turned.reshape(*x.shape[:2], *((half, 2) if angles.interleaved else (2, half))).unbind(axis)
    turned = torch.stack((a * cos - b * sin, b * cos + a * sin), axis).flatten(-2)
    return torch.cat((turned, rest), -1)


def _store(kv: PagesIn, pages: Tensor, start: int, k: Tensor, v: Tensor) -> None:
    """Stores k and v (T, kv_heads, head_dim) as positions from `start` on."""
    positions = torch.arange(start, start + len(k), device=k.device)
    size = keys_of(kv).shape[-1]
    page, column = pages[positions // size], positions % size
    for which, (numbers, x) in enumerate(
        ((keys_of(kv).transpose(2, 3), k), (values_of(kv)[..., : k.shape[-1]], v))
    ):
        if numbers.dtype == torch.int8:
            x, scales_of(kv)[page, :, which, column] = _to_bytes(x)
        numbers[page, :, column] = x.to(numbers.dtype)
    values_of(kv)[..., k.shape[-1] :][page, :, column] = 0


def _to_bytes(x: Tensor) -> tuple[Tensor, Tensor]:
    """x (…, head_dim) as whole numbers up to 127, and their scales (…), which are NaN where x is not finite."""
    most = x.abs().amax(-1, keepdim=True)
    zeros = ~(most >= SMALLEST_CELL)
    whole = torch.where(zeros, 0.0, x * (127.0 / most)).round()
    scale = torch.where(zeros, 0.0, most / 127.0) + (x * 0.0).sum(-1, keepdim=True)
    return whole.nan_to_num(0.0, 0.0, 0.0), scale[..., 0]


def _read(kv: PagesIn, pages: Tensor, length: int, which: int) -> Tensor:
    """K (0) or V (1) of positions [0, length), f32 (kv_heads, length, head_dim)."""
    used = pages[: -(-length // PAGE_TOKENS)]
    numbers = values_of(kv)[..., : kv.layout.head_dim] if which else keys_of(kv).transpose(2, 3)
    x = numbers[used].float()  # (pages, kv_heads, 64, head_dim)
    if numbers.dtype == torch.int8:
        x = x * scales_of(kv)[used, :, which, :, None]
    return x.transpose(0, 1).flatten(1, 2)[:, :length]
