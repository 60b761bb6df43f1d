"""Errors of the offload room.

OffloadError
└── BudgetExceeded     an allocation would exceed the budget; nothing was allocated
"""


class OffloadError(Exception):
    """Root of this room's errors."""


class BudgetExceeded(OffloadError):
    """The message gives what was asked for, what is held and the limit, in MB."""
