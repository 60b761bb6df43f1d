"""The kernels: one set of functions over weights in their stored type, and several homes that compute them.

Knows only numbers and layouts, not what a model is. From other rooms it imports only the numbers of
`partition.memory_layout`.
"""

from shoal.kernels.compute_home import ComputeHome
from shoal.kernels.errors import KernelError, OperandError, UnsupportedTypeError
from shoal.kernels.homes import home, home_of, set_threads
from shoal.kernels.matrix import (
    NARROW_INPUTS,
    WIDE_INPUTS,
    Activation,
    FeedForward,
    InputBits,
    Linears,
    Matrix,
    Routes,
)
from shoal.kernels.stored_rows import dequantize, from_stored, gather_rows, interleave
from shoal.kernels.types import WEIGHT_TYPES, WeightType, weight_type

__all__ = [
    "NARROW_INPUTS",
    "WEIGHT_TYPES",
    "WIDE_INPUTS",
    "Activation",
    "ComputeHome",
    "FeedForward",
    "InputBits",
    "KernelError",
    "Linears",
    "Matrix",
    "OperandError",
    "Routes",
    "UnsupportedTypeError",
    "WeightType",
    "dequantize",
    "from_stored",
    "gather_rows",
    "home",
    "home_of",
    "interleave",
    "set_threads",
    "weight_type",
]
