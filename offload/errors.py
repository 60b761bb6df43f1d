"""Errors of the offload room.

OffloadError
├── BudgetExceeded     an allocation would exceed the budget; nothing was allocated
└── KvFileError        KV pages on disk cannot be opened or read; they are computed instead
"""


class OffloadError(Exception):
    """Root of this room's errors."""


class BudgetExceeded(OffloadError):
    """The message gives what was asked for, what is held and the limit, in MB."""


class KvFileError(OffloadError):
    """The message names the file and what is wrong."""
