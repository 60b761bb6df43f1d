"""What a device computes in torch. Works on any device of torch.

Weights stay in their stored types and are decoded a tile at a time, with what the reference kernels know of the types.
Inputs of quantised weights are not rounded, and sums are made as torch likes: results agree with the CPU's to rounding,
and bits of a row may depend on the rows beside it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from shoal.kernels.arrays import Bytes
from shoal.kernels.attention_operands import KvPages, Scoring, Segments
from shoal.kernels.attention_reference import Angles, HeadWeights, PagesIn, attend_tensors
from shoal.kernels.band_layout import from_bands, to_bands
from shoal.kernels.matrix import FeedForward, Linears, Matrix, Routes
from shoal.kernels.reference import ACTIVATIONS, decoded
from shoal.kernels.types import WeightType
from shoal.partition.memory_layout import BAND_ROWS

TILE_NUMBERS = 4 << 20  # of decoded weights that exist at once
TILE_COPIES = 6  # of a tile, in f32, that decoding makes on its way


class InBands(NamedTuple):
    """Quantised weights whose rows lie as the CPU wants them."""

    bytes: Tensor


class TorchKernels:
    """Is an OnDevice. Insides of handles are tensors."""

    name = "torch"
    scratch_bytes, gathers = 4 * TILE_NUMBERS * TILE_COPIES, True

    def laid_out(self, w: Matrix) -> Bytes:
        bands = w.data.reshape(-1, w.type.band_rows * w.type.row_bytes(w.cols))
        rows: Bytes = from_bands(w.type, bands).reshape(-1)
        return rows

    def put_back(self, laid_out: Bytes, w: Matrix) -> None:
        row_bytes = w.type.row_bytes(w.cols)
        w.data[...] = to_bands(w.type, laid_out.reshape(-1, row_bytes)).reshape(-1)

    def as_they_lie(self, bytes: Tensor, w: Matrix) -> Tensor | InBands:
        return InBands(bytes) if w.type.quantised else bytes

    def lying(self, w: Matrix) -> Tensor | InBands:
        """The bytes of a matrix that is there, and whether they lie in bands."""
        data: Tensor | InBands = _inside(w.data)
        return data

    def clear(self, x: Tensor) -> None:
        x.zero_()

    def copy(self, source: Tensor, target: Tensor) -> None:
        target.copy_(source)

    def part(self, x: Tensor, index: Any) -> Tensor:
        return x[index]

    def picked(self, x: Tensor, ids: Tensor) -> Tensor:
        return x[ids]

    def joined(self, all: Sequence[Tensor]) -> Tensor:
        return torch.cat([x.reshape(-1) for x in all])

    def zeros_like(self, x: Tensor) -> Tensor:
        return torch.zeros_like(x)

    def add(self, x: Tensor, y: Tensor) -> None:
        x.add_(y)

    def scale(self, x: Tensor, factor: float) -> Tensor:
        return x * factor

    def clip(self, x: Tensor, limit: float) -> None:
        x.clamp_(-limit, limit)

    def gate(self, x: Tensor, gates: Tensor) -> None:
        x.mul_(gates.sigmoid())

    def pad(self, x: Tensor, margins: tuple[int, int]) -> Tensor:
        return F.pad(x, margins)

    def linears(self, x: Tensor, all: Linears, norm: Tensor | None, eps: float) -> list[Tensor]:
        if norm is not None:
            x = self.rms_norm(x, norm, eps)
        each = zip(all.matrices, all.biases, strict=True)
        return [_linear(x, w, self.lying(w), bias) for w, bias in each]

    def feed_forward(self, x: Tensor, layer: FeedForward, norm: Tensor | None, eps: float) -> Tensor:
        gate, up = self.linears(x, layer.enter, norm, eps)
        return self.linears(ACTIVATIONS[layer.form.activation](gate) * up, layer.leave, None, 0.0)[0]

    def experts(self, x: Tensor, all: Sequence[FeedForward], routes: Routes, into: Tensor) -> None:
        tokens, factors = _inside(routes.tokens), _inside(routes.factors)
        for layer, (start, stop) in zip(all, pairwise(routes.starts), strict=True):
            rows = tokens[start:stop]
            into.index_add_(0, rows, self.feed_forward(x[rows], layer, None, 0.0) * factors[start:stop, None])

    def scores(self, x: Tensor, router: Linears) -> Tensor:
        return self.linears(x, router, None, 0.0)[0]

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return F.rms_norm(x, weight.shape, weight, eps)

    def rms_norm_heads(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return self.rms_norm(x.view(-1, len(weight)), weight, eps).view(x.shape)

    def squares(self, parts: Sequence[Tensor], counted: Sequence[bool]) -> Tensor:
        sums = [
            x.square().sum(1) if counts else x.new_zeros(len(x))
            for x, counts in zip(parts, counted, strict=True)
        ]
        return torch.stack(sums, 1)

    def normed_by(
        self, x: Tensor, weight: Tensor, squares: Tensor, column: int, numbers: int, eps: float
    ) -> Tensor:
        return x * torch.rsqrt(squares[:, column : column + 1] / numbers + eps) * weight

    def attention(
        self,
        kv: KvPages,
        segments: Segments,
        places: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        scoring: Scoring,
    ) -> Tensor:
        rotation, scale, window, norms = scoring
        angles = Angles(rotation.dims, rotation.interleaved, _inside(rotation.cos), _inside(rotation.sin))
        weights = norms and HeadWeights(norms.q, norms.k, norms.eps)  # type: ignore[arg-type]  # tensors here
        there, table = PagesIn(kv.layout, _inside(kv.data)), segments.table.tolist()
        return attend_tensors(there, table, places, q, k, v, angles, weights, scale, window)


def _inside(handle: Any) -> Any:
    return handle.inside


def _linear(x: Tensor, w: Matrix, data: Tensor | InBands, bias: Any) -> Tensor:
    """x (T, cols) @ w.T + bias (rows,), (T, rows)."""
    out = x.new_empty(len(x), w.rows)
    for row, tile in _tiles(w, data):
        out[:, row : row + len(tile)] = x @ tile.T
    return out if bias is None else out.add_(_inside(bias))


def _tiles(w: Matrix, data: Tensor | InBands) -> Iterator[tuple[int, Tensor]]:
    """(first row, f32 rows) of the weights, one part after the other."""
    banded, row_bytes = isinstance(data, InBands), w.type.row_bytes(w.cols)
    rows = (data.bytes if isinstance(data, InBands) else data).view(-1, row_bytes)
    step = max(BAND_ROWS, TILE_NUMBERS // w.cols // BAND_ROWS * BAND_ROWS)
    for start in range(0, w.rows, step):
        tile = rows[start : min(start + step, len(rows))]
        tile = _out_of_bands(w.type, tile) if banded else tile
        yield start, decoded(w.type, tile[: w.rows - start])


def _out_of_bands(kind: WeightType, bands: Tensor) -> Tensor:
    """The rows (16 * n, row bytes) of n bands that lie one after the other in as many bytes."""
    columns = bands.view(-1, bands.shape[1] // kind.block_bytes, BAND_ROWS * kind.block_bytes)
    blocks = columns[..., _order_in_band(kind, bands.device)]  # of rows, by band and column
    return blocks.view(*columns.shape[:2], BAND_ROWS, -1).transpose(1, 2).reshape(bands.shape)


@cache
def _order_in_band(kind: WeightType, device: torch.device) -> Tensor:
    """Where in a band of one block's width the bytes of its rows are, one row after the other. Drivers take so few (27
    KB at most) at once, so nobody waits for what the device has to do before."""
    places = np.arange(BAND_ROWS * kind.block_bytes)
    low, high = (
        from_bands(kind, it.astype(np.uint8)[None]).reshape(-1) for it in (places & 255, places >> 8)
    )
    return torch.from_numpy(low + 256 * high.astype(np.int64)).to(device, non_blocking=True)
