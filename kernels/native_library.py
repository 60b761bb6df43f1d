"""The native kernels, as Python calls them.

Knows where the shared library lies, its C signatures and how an array becomes a pointer. Does not know how anything is
computed (`native/`), nor what to do when there is no library.
"""

import ctypes
from collections.abc import Callable, Sequence
from ctypes import addressof, byref, c_char, c_char_p, c_float, c_int, c_int32, c_int64, c_void_p
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from shoal.kernels.arrays import Array, Bytes, Floats, Ids
from shoal.kernels.attention_operands import KvPages, Rotation, Scoring, Segments
from shoal.kernels.cpu_home import (
    CpuHome,
    check_attention,
    check_experts,
    check_linears,
    check_norm,
    check_route,
)
from shoal.kernels.errors import KernelError, OperandError
from shoal.kernels.matrix import WIDE_INPUTS, Activation, FeedForward, Linears, Matrix, Routes
from shoal.kernels.routing import Routing
from shoal.kernels.types import WeightType

LIBRARY = Path(__file__).with_name("libshoal.so")
ABI_VERSION = 7

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
        ("input_bits", c_int32),
    )


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


_ACTIVATION_IDS: dict[Activation, int] = {"silu": 0, "gelu_tanh": 1}
_KV_IDS = {"f32": 0, "f16": 1, "bf16": 2, "i8": 3}
_INPUTS = (c_void_p, c_int64, c_int64, c_void_p, c_float)  # x, tokens, cols, norm, eps
_SIGNATURES: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "choose": (c_char_p, (c_char_p,)),
    "set_threads": (None, (c_int,)),
    "interleave": (None, (*(c_int64,) * 5, c_void_p, c_void_p)),
    "linears": (c_int, (*_INPUTS, c_int, c_void_p, c_void_p)),
    "gated": (c_int, (*_INPUTS, c_int32, c_void_p, c_void_p)),
    "experts": (c_int, (c_void_p, c_int64, c_int64, c_int32, c_int64, *(c_void_p,) * 5)),
    "scores": (c_int, (c_void_p, c_int64, c_int64, c_void_p, c_void_p)),
    "route": (c_int64, (c_void_p, *(c_int64,) * 3, c_int32, *(c_void_p,) * 4)),
    "gather_rows": (c_int, (c_void_p, c_void_p, c_int64, c_void_p)),
    "rms_norm": (c_int, (c_void_p, c_void_p, c_float, c_int64, c_int64, c_void_p)),
    "attention": (c_int, (*(c_void_p,) * 8, c_float, c_float, c_int64, c_void_p)),
}

_served: "Native | None" = None  # in whose home the library computes


class Native(CpuHome):
    """The kernels of one home (avx512vnni, avx512, avxvnni, avx2, neon_dot, neon, scalar), or of the best
    for "".

    The library has one thread pool per process and computes in one home at a time. A Native switches it to its own home
    before it computes, so two of different names must not compute at the same time. Raises KernelError if the library
    is missing, does not fit this version, or cannot serve `name` here.
    """

    def __init__(self, name: str = "") -> None:
        try:
            library = ctypes.CDLL(str(LIBRARY))
            version = library.shoal_version()
        except (OSError, AttributeError) as error:
            raise KernelError(f"native kernels cannot be loaded: {error}") from error
        if version != ABI_VERSION:
            raise KernelError(f"native kernels are of version {version}, this is {ABI_VERSION}")
        functions = {name: getattr(library, f"shoal_{name}") for name in _SIGNATURES}
        for function, (result, arguments) in zip(functions.values(), _SIGNATURES.values(), strict=True):
            function.restype, function.argtypes = result, arguments
        self._functions = SimpleNamespace(**functions)
        chosen = self._functions.choose(name.encode(errors="surrogateescape"))
        if chosen is None:
            raise KernelError(f"native kernels for {name!r:.40} do not run on this machine")
        self.name = chosen.decode()
        self._switched()

    def _switched(self) -> SimpleNamespace:
        """The library's functions, after it has been switched to this home."""
        global _served
        self._functions.choose(self.name.encode())
        _served = self
        return self._functions

    def set_threads(self, n: int) -> None:
        self._functions.set_threads(n)

    def interleave(self, kind: WeightType, stored: Bytes, into: Bytes) -> None:
        if not kind.quantised:
            into[:] = stored.reshape(-1)
            return
        rows, row_bytes = stored.shape
        blocks, halves = row_bytes // kind.block_bytes, (*kind.halves, -1)[:2]
        self._functions.interleave(rows, blocks, kind.block_bytes, *halves, stored.ctypes.data, _at(into))

    def linears(self, x: Floats, all: Linears, norm: Floats | None = None, eps: float = 0.0) -> list[Floats]:
        check_linears(x, all, norm)
        structures, pointers = all.prepared.get(self) or _prepare(self, all)
        outputs = [np.empty((len(x), w.rows), np.float32) for w in all.matrices]
        native = self._functions if _served is self else self._switched()
        if status := native.linears(
            _at(x),
            len(x),
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
        self, x: Floats, layer: FeedForward, norm: Floats | None = None, eps: float = 0.0
    ) -> Floats:
        check_linears(x, layer.enter, norm)
        structures = layer.prepared.get(self) or _prepare(self, layer)
        cols, _, rows, activation = layer.form
        y = np.empty((len(x), rows), np.float32)
        native = self._functions if _served is self else self._switched()
        if status := native.gated(
            _at(x),
            len(x),
            cols,
            norm if norm is None else _at(norm),
            eps,
            _ACTIVATION_IDS[activation],
            structures,
            _at(y),
        ):
            raise _refusal(status, *layer.enter.matrices, *layer.leave.matrices)
        return y

    def experts(self, x: Floats, all: Sequence[FeedForward], routes: Routes, into: Floats) -> None:
        check_experts(x, all, routes, into)
        layers = [layer.prepared.get(self) or _prepare(self, layer) for layer in all]
        native = self._functions if _served is self else self._switched()
        if status := native.experts(
            _at(x),
            *x.shape,
            _ACTIVATION_IDS[all[0].form.activation],
            len(all),
            (c_void_p * len(all))(*map(addressof, layers)),
            (c_int64 * len(routes.starts))(*routes.starts),
            _at(routes.tokens),
            _at(routes.factors),
            _at(into),
        ):
            raise _refusal(status, *all[0].enter.matrices, *all[0].leave.matrices)

    def scores(self, x: Floats, router: Linears) -> Floats:
        check_linears(x, router)
        structures, _ = router.prepared.get(self) or _prepare(self, router)
        (matrix,) = router.matrices
        y = np.empty((len(x), matrix.rows), np.float32)
        native = self._functions if _served is self else self._switched()
        if status := native.scores(_at(x), *x.shape, structures, _at(y)):
            raise _refusal(status, matrix)
        return y

    def route(self, scores: Floats, count: int, normalize: bool) -> Routing:
        check_route(scores, count)
        rows, experts = scores.shape
        used, starts = np.empty(experts, np.int64), np.empty(experts + 1, np.int64)
        tokens, factors = np.empty(rows * count, np.int64), np.empty(rows * count, np.float32)
        n = self._functions.route(
            _at(scores),
            rows,
            experts,
            count,
            normalize,
            _at(used),
            _at(starts),
            _at(tokens),
            _at(factors),
        )
        if n < 0:
            raise KernelError(f"native kernels cannot route {rows} rows to {experts} experts: {_STATUS[2]}")
        return Routing(used[:n].tolist(), Routes(tuple(starts[: n + 1].tolist()), tokens, factors))

    def gather_rows(self, w: Matrix, ids: Ids) -> Floats:
        return self._gather(w, _at(ids), len(ids))

    def dequantize(self, w: Matrix) -> Floats:
        return self._gather(w, None, w.rows)

    def _gather(self, w: Matrix, ids: Any, count: int) -> Floats:
        out = np.empty((count, w.cols), np.float32)
        native = self._functions if _served is self else self._switched()
        if status := native.gather_rows(byref(_structure(w, None, WIDE_INPUTS)), ids, count, _at(out)):
            raise _refusal(status, w)
        return out

    def rms_norm(self, x: Floats, weight: Floats, eps: float) -> Floats:
        check_norm(x, weight)
        y = np.empty(x.shape, np.float32)
        native = self._functions if _served is self else self._switched()
        native.rms_norm(_at(x), _at(weight), eps, *x.shape, _at(y))
        return y

    def attention(
        self, kv: KvPages, segments: Segments, q: Floats, k: Floats, v: Floats, scoring: Scoring
    ) -> Floats:
        check_attention(kv, segments, q, k, v, scoring)
        rotation, scale, window, norms = scoring
        out = np.empty(q.shape, np.float32)
        native = self._functions if _served is self else self._switched()
        if status := native.attention(
            kv.prepared.get(self) or _prepare(self, kv),
            segments.prepared.get(self) or _prepare(self, segments),
            rotation.prepared.get(self) or _prepare(self, rotation),
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
    """Where an array lies, as ctypes takes it; if the array is read-only or not contiguous, where a copy of it lies.
    Three times as fast as `array.ctypes`."""
    return _Memory.from_buffer(array if array.flags.carray else array.copy())


def _prepare(home: Native, operand: Any) -> Any:
    """What the library is told of an operand, worked out and kept with it."""
    prepared = operand.prepared[home] = _PREPARED[type(operand)](operand)
    return prepared


def _pages(kv: KvPages) -> Any:
    heads = kv.heads, kv.kv_heads, kv.layout.head_dim
    cell = _KV_IDS[kv.layout.kind.name]
    return byref(_KvPages(cell, *heads, kv.data.strides[0], kv.data.ctypes.data))


def _segments(segments: Segments) -> Any:
    table, pages = segments.table, segments.pages
    return byref(_Segments(len(table), segments.tokens, table.ctypes.data, pages.ctypes.data))


def _rotation(rotation: Rotation) -> Any:
    cos, sin = rotation.cos.ctypes.data, rotation.sin.ctypes.data
    return byref(_Rotation(rotation.dims, rotation.interleaved, cos, sin))


def _structure(w: Matrix, bias: Floats | None, input_bits: int) -> _Linear:
    at = bias if bias is None else bias.ctypes.data
    return _Linear(w.type.id, w.rows, w.cols, w.data.ctypes.data, at, input_bits)


def _structures(*parts: Linears) -> ctypes.Array[_Linear]:
    all = [
        _structure(w, bias, bits)
        for part in parts
        for w, bias, bits in zip(part.matrices, part.biases, part.input_bits, strict=True)
    ]
    return (_Linear * len(all))(*all)


_PREPARED: dict[type, Callable[[Any], Any]] = {
    KvPages: _pages,
    Segments: _segments,
    Rotation: _rotation,
    Linears: lambda linears: (_structures(linears), c_void_p * len(linears.matrices)),
    FeedForward: lambda layer: _structures(layer.enter, layer.leave),
}


def _refusal(status: int, *matrices: Matrix) -> KernelError:
    kind = OperandError if status == 3 else KernelError
    names = ", ".join(map(str, matrices))
    return kind(f"native kernels refuse {names}: {_STATUS.get(status, f'status {status}')}")
