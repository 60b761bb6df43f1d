"""The one way to call a kernel: checks operands, then computes where it is fastest.

Knows which home was chosen when the room was first used, and what each call may be given. Callers
never learn the home from results: all homes agree with `reference` to float32 rounding. In a native
home, a row of a result is moreover bitwise the same whatever else is in the batch and however many
threads compute it. Arithmetic is not here.
"""

import os
import warnings
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from shoal.kernels import reference
from shoal.kernels.errors import KernelError, OperandError
from shoal.kernels.library import Native
from shoal.kernels.matrix import Activation, FeedForward, Linears, Matrix, Routes
from shoal.kernels.types import WeightType

_F32 = torch.float32

Bytes = bytes | bytearray | memoryview


class Home(Protocol):
    """What every home computes; operands are checked before."""

    def interleave(self, kind: WeightType, stored: Tensor, into: Tensor) -> None: ...
    def linears(self, x: Tensor, all: Linears, norm: Tensor | None, eps: float) -> list[Tensor]: ...
    def feed_forward(
        self, x: Tensor, layer: FeedForward, activation: Activation, norm: Tensor | None, eps: float
    ) -> Tensor: ...
    def experts(
        self, x: Tensor, all: Sequence[FeedForward], routes: Routes, activation: Activation, into: Tensor
    ) -> None: ...
    def gather_rows(self, w: Matrix, ids: Tensor) -> Tensor: ...
    def dequantize(self, w: Matrix) -> Tensor: ...
    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor: ...


_home: Home | None = None


def choose(name: str = "") -> Home:
    """Computes from now on in the home of this name (avx512vnni, avx512, avx2, neon_dot, neon, scalar,
    reference), or in the best one for "". KernelError if a home asked for by name does not run here; where
    none was asked for and the native library is missing, one warning and the reference.
    """
    global _home
    if name == "reference":
        _home = reference
        return reference
    try:
        native: Home = Native(name)
    except KernelError as error:
        if name:
            raise
        warnings.warn(
            f"{error}. Computing with the slow reference kernels; for fast ones install a C++ compiler "
            "(GCC or Clang) and reinstall shoal",
            RuntimeWarning,
            stacklevel=3,
        )
        native = reference
    _home = native
    return native


def _first_choice() -> Home:
    return choose(os.environ.get("SHOAL_KERNELS", ""))


def native() -> Native | None:
    """The native home, if that is where kernels run."""
    current = _home or _first_choice()
    return current if isinstance(current, Native) else None


def home() -> str:
    """Where kernels run: avx512vnni, avx512, avx2, neon_dot, neon, scalar or reference; SHOAL_KERNELS names one."""
    current = native()
    return current.name if current else "reference"


def set_threads(n: int) -> None:
    """Computes on `n` threads from now on.

    In a native home torch's own operators stay on one thread: what is left to them is small, and a second pool
    would fight for the cores (on a busy machine its barriers cost more than the work, see docs/LOG.md).
    """
    if n < 1:
        raise OperandError(f"cannot compute on {n} threads: give 1 or more")
    if current := native():
        current.set_threads(n)
        torch.set_num_threads(1)
    else:
        torch.set_num_threads(n)


def from_stored(
    kind: WeightType, rows: int, cols: int, stored: Tensor | Bytes, into: Tensor | None = None
) -> Matrix:
    """A matrix of rows as files hold them: their bytes as a contiguous uint8 tensor of any shape, or bytes or a
    memoryview. `into` is memory for it (uint8, `kind.matrix_bytes`), by default new; where nothing has to move,
    what is stored is wrapped. OperandError unless its size is exactly that of rows×cols.
    """
    data = stored if isinstance(stored, Tensor) else _wrapped(stored)
    row_bytes = kind.row_bytes(cols)
    if data.dtype != torch.uint8 or not data.is_contiguous() or data.numel() != max(rows, 0) * row_bytes:
        raise OperandError(
            f"{rows}×{cols} {kind.name} takes {max(rows, 0) * row_bytes} contiguous uint8, "
            f"got {data.numel()} of {data.dtype}; the file may be cut short or mislabelled"
        )
    if into is None and not kind.quantised:
        return Matrix(kind, data.view(-1), rows, cols)
    matrix = Matrix(
        kind,
        torch.empty(kind.matrix_bytes(rows, cols), dtype=torch.uint8) if into is None else into,
        rows,
        cols,
    )
    interleave(kind, data.view(rows, row_bytes), matrix.data)
    return matrix


def _wrapped(stored: Bytes) -> Tensor:
    with warnings.catch_warnings():  # torch warns of read-only memory; nothing here writes to it
        warnings.simplefilter("ignore", UserWarning)
        return (
            torch.frombuffer(stored, dtype=torch.uint8) if len(stored) else torch.empty(0, dtype=torch.uint8)
        )


def interleave(kind: WeightType, stored: Tensor, into: Tensor) -> None:
    """Writes rows as files hold them, contiguous uint8 (n, row bytes), into the memory of a matrix or of whole bands
    of it, contiguous uint8 (bytes,); a last band that is not full is filled up with zeros.
    """
    rows, row_bytes = stored.shape
    cols = row_bytes // kind.block_bytes * kind.block_weights
    if into.shape != (kind.matrix_bytes(rows, cols),):
        raise OperandError(f"{rows}×{cols} {kind.name} do not fill memory of {into.numel()} bytes")
    (_home or _first_choice()).interleave(kind, stored, into)


def _check_input(x: Tensor, all: Linears, norm: Tensor | None) -> None:
    if x.dtype is not _F32 or x.dim() != 2 or x.size(1) != all.cols:
        raise OperandError(
            f"the input of a linear must be float32 of shape (T, {all.cols}), got {x.dtype} {tuple(x.shape)}"
        )
    if norm is not None and (norm.dtype is not _F32 or norm.dim() != 1 or norm.size(0) != all.cols):
        raise OperandError(
            f"a norm must be float32 of shape ({all.cols},), got {norm.dtype} {tuple(norm.shape)}"
        )


def linears(x: Tensor, all: Linears, norm: Tensor | None = None, eps: float = 0.0) -> list[Tensor]:
    """x @ w.T + bias for every matrix: x float32 (T, cols), first normalised as `rms_norm` does if there is a norm
    (cols,); float32 (T, rows) each.

    Quantised weights meet x rounded to 16 bits (`reference.quantised_inputs`); a NaN or infinity in a row of x makes
    that row of the result NaN.
    """
    _check_input(x, all, norm)
    return (_home or _first_choice()).linears(x, all, norm, eps)


def linear(x: Tensor, w: Matrix, bias: Tensor | None = None) -> Tensor:
    """`linears` of one matrix that is not met again."""
    return linears(x, Linears((w,), (bias,)))[0]


def feed_forward(
    x: Tensor, layer: FeedForward, activation: Activation, norm: Tensor | None = None, eps: float = 0.0
) -> Tensor:
    """down(act(gate(x)) * up(x)): x float32 (T, cols), first normalised as `rms_norm` does if there is a norm;
    float32 (T, rows of down).
    """
    _check_input(x, layer.enter, norm)
    return (_home or _first_choice()).feed_forward(x, layer, activation, norm, eps)


def experts(
    x: Tensor, all: Sequence[FeedForward], routes: Routes, activation: Activation, into: Tensor
) -> None:
    """For every token of x float32 (T, cols) adds factor times `feed_forward` of the experts that take it to `into`,
    contiguous float32 (T, rows of down), one after the other: so experts may come in several calls. There is at least
    one expert, and all are of one shape.
    """
    _check_input(x, all[0].enter, None)
    if into.dtype is not _F32 or into.shape != (x.size(0), all[0].shape[2]) or not into.is_contiguous():
        raise OperandError(
            f"experts add to contiguous float32 of shape ({x.size(0)}, {all[0].shape[2]}), "
            f"got {into.dtype} {tuple(into.shape)}"
        )
    if any(layer.shape != all[0].shape for layer in all):
        raise OperandError("experts of different shapes cannot be computed together")
    tokens, factors = routes.tokens, routes.factors
    if tokens.dtype is not torch.int64 or factors.dtype is not _F32 or tokens.shape != factors.shape:
        raise OperandError(
            f"routes need int64 tokens and float32 factors, got {tokens.dtype} and {factors.dtype}"
        )
    starts = routes.starts
    if (
        len(starts) != len(all) + 1
        or starts[0]
        or starts[-1] != len(tokens)
        or sorted(starts) != list(starts)
    ):
        raise OperandError(
            f"routes that start at {starts} do not share {len(tokens)} out among {len(all)} experts"
        )
    (_home or _first_choice()).experts(x, all, routes, activation, into)


def gather_rows(w: Matrix, ids: Tensor) -> Tensor:
    """Rows `ids` (int64 (T,)) of w as float32 (T, cols); OperandError if there is no such row."""
    if ids.dtype is not torch.int64 or ids.dim() != 1:
        raise OperandError(f"row ids must be int64 of shape (T,), got {ids.dtype} {tuple(ids.shape)}")
    return (_home or _first_choice()).gather_rows(w, ids)


def dequantize(w: Matrix) -> Tensor:
    """All weights as float32 (rows, cols): a full-size copy, so only for small matrices and tests."""
    return (_home or _first_choice()).dequantize(w)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / rms(x) * weight row by row: x float32 (T, d), weight float32 (d,); float32 (T, d)."""
    if x.dtype is not _F32 or x.dim() != 2 or weight.dtype is not _F32 or weight.shape != x.shape[1:]:
        raise OperandError(
            f"a norm takes float32 (T, d) and (d,), got {x.dtype} {tuple(x.shape)} "
            f"and {weight.dtype} {tuple(weight.shape)}"
        )
    return (_home or _first_choice()).rms_norm(x, weight, eps)
