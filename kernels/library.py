"""The native kernels, as Python calls them.

Knows where the shared library lies, its C signatures and how a tensor becomes a pointer. Operands
have been checked by `dispatch`. Does not know how anything is computed (`native/`), nor what to do
when there is no library.
"""

import ctypes
from ctypes import byref, c_char_p, c_float, c_int, c_int32, c_int64, c_void_p
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from shoal.kernels.errors import KernelError, OperandError
from shoal.kernels.matrix import Matrix

if TYPE_CHECKING:
    from shoal.kernels.attention import HeadNorms, KvPages, Rotation, Segments

LIBRARY = Path(__file__).with_name("libshoal.so")
VERSION = 2

_STATUS = {
    1: "it has no kernel for this weight type",
    2: "no memory for scratch",
    3: "a row id is out of range",
}
_WEIGHTS = (c_int32, c_int64, c_int64, c_int64, c_void_p)
_SIGNATURES = {
    "shoal_linear": (*_WEIGHTS, c_void_p, c_int64, c_void_p, c_void_p),
    "shoal_gather_rows": (*_WEIGHTS, c_void_p, c_int64, c_void_p),
    "shoal_rms_norm": (c_void_p, c_void_p, c_float, c_int64, c_int64, c_void_p),
    "shoal_swiglu": (c_void_p, c_void_p, c_int64, c_void_p),
    "shoal_geglu": (c_void_p, c_void_p, c_int64, c_void_p),
    "shoal_attention": (*(c_void_p,) * 8, c_float, c_float, c_int64, c_void_p),
}


class _KvPages(ctypes.Structure):
    """`shoal::KvPages` of native/home.h."""

    _fields_ = (
        ("cell", c_int32),
        ("heads", c_int32),
        ("kv_heads", c_int32),
        ("head_dim", c_int32),
        ("page_bytes", c_int64),
        ("data", c_void_p),
    )


class _Segments(ctypes.Structure):
    """`shoal::Segments` of native/home.h."""

    _fields_ = (("count", c_int64), ("tokens", c_int64), ("all", c_void_p), ("pages", c_void_p))


class _Rotation(ctypes.Structure):
    """`shoal::Rotation` of native/home.h."""

    _fields_ = (("dims", c_int64), ("interleaved", c_int32), ("cos", c_void_p), ("sin", c_void_p))


class Native:
    """The kernels of one home (avx512vnni, avx512, avx2, neon_dot, neon, scalar), or of the best for "".

    The library has one home and one thread pool per process: the latest Native chosen rules. Raises
    KernelError if the library is missing, does not fit this version, or cannot serve `name` here.
    """

    def __init__(self, name: str = "") -> None:
        try:
            lib = ctypes.CDLL(str(LIBRARY))
            version = lib.shoal_version()
        except (OSError, AttributeError) as error:
            raise KernelError(f"native kernels cannot be loaded: {error}") from error
        if version != VERSION:
            raise KernelError(f"native kernels are of version {version}, this is {VERSION}")
        lib.shoal_choose.argtypes, lib.shoal_choose.restype = (c_char_p,), c_char_p
        chosen = lib.shoal_choose(name.encode())
        if chosen is None:
            raise KernelError(f"native kernels for {name!r} do not run on this machine")
        self.name: str = chosen.decode()
        for function, signature in _SIGNATURES.items():
            getattr(lib, function).argtypes = signature
            getattr(lib, function).restype = c_int
        self._linear = lib.shoal_linear
        self._gather_rows = lib.shoal_gather_rows
        self._rms_norm = lib.shoal_rms_norm
        self._swiglu = lib.shoal_swiglu
        self._geglu = lib.shoal_geglu
        self._attention = lib.shoal_attention
        self._set_threads = lib.shoal_set_threads

    def set_threads(self, n: int) -> None:
        self._set_threads(n)

    def linear(self, x: Tensor, w: Matrix, bias: Tensor | None) -> Tensor:
        x = x.contiguous()
        tokens = x.size(0)
        y = x.new_empty(tokens, w.rows)
        bias_pointer = None
        if bias is not None:
            bias = bias.contiguous()
            bias_pointer = bias.data_ptr()
        if status := self._linear(
            w.type.id,
            w.rows,
            w.cols,
            w.row_bytes,
            w.data.data_ptr(),
            x.data_ptr(),
            tokens,
            bias_pointer,
            y.data_ptr(),
        ):
            raise _refusal(status, w)
        return y

    def gather_rows(self, w: Matrix, ids: Tensor) -> Tensor:
        ids = ids.contiguous()
        return self._gather(w, ids.data_ptr(), ids.shape[0])

    def dequantize(self, w: Matrix) -> Tensor:
        return self._gather(w, None, w.rows)

    def _gather(self, w: Matrix, ids_pointer: int | None, count: int) -> Tensor:
        out = torch.empty((count, w.cols), dtype=torch.float32)
        if status := self._gather_rows(
            w.type.id, w.rows, w.cols, w.row_bytes, w.data.data_ptr(), ids_pointer, count, out.data_ptr()
        ):
            raise _refusal(status, w)
        return out

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        x, weight = x.contiguous(), weight.contiguous()
        y = torch.empty_like(x)
        rows, cols = x.shape
        self._rms_norm(x.data_ptr(), weight.data_ptr(), eps, rows, cols, y.data_ptr())
        return y

    def swiglu(self, gate: Tensor, up: Tensor) -> Tensor:
        gate, up = gate.contiguous(), up.contiguous()
        y = torch.empty_like(gate)
        self._swiglu(gate.data_ptr(), up.data_ptr(), y.numel(), y.data_ptr())
        return y

    def geglu(self, gate: Tensor, up: Tensor) -> Tensor:
        gate, up = gate.contiguous(), up.contiguous()
        y = torch.empty_like(gate)
        self._geglu(gate.data_ptr(), up.data_ptr(), y.numel(), y.data_ptr())
        return y

    def attend(
        self,
        kv: "KvPages",
        segments: "Segments",
        q: Tensor,
        k: Tensor,
        v: Tensor,
        rotation: "Rotation",
        scale: float,
        window: int | None,
        norms: "HeadNorms | None",
    ) -> Tensor:
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
        out = torch.empty_like(q)
        if status := self._attention(
            kv.prepared or _prepare_pages(kv),
            segments.prepared or _prepare_segments(segments),
            rotation.prepared or _prepare_rotation(rotation),
            q.data_ptr(),
            k.data_ptr(),
            v.data_ptr(),
            norms and norms.q.data_ptr(),
            norms and norms.k.data_ptr(),
            norms.eps if norms else 0.0,
            scale,
            window or 0,
            out.data_ptr(),
        ):
            raise KernelError(f"native attention refuses {segments.tokens} rows: {_STATUS[status]}")
        return out


def _prepare_pages(kv: "KvPages") -> object:
    kv.prepared = byref(
        _KvPages(
            kv.layout.kind.id,
            kv.heads,
            kv.kv_heads,
            kv.layout.head_dim,
            kv.data.stride(0),
            kv.data.data_ptr(),
        )
    )
    return kv.prepared


def _prepare_segments(segments: "Segments") -> object:
    segments.prepared = byref(
        _Segments(len(segments.table), segments.tokens, segments.table.data_ptr(), segments.pages.data_ptr())
    )
    return segments.prepared


def _prepare_rotation(rotation: "Rotation") -> object:
    rotation.prepared = byref(
        _Rotation(rotation.dims, rotation.interleaved, rotation.cos.data_ptr(), rotation.sin.data_ptr())
    )
    return rotation.prepared


def _refusal(status: int, w: Matrix) -> KernelError:
    kind = OperandError if status == 3 else KernelError
    return kind(f"native kernels refuse {w}: {_STATUS.get(status, f'status {status}')}")
