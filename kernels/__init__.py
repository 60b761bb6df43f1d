"""How it is computed fast: one function set over weights in their stored type, several homes.

Knows numbers and layouts only: it imports no other room and does not know what a model is.
"""

from shoal.kernels.dispatch import (
    dequantize,
    experts,
    feed_forward,
    from_stored,
    gather_rows,
    home,
    interleave,
    linear,
    linears,
    rms_norm,
    set_threads,
)
from shoal.kernels.errors import KernelError, OperandError, UnsupportedTypeError
from shoal.kernels.matrix import Activation, FeedForward, Linears, Matrix, Routes
from shoal.kernels.types import WEIGHT_TYPES, WeightType, weight_type

__all__ = [
    "WEIGHT_TYPES",
    "Activation",
    "FeedForward",
    "KernelError",
    "Linears",
    "Matrix",
    "OperandError",
    "Routes",
    "UnsupportedTypeError",
    "WeightType",
    "dequantize",
    "experts",
    "feed_forward",
    "from_stored",
    "gather_rows",
    "home",
    "interleave",
    "linear",
    "linears",
    "rms_norm",
    "set_threads",
    "weight_type",
]
