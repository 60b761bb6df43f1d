"""Weight matrices in their stored type, and the groups of them that one call computes.

Knows how many bytes a matrix must have. Never converts, copies or moves the bytes, and does not know what they mean:
`bands` knows where rows lie, `reference` and `native` what their bytes stand for.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np

from shoal.kernels.arrays import Array, Bytes, Floats, Ids
from shoal.kernels.errors import OperandError
from shoal.kernels.types import F16, F32, WeightType

Activation = Literal["silu", "gelu_tanh"]

InputBits = Literal[16, 8]
WIDE_INPUTS: InputBits = 16
NARROW_INPUTS: InputBits = 8
"""Bits to which inputs of quantised weights are rounded (`reference.quantised_inputs`)."""

TYPE_OF_DTYPE = {np.dtype(np.float32): F32, np.dtype(np.float16): F16}


@dataclass(frozen=True, eq=False, slots=True, weakref_slot=True)
class Matrix:
    """rows×cols weights stored as `type`. `data` is contiguous uint8 (bytes,): the rows of a float type lie one after
    the other, those of a quantised type in bands (`bands`; made by `stored_rows.from_stored`).

    All types, the float ones too, are held as bytes, which need no alignment. Matrices compare by identity. In the
    memory of another home than the CPU, `data` is that home's handle of such an array.
    """

    type: WeightType
    data: Bytes
    rows: int
    cols: int

    def __post_init__(self) -> None:
        if self.rows < 0:
            raise OperandError(f"a matrix of {self.rows} rows cannot be: rows must be 0 or more")
        expected = (self.type.matrix_bytes(self.rows, self.cols),)
        if self.data.dtype != np.uint8 or self.data.shape != expected or not self.data.flags.c_contiguous:
            raise OperandError(
                f"{self.rows}×{self.cols} {self.type.name} needs contiguous uint8 of shape {expected}, "
                f"got {self.data.dtype} {self.data.shape} with strides {self.data.strides}"
            )

    @classmethod
    def of(cls, weights: Array) -> "Matrix":
        """Wraps a 2-D float32 or float16 array, without a copy if it is contiguous."""
        kind = TYPE_OF_DTYPE.get(weights.dtype)
        if kind is None or weights.ndim != 2:
            raise OperandError(
                f"a matrix is made from a 2-D array of float32 or float16, got {weights.ndim}-D {weights.dtype}"
            )
        rows, cols = weights.shape
        return cls(kind, np.ascontiguousarray(weights).reshape(-1).view(np.uint8), rows, cols)

    @property
    def nbytes(self) -> int:
        return self.data.nbytes

    def __repr__(self) -> str:
        return f"Matrix({self.rows}×{self.cols} {self.type.name}, {self.nbytes} bytes)"


class Linears:
    """Matrices that one call multiplies by the same input, each with its bias, float32 (rows,), or None.

    `input_bits`: to how many the input of quantised weights is rounded, for each or for all alike; kept for each.
    `prepared` holds what each home works out about them when it first uses them.
    """

    __slots__ = ("biases", "cols", "input_bits", "matrices", "prepared")

    def __init__(
        self,
        matrices: Sequence[Matrix],
        biases: Sequence[Floats | None] = (),
        input_bits: InputBits | Sequence[InputBits] = WIDE_INPUTS,
    ) -> None:
        self.matrices = tuple(matrices)
        biases = biases or (None,) * len(self.matrices)
        self.biases = tuple(
            bias if bias is None or bias.flags.c_contiguous else np.ascontiguousarray(bias) for bias in biases
        )
        self.cols = self.matrices[0].cols
        bits = [input_bits] * len(self.matrices) if isinstance(input_bits, int) else input_bits
        self.input_bits: tuple[InputBits, ...] = tuple(bits)
        self.prepared: dict[object, Any] = {}
        for matrix, bias in zip(self.matrices, self.biases, strict=True):
            if matrix.cols != self.cols:
                raise OperandError(f"{self.matrices[0]} and {matrix} cannot meet the same input")
            if bias is not None and (bias.dtype != np.float32 or bias.shape != (matrix.rows,)):
                raise OperandError(
                    f"bias must be float32 of shape ({matrix.rows},), got {bias.dtype} {bias.shape}"
                )


class Form(NamedTuple):
    """What experts must have in common to be computed in one call."""

    cols: int
    ffn: int
    rows: int
    activation: Activation


class FeedForward:
    """A gated feed-forward layer: `enter` is gate and up, `leave` is down; `prepared` as that of `Linears`."""

    __slots__ = ("enter", "form", "leave", "prepared")

    def __init__(self, enter: Linears, leave: Linears, activation: Activation) -> None:
        self.enter = enter
        self.leave = leave
        self.prepared: dict[object, Any] = {}
        gate, up = enter.matrices
        (down,) = leave.matrices
        self.form = Form(enter.cols, gate.rows, down.rows, activation)
        if not gate.rows == up.rows == down.cols:
            raise OperandError(f"gate {gate}, up {up} and down {down} do not make a feed-forward layer")


@dataclass(frozen=True, eq=False, slots=True)
class Routes:
    """Which tokens go to which experts. The i-th expert takes tokens[starts[i]:starts[i + 1]], each once, and its
    results are multiplied by `factors` of the same places. `tokens` int64 (N,), `factors` float32 (N,), contiguous.
    """

    starts: tuple[int, ...]
    tokens: Ids
    factors: Floats
