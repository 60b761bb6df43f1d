"""The homes that exist: which one computes a block, by the name of its device.

Knows which kernels serve the CPU of this process; they are chosen once, when they are first needed. Computes nothing.
"""

import os
import warnings
from collections.abc import Callable, Mapping

from shoal.kernels.compute_home import ComputeHome
from shoal.kernels.cpu_home import CpuHome
from shoal.kernels.errors import KernelError, OperandError
from shoal.kernels.native_library import Native

_cpu: CpuHome | None = None


def choose(name: str = "") -> CpuHome:
    """The CPU's home from now on: with the kernels of this name (avx512vnni, avx512, avxvnni, avx2, neon_dot, neon,
    scalar, reference), or with the best ones for "". KernelError if kernels that were asked for by name do not run
    here. If none were asked for and the native library is missing, the reference serves, with one warning.
    """
    global _cpu
    _cpu = _reference() if name == "reference" else _native(name)
    return _cpu


def _native(name: str) -> CpuHome:
    try:
        return Native(name)
    except KernelError as error:
        if name:
            raise
        warnings.warn(
            f"{error}. Computing with the slow reference kernels; for fast ones install a C++ compiler "
            "(GCC or Clang) and reinstall shoal",
            RuntimeWarning,
            stacklevel=4,
        )
        return _reference()


def _reference() -> CpuHome:
    from shoal.kernels.reference import ReferenceHome  # and with it torch: 125 MB that others do without

    return ReferenceHome()


def cpu() -> CpuHome:
    """The CPU's home; SHOAL_KERNELS names its kernels."""
    return _cpu or choose(os.environ.get("SHOAL_KERNELS", ""))


HOMES: Mapping[str, Callable[[], ComputeHome]] = {"cpu": cpu}


def home_of(device: str) -> ComputeHome:
    """The home that computes the blocks of this device (`BlockPlan.device`). KernelError if there is none."""
    home = HOMES.get(device)
    if home is None:
        raise KernelError(f"nothing computes on device {device!r}: use one of {', '.join(HOMES)}")
    return home()


def home() -> str:
    """Which kernels serve the CPU: avx512vnni, avx512, avxvnni, avx2, neon_dot, neon, scalar or reference."""
    return cpu().name


def set_threads(n: int) -> None:
    """The CPU computes on `n` threads from now on. OperandError unless there is at least one."""
    if n < 1:
        raise OperandError(f"cannot compute on {n} threads: give 1 or more")
    cpu().set_threads(n)
