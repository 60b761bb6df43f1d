"""A weight matrix in its stored type.

Knows where the bytes of each row are and that there are neither more nor fewer of them than the
type asks for. Never converts, copies or moves them, and does not know what they mean: that is
`reference` (the truth) and `native`.
"""

import warnings
from dataclasses import dataclass, field

import torch

from shoal.kernels.errors import OperandError
from shoal.kernels.types import BF16, F16, F32, WeightType

TYPE_OF_DTYPE = {torch.float32: F32, torch.float16: F16, torch.bfloat16: BF16}
_NO_BYTES = torch.empty(0, dtype=torch.uint8)

Bytes = bytes | bytearray | memoryview


@dataclass(frozen=True, eq=False, slots=True, weakref_slot=True)
class Matrix:
    """rows×cols weights stored as `type`; `data` is uint8 (rows, row bytes), rows contiguous.

    All types, the float ones too, are held as bytes, so slices are views and no pointer has to be
    aligned. Matrices compare by identity.
    """

    type: WeightType
    data: torch.Tensor
    rows: int
    cols: int
    row_bytes: int = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "row_bytes", self.type.row_bytes(self.cols))
        if self.rows < 0:
            raise OperandError(f"a matrix of {self.rows} rows cannot be: rows must be 0 or more")
        shape = (self.rows, self.row_bytes)
        if self.data.dtype != torch.uint8 or self.data.device.type != "cpu":
            raise OperandError(
                f"the bytes of a matrix must be uint8 on the CPU, not {self.data.dtype} on {self.data.device}"
            )
        if tuple(self.data.shape) != shape or not self.data.is_contiguous():
            raise OperandError(
                f"{self.rows}×{self.cols} {self.type.name} needs contiguous bytes of shape {shape}, "
                f"got {tuple(self.data.shape)} with strides {self.data.stride()}"
            )

    @classmethod
    def from_bytes(cls, type: WeightType, rows: int, cols: int, buffer: torch.Tensor | Bytes) -> "Matrix":
        """Wraps the bytes of a whole matrix, zero copy: a contiguous uint8 tensor of any shape, or
        bytes or a memoryview. OperandError unless their number is exactly that of rows×cols.
        """
        if isinstance(buffer, torch.Tensor):
            data = buffer
        else:
            with warnings.catch_warnings():  # torch warns of read-only memory; a Matrix never writes
                warnings.simplefilter("ignore", UserWarning)
                data = torch.frombuffer(buffer, dtype=torch.uint8) if len(buffer) else _NO_BYTES
        expected_bytes = max(rows, 0) * type.row_bytes(cols)
        if data.dtype != torch.uint8 or not data.is_contiguous() or data.numel() != expected_bytes:
            raise OperandError(
                f"{rows}×{cols} {type.name} takes {expected_bytes} contiguous uint8, "
                f"got {data.numel()} of {data.dtype}; the file may be cut short or mislabelled"
            )
        return cls(type, data.view(rows, type.row_bytes(cols)), rows, cols)

    @classmethod
    def from_tensor(cls, tensor: torch.Tensor) -> "Matrix":
        """Wraps a 2-D float32, float16 or bfloat16 tensor; zero copy if it is contiguous."""
        kind = TYPE_OF_DTYPE.get(tensor.dtype)
        if kind is None or tensor.dim() != 2:
            raise OperandError(
                "a matrix is made from a 2-D tensor of float32, float16 or bfloat16, "
                f"got {tensor.dim()}-D {tensor.dtype}"
            )
        rows, cols = tensor.shape
        data = tensor.detach().contiguous().view(-1).view(torch.uint8)
        return cls(kind, data.view(rows, kind.row_bytes(cols)), rows, cols)

    @property
    def nbytes(self) -> int:
        """Bytes that the weights take."""
        return self.data.numel()

    def slice_rows(self, start: int, stop: int) -> "Matrix":
        """Rows [start, stop) as a matrix over the same bytes."""
        if not 0 <= start <= stop <= self.rows:
            raise OperandError(f"rows [{start}, {stop}) are not within the {self.rows} rows of this matrix")
        return Matrix(self.type, self.data[start:stop], stop - start, self.cols)

    def __repr__(self) -> str:
        return f"Matrix({self.rows}×{self.cols} {self.type.name}, {self.nbytes} bytes)"
