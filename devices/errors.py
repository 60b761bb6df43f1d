"""The errors of this room.

    KernelError
    ├── NoSuchDevice       a device is not there, or cannot be used
    │   └── LostOpening    a device did not answer any more while it was opened
    ├── NotPageLocked      the system does not page-lock so much memory
    ├── HomeFull           (kernels) the memory of what computes is full
    │   └── DeviceFull     a device has fewer bytes left than were asked for
    └── HomeLost           (kernels) what computes is gone, with all that it held
        └── DeviceLost     a device does not answer any more

Messages name the device, the value, the limit and what to do.
"""

from __future__ import annotations

from shoal.kernels.errors import HomeFull, HomeLost, KernelError
from shoal.partition.amounts import format_bytes


class NoSuchDevice(KernelError):
    """A device that is not there, or that cannot be used here."""


class LostOpening(NoSuchDevice):
    """A device that did not answer any more while it was opened. Whoever tried again might wait as long as the first
    time."""

    def __init__(self, why: str) -> None:
        super().__init__(f"{why}; start anew to try it again")


class NotPageLocked(KernelError):
    """The system does not page-lock so much memory. The message says why."""


class DeviceFull(HomeFull):
    """`nbytes` were asked for on a device that holds `held` of at most `limit` bytes; 0: by something that does not say
    how much."""

    def __init__(self, name: str, nbytes: int, held: int, limit: int) -> None:
        asked = (
            f"{format_bytes(nbytes)} more were asked for, and"
            if nbytes
            else "a computation found no room, though"
        )
        super().__init__(
            f"device {name} is full: {asked} {format_bytes(held)} of its {format_bytes(limit)} are taken"
        )


class DeviceLost(HomeLost):
    """The device `name` does not answer any more, and what it held is gone."""

    def __init__(self, name: str, why: str) -> None:
        super().__init__(f"device {name} is lost: {why}")
        self.name = name


def says_no_memory(said: str) -> bool:
    """Whether that is what the driver or a library says which has asked it for memory past torch: no harm is done."""
    return "CUBLAS_STATUS_ALLOC_FAILED" in said or ("CUDA" in said and "out of memory" in said)


_NOT_LOADED = (
    "kernel image",  # is invalid; none is for this card
    "PTX",  # does not compile, or is from a compiler that the driver does not know
    "symbol not found",
    "too many resources requested",
    "invalid argument",
)


def says_not_loaded(said: str) -> bool:
    """Whether the driver says so of a kernel that Triton has compiled, or Triton of one that it could not. Such errors
    leave a card as it was. Others that come up where a kernel is loaded are of something that went wrong before."""
    return said.startswith("PassManager") or (
        said.startswith("Triton Error [CUDA]: ") and any(it in said for it in _NOT_LOADED)
    )


def one_line(error: Exception | Warning) -> str:
    """What it says, however long that is."""
    return " ".join(str(error).split())[:200]
