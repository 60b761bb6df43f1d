"""The homes that exist: which one computes a block, by the name of its device.

Knows which kernels serve the CPU of this process; they are chosen once, when they are first needed. Computes nothing.
"""

import os
import warnings
from collections.abc import Callable, Mapping
from contextlib import suppress

from shoal.kernels.compute_home import ComputeHome
from shoal.kernels.cpu_home import CpuHome
from shoal.kernels.errors import KernelError, NoSuchHome, OperandError
from shoal.kernels.native_library import Native

REFERENCE = "reference"
NATIVE_HOMES = ("avx512vnni", "avx512", "avxvnni", "avx2", "neon_dot", "neon", "scalar")  # the best first

_cpu: CpuHome | None = None


def choose(name: str = "") -> CpuHome:
    """The CPU's home from now on: with the kernels of this name (of `NATIVE_HOMES`, or `REFERENCE`), or with the best
    ones for "". KernelError if kernels that were asked for by name do not run here. If none were asked for and the
    native library is missing, the reference serves, with one warning.
    """
    global _cpu
    _cpu = _reference() if name == REFERENCE else _native(name)
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


def runnable() -> list[str]:
    """The names of the kernels that run on this machine, the best first."""
    found = []
    for name in NATIVE_HOMES:
        with suppress(KernelError):
            found.append(Native(name).name)
    return [*found, REFERENCE]


def cpu() -> CpuHome:
    """The CPU's home; SHOAL_KERNELS names its kernels. NoSuchHome if these do not run here."""
    if _cpu is not None:
        return _cpu
    name = os.environ.get("SHOAL_KERNELS", "")
    try:
        return choose(name)
    except KernelError as error:
        would_do = ", ".join(runnable())
        raise NoSuchHome(
            f"SHOAL_KERNELS={name!r:.40}: {error}: must be one of {would_do}, or absent"
        ) from error


HOMES: Mapping[str, Callable[[], ComputeHome]] = {"cpu": cpu}


def home_of(device: str) -> ComputeHome:
    """The home that computes the blocks of this device (`BlockPlan.device`). KernelError if there is none."""
    home = HOMES.get(device)
    if home is None:
        raise KernelError(f"nothing computes on device {device!r}: use one of {', '.join(HOMES)}")
    return home()


def home() -> str:
    """Which kernels serve the CPU, of `NATIVE_HOMES` or `REFERENCE`."""
    return cpu().name


def set_threads(n: int) -> None:
    """The CPU computes on `n` threads from now on. OperandError unless there is at least one."""
    if n < 1:
        raise OperandError(f"cannot compute on {n} threads: give 1 or more")
    cpu().set_threads(n)
