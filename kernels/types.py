"""The stored types of weights: GGUF tensor types as data.

Knows the ids, names and block geometry of the types that Shoal computes with, and the names of the others, so that a
refusal can name them. Knows nothing of tensors, files or arithmetic.

A row in a file is whole blocks, one after the other: `block_weights` consecutive weights share `block_bytes` bytes.
Source of ids and sizes: ggml's type table, as published by the `gguf` package. In memory the rows of a quantised type
lie in bands of sixteen, of which the last is filled up (`bands`).
"""

from dataclasses import dataclass

from shoal.kernels.errors import OperandError, UnsupportedTypeError
from shoal.partition.memory_layout import BAND_ROWS


@dataclass(frozen=True, slots=True)
class WeightType:
    """One stored type: its GGUF id and name, the geometry of its blocks, and for a quantised type the bytes of a block
    where numbers in half precision begin (`halves`).
    """

    id: int
    name: str
    block_weights: int
    block_bytes: int
    halves: tuple[int, ...] = ()

    @property
    def quantised(self) -> bool:
        return self.block_weights > 1

    @property
    def band_rows(self) -> int:
        """Rows of a band: a matrix in memory is whole bands."""
        return BAND_ROWS if self.quantised else 1

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.block_bytes / self.block_weights

    def bytes_before(self, col: int) -> int:
        """Bytes of a row before column `col`; OperandError unless a block begins there."""
        return self.row_bytes(col) if col else 0

    def row_bytes(self, cols: int) -> int:
        """Bytes of one row of `cols` weights; OperandError unless `cols` is whole blocks."""
        if cols <= 0 or cols % self.block_weights:
            raise OperandError(
                f"a row of {cols} weights cannot be stored as {self.name}: "
                f"its length must be a positive multiple of {self.block_weights}"
            )
        return cols // self.block_weights * self.block_bytes

    def matrix_bytes(self, rows: int, cols: int) -> int:
        """Bytes of a matrix in memory."""
        return -(-rows // self.band_rows) * self.band_rows * self.row_bytes(cols)


F32 = WeightType(0, "F32", 1, 4)
F16 = WeightType(1, "F16", 1, 2)
BF16 = WeightType(30, "BF16", 1, 2)
Q4_0 = WeightType(2, "Q4_0", 32, 18, halves=(0,))
Q4_1 = WeightType(3, "Q4_1", 32, 20, halves=(0, 2))
Q5_0 = WeightType(6, "Q5_0", 32, 22, halves=(0,))
Q5_1 = WeightType(7, "Q5_1", 32, 24, halves=(0, 2))
Q8_0 = WeightType(8, "Q8_0", 32, 34, halves=(0,))
Q2_K = WeightType(10, "Q2_K", 256, 84, halves=(80, 82))
Q3_K = WeightType(11, "Q3_K", 256, 110, halves=(108,))
Q4_K = WeightType(12, "Q4_K", 256, 144, halves=(0, 2))
Q5_K = WeightType(13, "Q5_K", 256, 176, halves=(0, 2))
Q6_K = WeightType(14, "Q6_K", 256, 210, halves=(208,))
IQ4_NL = WeightType(20, "IQ4_NL", 32, 18, halves=(0,))

WEIGHT_TYPES = (F32, F16, BF16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q2_K, Q3_K, Q4_K, Q5_K, Q6_K, IQ4_NL)

UNSUPPORTED_NAMES = {
    9: "Q8_1",
    15: "Q8_K",
    16: "IQ2_XXS",
    17: "IQ2_XS",
    18: "IQ3_XXS",
    19: "IQ1_S",
    21: "IQ3_S",
    22: "IQ2_S",
    23: "IQ4_XS",
    24: "I8",
    25: "I16",
    26: "I32",
    27: "I64",
    28: "F64",
    29: "IQ1_M",
    34: "TQ1_0",
    35: "TQ2_0",
    39: "MXFP4",
    40: "NVFP4",
    41: "Q1_0",
}

_BY_ID = {kind.id: kind for kind in WEIGHT_TYPES}


def weight_type(id: int) -> WeightType:
    """The type with this GGUF id. UnsupportedTypeError if it has no kernels, naming the type if its name is known."""
    kind = _BY_ID.get(id)
    if kind is None:
        name = UNSUPPORTED_NAMES.get(id)
        what = f"weight type {name} (GGUF id {id})" if name else f"unknown weight type, GGUF id {id},"
        known = ", ".join(kind.name for kind in WEIGHT_TYPES)
        raise UnsupportedTypeError(f"{what} is not supported; use a model quantised as one of {known}")
    return kind
