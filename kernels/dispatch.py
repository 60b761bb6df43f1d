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

import numpy as np

from shoal.kernels.arrays import Bytes, Floats, Ids
from shoal.kernels.attention_operands import HeadNorms, KvPages, Rotation, Segments
from shoal.kernels.errors import KernelError, OperandError
from shoal.kernels.matrix import Activation, FeedForward, Linears, Matrix, Routes
from shoal.kernels.native_library import Native
from shoal.kernels.types import WeightType

_F32 = np.dtype(np.float32)


class Home(Protocol):
    """What every home computes; operands are checked before. Arrays may lie any way in memory."""

    @property
    def name(self) -> str: ...
    def interleave(self, kind: WeightType, stored: Bytes, into: Bytes) -> None: ...
    def linears(self, x: Floats, all: Linears, norm: Floats | None, eps: float) -> list[Floats]: ...
    def feed_forward(
        self, x: Floats, layer: FeedForward, activation: Activation, norm: Floats | None, eps: float
    ) -> Floats: ...
    def experts(
        self, x: Floats, all: Sequence[FeedForward], routes: Routes, activation: Activation, into: Floats
    ) -> None: ...
    def gather_rows(self, w: Matrix, ids: Ids) -> Floats: ...
    def dequantize(self, w: Matrix) -> Floats: ...
    def rms_norm(self, x: Floats, weight: Floats, eps: float) -> Floats: ...
    def attend(
        self,
        kv: KvPages,
        segments: Segments,
        q: Floats,
        k: Floats,
        v: Floats,
        rotation: Rotation,
        scale: float,
        window: int | None,
        norms: HeadNorms | None,
    ) -> Floats: ...
    def set_threads(self, n: int) -> None: ...


_home: Home | None = None


def choose(name: str = "") -> Home:
    """Computes from now on in the home of this name (avx512vnni, avx512, avx2, neon_dot, neon, scalar,
    reference), or in the best one for "". KernelError if a home asked for by name does not run here; where
    none was asked for and the native library is missing, one warning and the reference.
    """
    global _home
    if name == "reference":
        _home = _reference()
        return _home
    try:
        _home = Native(name)
    except KernelError as error:
        if name:
            raise
        warnings.warn(
            f"{error}. Computing with the slow reference kernels; for fast ones install a C++ compiler "
            "(GCC or Clang) and reinstall shoal",
            RuntimeWarning,
            stacklevel=3,
        )
        _home = _reference()
    return _home


def _reference() -> Home:
    from shoal.kernels import reference  # and with it torch: 125 MB that others do without

    return reference


def _first_choice() -> Home:
    return choose(os.environ.get("SHOAL_KERNELS", ""))


def current() -> Home:
    """Where kernels run."""
    return _home or _first_choice()


def home() -> str:
    """Where kernels run: avx512vnni, avx512, avx2, neon_dot, neon, scalar or reference; SHOAL_KERNELS names one."""
    return current().name


def set_threads(n: int) -> None:
    """Computes on `n` threads from now on."""
    if n < 1:
        raise OperandError(f"cannot compute on {n} threads: give 1 or more")
    current().set_threads(n)


def from_stored(
    kind: WeightType, rows: int, cols: int, stored: Bytes | bytes | memoryview, into: Bytes | None = None
) -> Matrix:
    """A matrix of rows as files hold them: their bytes as a contiguous uint8 array of any shape, or bytes or a
    memoryview. `into` is memory for it (uint8, `kind.matrix_bytes`), by default new; where nothing has to move,
    what is stored is wrapped. OperandError unless its size is exactly that of rows×cols.
    """
    data = stored if isinstance(stored, np.ndarray) else np.frombuffer(stored, np.uint8)
    row_bytes = kind.row_bytes(cols)
    if data.dtype != np.uint8 or not data.flags.c_contiguous or data.size != max(rows, 0) * row_bytes:
        raise OperandError(
            f"{rows}×{cols} {kind.name} takes {max(rows, 0) * row_bytes} contiguous uint8, "
            f"got {data.size} of {data.dtype}; the file may be cut short or mislabelled"
        )
    if into is None and not kind.quantised:
        return Matrix(kind, data.reshape(-1), rows, cols)
    matrix = Matrix(
        kind,
        np.empty(kind.matrix_bytes(rows, cols), np.uint8) if into is None else into,
        rows,
        cols,
    )
    interleave(kind, data.reshape(rows, row_bytes), matrix.data)
    return matrix


def interleave(kind: WeightType, stored: Bytes, into: Bytes) -> None:
    """Writes rows as files hold them, contiguous uint8 (n, row bytes), into the memory of a matrix or of whole bands
    of it, contiguous uint8 (bytes,); a last band that is not full is filled up with zeros.
    """
    rows, row_bytes = stored.shape
    cols = row_bytes // kind.block_bytes * kind.block_weights
    if into.shape != (kind.matrix_bytes(rows, cols),):
        raise OperandError(f"{rows}×{cols} {kind.name} do not fill memory of {into.size} bytes")
    if not stored.flags.c_contiguous or not into.flags.carray:
        raise OperandError(
            "rows as stored and a matrix must each lie together, and a matrix be writable while filled"
        )
    current().interleave(kind, stored, into)


def _check_input(x: Floats, all: Linears, norm: Floats | None) -> None:
    if x.dtype != _F32 or x.ndim != 2 or x.shape[1] != all.cols:
        raise OperandError(
            f"the input of a linear must be float32 of shape (T, {all.cols}), got {x.dtype} {x.shape}"
        )
    if norm is not None and (norm.dtype != _F32 or norm.shape != (all.cols,)):
        raise OperandError(f"a norm must be float32 of shape ({all.cols},), got {norm.dtype} {norm.shape}")


def linears(x: Floats, all: Linears, norm: Floats | None = None, eps: float = 0.0) -> list[Floats]:
    """x @ w.T + bias for every matrix: x float32 (T, cols), first normalised as `rms_norm` does if there is a norm
    (cols,); float32 (T, rows) each.

    Quantised weights meet x rounded to 16 bits (`reference.quantised_inputs`); a NaN or infinity in a row of x makes
    that row of the result NaN.
    """
    _check_input(x, all, norm)
    return current().linears(x, all, norm, eps)


def linear(x: Floats, w: Matrix, bias: Floats | None = None) -> Floats:
    """`linears` of one matrix, for a single call: nothing is prepared for a next one."""
    return linears(x, Linears((w,), (bias,)))[0]


def feed_forward(
    x: Floats, layer: FeedForward, activation: Activation, norm: Floats | None = None, eps: float = 0.0
) -> Floats:
    """down(act(gate(x)) * up(x)): x float32 (T, cols), first normalised as `rms_norm` does if there is a norm;
    float32 (T, rows of down).
    """
    _check_input(x, layer.enter, norm)
    return current().feed_forward(x, layer, activation, norm, eps)


def experts(
    x: Floats, all: Sequence[FeedForward], routes: Routes, activation: Activation, into: Floats
) -> None:
    """For every token of x float32 (T, cols) adds factor times `feed_forward` of the experts that take it to `into`,
    contiguous float32 (T, rows of down), one after the other: so experts may come in several calls. There is at least
    one expert, and all are of one shape.
    """
    _check_input(x, all[0].enter, None)
    if into.dtype != _F32 or into.shape != (len(x), all[0].shape[2]) or not into.flags.carray:
        raise OperandError(
            f"experts add to contiguous float32 of shape ({len(x)}, {all[0].shape[2]}), "
            f"got {into.dtype} {into.shape}"
        )
    if any(layer.shape != all[0].shape for layer in all):
        raise OperandError("experts of different shapes cannot be computed together")
    tokens, factors = routes.tokens, routes.factors
    if tokens.dtype != np.int64 or factors.dtype != _F32 or tokens.shape != factors.shape:
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
    current().experts(x, all, routes, activation, into)


def gather_rows(w: Matrix, ids: Ids) -> Floats:
    """Rows `ids` (int64 (T,)) of w as float32 (T, cols); OperandError if there is no such row."""
    if ids.dtype != np.int64 or ids.ndim != 1:
        raise OperandError(f"row ids must be int64 of shape (T,), got {ids.dtype} {ids.shape}")
    return current().gather_rows(w, ids)


def dequantize(w: Matrix) -> Floats:
    """All weights as float32 (rows, cols): a full-size copy, so only for small matrices and tests."""
    return current().dequantize(w)


def rms_norm(x: Floats, weight: Floats, eps: float) -> Floats:
    """x / rms(x) * weight row by row: x float32 (T, d), weight float32 (d,); float32 (T, d)."""
    if x.dtype != _F32 or x.ndim != 2 or weight.dtype != _F32 or weight.shape != x.shape[1:]:
        raise OperandError(
            f"a norm takes float32 (T, d) and (d,), got {x.dtype} {x.shape} and {weight.dtype} {weight.shape}"
        )
    return current().rms_norm(x, weight, eps)


def attention(
    kv: KvPages,
    segments: Segments,
    q: Floats,
    k: Floats,
    v: Floats,
    *,
    rotation: Rotation,
    scale: float,
    window: int | None = None,
    norms: HeadNorms | None = None,
) -> Floats:
    """Normalise and rotate q and k, store k and v in their pages, then attend: every row to its sequence up to itself.

    q f32 (T, heads * head_dim); k, v f32 (T, kv_heads * head_dim); head h uses K/V head h // (heads // kv_heads).
    With `window`, position p sees (p - window, p]. Returns f32 (T, heads * head_dim).

    Natively a row of the result is bitwise the same whatever the batch, however its sequence was cut into steps, on any
    number of threads and in any pages.
    """
    tokens, dim = segments.tokens, kv.layout.head_dim
    wide, narrow = (tokens, kv.heads * dim), (tokens, kv.kv_heads * dim)
    if q.shape != wide or k.shape != narrow or v.shape != narrow:
        raise OperandError(
            f"{tokens} rows of {kv.heads} heads and {kv.kv_heads} K/V heads of {dim} are q {wide} and k, v {narrow}, "
            f"got {q.shape}, {k.shape}, {v.shape}"
        )
    if q.dtype != _F32 or k.dtype != _F32 or v.dtype != _F32:
        raise OperandError(f"q, k and v must be float32, got {q.dtype}, {k.dtype}, {v.dtype}")
    if segments.most_page >= kv.pages:
        raise OperandError(f"there is no page {segments.most_page}: there are {kv.pages}")
    if rotation.dims > dim or len(rotation.cos) != tokens:
        raise OperandError(
            f"angles of {len(rotation.cos)} rows and {rotation.dims} dimensions for {tokens} rows of heads of {dim}"
        )
    if window is not None and window < 1:
        raise OperandError(f"window={window}: must be at least 1, or none")
    return current().attend(kv, segments, q, k, v, rotation, scale, window, norms)
