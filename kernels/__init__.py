"""How it is computed fast: one function set over weights in their stored type, several homes.

Knows numbers and layouts only: it imports no other room and does not know what a model is.
"""

from shoal.kernels.dispatch import dequantize, gather_rows, geglu, home, linear, rms_norm, set_threads, swiglu
from shoal.kernels.errors import KernelError, OperandError, UnsupportedTypeError
from shoal.kernels.matrix import Matrix
from shoal.kernels.types import WEIGHT_TYPES, WeightType, weight_type

__all__ = [
    "WEIGHT_TYPES",
    "KernelError",
    "Matrix",
    "OperandError",
    "UnsupportedTypeError",
    "WeightType",
    "dequantize",
    "gather_rows",
    "geglu",
    "home",
    "linear",
    "rms_norm",
    "set_threads",
    "swiglu",
    "weight_type",
]
