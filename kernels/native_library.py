"""The native kernels, as Python calls them.

Knows where the shared library lies, its C signatures and how an array becomes a pointer. Operands
have been checked by `cpu_home`. Does not know how anything is computed (`native/`), nor what to do
when there is no library.
"""

import ctypes
from collections.abc import Sequence
from ctypes import addressof, byref, c_char, c_char_p, c_float, c_int, c_int32, c_int64, c_void_p
from pathlib import Path
from typing import Any

import numpy as np

from shoal.kernels.arrays import Array, Bytes, Floats, Ids
from shoal.kernels.attention_operands import HeadNorms, KvPages, Rotation, Segments
from shoal.kernels.errors import KernelError, OperandError
from shoal.kernels.matrix import Activation, FeedForward, Linears, Matrix, Routes
from shoal.kernels.types import WeightType

LIBRARY = Path(__file__).with_name("libshoal.so")
ABI_VERSION = 4

_STATUS = {
    1: "it has no kernel for this weight type",
    2: "no memory for scratch",
    3: "the id of a row is out of range",
}


class _Linear(ctypes.Structure):
    """`shoal::Linear` of native/home.h."""

    _fields_ = (
        ("type", c_int32),
        ("rows", c_int64),
        ("cols", c_int64),
        ("data", c_void_p),
        ("bias", c_void_p),
    )


_INPUTS = (c_void_p, c_int64, c_int64, c_void_p, c_float)  # x, tokens, cols, norm, eps
_ACTIVATION_IDS: dict[Activation, int] = {"silu": 0, "gelu_tanh": 1}
_KV_IDS = {"f32": 0, "f16": 1, "bf16": 2, "i8": 3}
_SIGNATURES = {
    "shoal_linears": (*_INPUTS, c_int, c_void_p, c_void_p),
    "shoal_gated": (*_INPUTS, c_int32, c_void_p, c_void_p),
    "shoal_experts": (c_void_p, c_int64, c_int64, c_int32, c_int64, *(c_void_p,) * 5),
    "shoal_gather_rows": (c_void_p, c_void_p, c_int64, c_void_p),
    "shoal_rms_norm": (c_void_p, c_void_p, c_float, c_int64, c_int64, c_void_p),
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


_served: "Native | None" = None  # whose home the library has


class Native:
    """The kernels of one home (avx512vnni, avx512, avx2, neon_dot, neon, scalar), or of the best for "".

    The library has one thread pool per process and computes in one home at a time. A Native switches it to its own home
    before it computes, so two of different names must not compute at the same time. Raises KernelError if the library
    is missing, does not fit this version, or cannot serve `name` here.
    """

    def __init__(self, name: str = "") -> None:
        try:
            lib = ctypes.CDLL(str(LIBRARY))
            version = lib.shoal_version()
        except (OSError, AttributeError) as error:
            raise KernelError(f"native kernels cannot be loaded: {error}") from error
        if version != ABI_VERSION:
            raise KernelError(f"native kernels are of version {version}, this is {ABI_VERSION}")
        lib.shoal_choose.argtypes, lib.shoal_choose.restype = (c_char_p,), c_char_p
        chosen = lib.shoal_choose(name.encode())
        if chosen is None:
            raise KernelError(f"native kernels for {name!r} do not run on this machine")
        self.name: str = chosen.decode()
        self._choose = lib.shoal_choose
        self._serve()
        for function, signature in _SIGNATURES.items():
            getattr(lib, function).argtypes = signature
            getattr(lib, function).restype = c_int
        lib.shoal_interleave.argtypes = (*(c_int64,) * 5, c_void_p, c_void_p)
        lib.shoal_interleave.restype = None
        self._interleave = lib.shoal_interleave
        self._linears = lib.shoal_linears
        self._gated = lib.shoal_gated
        self._experts = lib.shoal_experts
        self._gather_rows = lib.shoal_gather_rows
        self._rms_norm = lib.shoal_rms_norm
        self._attention = lib.shoal_attention
        self._set_threads = lib.shoal_set_threads

    def set_threads(self, n: int) -> None:
        self._set_threads(n)

    def _serve(self) -> None:
        """Makes the library compute in this home."""
        global _served
        self._choose(self.name.encode())
        _served = self

    def interleave(self, kind: WeightType, stored: Bytes, into: Bytes) -> None:
        if not kind.quantised:
            into[:] = stored.reshape(-1)
            return
        rows, row_bytes = stored.shape
        first, second = (*kind.halves, -1)[:2]
        self._interleave(
            rows,
            row_bytes // kind.block_bytes,
            kind.block_bytes,
            first,
            second,
            stored.ctypes.data,
            _at(into),
        )

    def linears(self, x: Floats, all: Linears, norm: Floats | None, eps: float) -> list[Floats]:
        if _served is not self:
            self._serve()
        tokens = len(x)
        structures, pointers = all.prepared.get(self) or _prepare(self, all, all)
        outputs = [np.empty((tokens, w.rows), np.float32) for w in all.matrices]
        if status := self._linears(
            _at(x),
            tokens,
            all.cols,
            norm if norm is None else _at(norm),
            eps,
            len(outputs),
            structures,
            pointers(*[addressof(_at(y)) for y in outputs]),
        ):
            raise _refusal(status, *all.matrices)
        return outputs

    def feed_forward(
        self, x: Floats, layer: FeedForward, activation: Activation, norm: Floats | None, eps: float
    ) -> Floats:
        if _served is not self:
            self._serve()
        tokens = len(x)
        structures, _ = layer.prepared.get(self) or _prepare(self, layer, layer.enter, layer.leave)
        y = np.empty((tokens, layer.leave.matrices[0].rows), np.float32)
        if status := self._gated(
            _at(x),
            tokens,
            layer.enter.cols,
            norm if norm is None else _at(norm),
            eps,
            _ACTIVATION_IDS[activation],
            structures,
            _at(y),
        ):
            raise _refusal(status, *layer.enter.matrices, *layer.leave.matrices)
        return y

    def experts(
        self, x: Floats, all: Sequence[FeedForward], routes: Routes, activation: Activation, into: Floats
    ) -> None:
        if _served is not self:
            self._serve()
        layers = [
            (layer.prepared.get(self) or _prepare(self, layer, layer.enter, layer.leave))[0] for layer in all
        ]
        if status := self._experts(
            _at(x),
            *x.shape,
            _ACTIVATION_IDS[activation],
            len(all),
            (c_void_p * len(all))(*map(addressof, layers)),
            (c_int64 * len(routes.starts))(*routes.starts),
            _at(routes.tokens),
            _at(routes.factors),
            _at(into),
        ):
            raise _refusal(status, *all[0].enter.matrices, *all[0].leave.matrices)

    def gather_rows(self, w: Matrix, ids: Ids) -> Floats:
        return self._gather(w, _at(ids), len(ids))

    def dequantize(self, w: Matrix) -> Floats:
        return self._gather(w, None, w.rows)

    def _gather(self, w: Matrix, ids: Any, count: int) -> Floats:
        if _served is not self:
            self._serve()
        out = np.empty((count, w.cols), np.float32)
        if status := self._gather_rows(byref(_structure(w, None)), ids, count, _at(out)):
            raise _refusal(status, w)
        return out

    def rms_norm(self, x: Floats, weight: Floats, eps: float) -> Floats:
        if _served is not self:
            self._serve()
        y = np.empty(x.shape, np.float32)
        self._rms_norm(_at(x), _at(weight), eps, *x.shape, _at(y))
        return y

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
    ) -> Floats:
        if _served is not self:
            self._serve()
        out = np.empty(q.shape, np.float32)
        if status := self._attention(
            kv.prepared.get(self) or _prepare_pages(self, kv),
            segments.prepared.get(self) or _prepare_segments(self, segments),
            rotation.prepared.get(self) or _prepare_rotation(self, rotation),
            _at(q),
            _at(k),
            _at(v),
            norms and _at(norms.q),
            norms and _at(norms.k),
            norms.eps if norms else 0.0,
            scale,
            window or 0,
            _at(out),
        ):
            raise KernelError(f"native attention refuses {segments.tokens} rows: {_STATUS[status]}")
        return out


_Memory: Any = c_char * 0  # stubs of Python 3.11 do not know that arrays are buffers


def _at(array: Array) -> Any:
    """Where an array lies, as ctypes takes it; of one that does not lie together, or is read-only, a copy. Three times
    as fast as `array.ctypes`."""
    return _Memory.from_buffer(array if array.flags.carray else array.copy())


def _prepare_pages(home: Native, kv: KvPages) -> object:
    prepared = kv.prepared[home] = byref(
        _KvPages(
            _KV_IDS[kv.layout.kind.name],
            kv.heads,
            kv.kv_heads,
            kv.layout.head_dim,
            kv.data.strides[0],
            kv.data.ctypes.data,
        )
    )
    return prepared


def _prepare_segments(home: Native, segments: Segments) -> object:
    prepared = segments.prepared[home] = byref(
        _Segments(
            len(segments.table), segments.tokens, segments.table.ctypes.data, segments.pages.ctypes.data
        )
    )
    return prepared


def _prepare_rotation(home: Native, rotation: Rotation) -> object:
    prepared = rotation.prepared[home] = byref(
        _Rotation(rotation.dims, rotation.interleaved, rotation.cos.ctypes.data, rotation.sin.ctypes.data)
    )
    return prepared


def _structure(w: Matrix, bias: Floats | None) -> _Linear:
    return _Linear(w.type.id, w.rows, w.cols, w.data.ctypes.data, bias if bias is None else bias.ctypes.data)


def _prepare(
    home: Native, owner: Linears | FeedForward, *parts: Linears
) -> tuple[ctypes.Array[_Linear], type[ctypes.Array[c_void_p]]]:
    """The structures of all matrices and the type of as many pointers, kept with their owner for this home."""
    pairs = [pair for part in parts for pair in zip(part.matrices, part.biases, strict=True)]
    structures = (_Linear * len(pairs))(*[_structure(w, bias) for w, bias in pairs])
    owner.prepared[home] = prepared = (structures, c_void_p * len(pairs))
    return prepared


def _refusal(status: int, *matrices: Matrix) -> KernelError:
    kind = OperandError if status == 3 else KernelError
    names = ", ".join(map(str, matrices))
    return kind(f"native kernels refuse {names}: {_STATUS.get(status, f'status {status}')}")
