"""The errors of this room.

    KernelError                 anything the kernels refuse
    ├── UnsupportedTypeError    a weight type without kernels (known by name, or unknown)
    ├── OperandError            sizes, dtypes or layouts of operands that do not fit together
    ├── NoSuchHome              kernels that were asked for by name, and do not run here
    ├── HomeFull                a home's memory is full; what it holds stays as it is
    └── HomeLost                a home is gone, with all that it held

Does not know who called. Messages name the value, the limit and what to do.
"""


class KernelError(Exception):
    """Base of every error the kernels raise on purpose."""


class UnsupportedTypeError(KernelError):
    """No kernel computes with this weight type."""


class OperandError(KernelError):
    """Operands whose size, dtype or layout does not fit the call."""


class NoSuchHome(KernelError):
    """Kernels that were asked for by name do not run on this machine."""


class HomeFull(KernelError):
    """The memory in which a home computes is full. What it holds stays as it is."""


class HomeLost(KernelError):
    """A home does not compute any more, and what it held is gone."""
