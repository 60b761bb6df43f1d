"""The one way to call a kernel: checks operands, then computes where it is fastest.

Knows which home was chosen when the room was first used, and what each call may be given. Callers
never learn the home from results: all homes agree with `reference` to float32 rounding. In a native
home, a row of a result is moreover bitwise the same whatever else is in the batch and however many
threads compute it. Arithmetic is not here.
"""

import os
import warnings
from typing import Protocol

import torch
from torch import Tensor

from shoal.kernels import reference
from shoal.kernels.errors import KernelError, OperandError
from shoal.kernels.library import Native
from shoal.kernels.matrix import Matrix

_F32 = torch.float32


class Home(Protocol):
    """What every home computes; operands are checked before."""

    def linear(self, x: Tensor, w: Matrix, bias: Tensor | None) -> Tensor: ...
    def gather_rows(self, w: Matrix, ids: Tensor) -> Tensor: ...
    def dequantize(self, w: Matrix) -> Tensor: ...
    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor: ...
    def swiglu(self, gate: Tensor, up: Tensor) -> Tensor: ...
    def geglu(self, gate: Tensor, up: Tensor) -> Tensor: ...


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


def _refuse_rows(name: str, x: Tensor, cols: int) -> OperandError:
    return OperandError(f"{name} must be float32 of shape (T, {cols}), got {x.dtype} {tuple(x.shape)}")


def linear(x: Tensor, w: Matrix, bias: Tensor | None = None) -> Tensor:
    """x @ w.T + bias: x float32 (T, cols), bias float32 (rows,); float32 (T, rows).

    Quantised weights meet x rounded to bytes (`reference.quantised_inputs`); a NaN or infinity in a row of x makes
    that row of the result NaN.
    """
    if x.dtype is not _F32 or x.dim() != 2 or x.shape[1] != w.cols:
        raise _refuse_rows("the input of a linear", x, w.cols)
    if bias is not None and (bias.dtype is not _F32 or bias.shape != (w.rows,)):
        raise OperandError(f"bias must be float32 of shape ({w.rows},), got {bias.dtype} {tuple(bias.shape)}")
    return (_home or _first_choice()).linear(x, w, bias)


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


def _check_gate(gate: Tensor, up: Tensor) -> None:
    if gate.dtype is not _F32 or up.dtype is not _F32 or gate.shape != up.shape:
        raise OperandError(
            f"gate and up must be float32 of one shape, got {gate.dtype} {tuple(gate.shape)} "
            f"and {up.dtype} {tuple(up.shape)}"
        )


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, elementwise; float32 of one shape."""
    _check_gate(gate, up)
    return (_home or _first_choice()).swiglu(gate, up)


def geglu(gate: Tensor, up: Tensor) -> Tensor:
    """gelu(gate) * up, elementwise, gelu in its tanh form; float32 of one shape."""
    _check_gate(gate, up)
    return (_home or _first_choice()).geglu(gate, up)
