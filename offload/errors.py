"""Errors of the offload room.

OffloadError
├── BudgetExceeded     an allocation would exceed the budget; nothing was allocated
├── KvFileError        KV pages on disk cannot be opened or read; they are computed instead
├── PackError          a pack cannot be made or used
│   ├── PackCorrupt        its bytes or its manifest are not those that were written
│   └── PackPointless      fewer bits were asked for, and no matrix has more
└── StoreError         weights could not be read while they were needed
"""


class OffloadError(Exception):
    """Root of this room's errors."""


class BudgetExceeded(OffloadError):
    """The message gives what was asked for, what is held and the limit, in MB."""


class KvFileError(OffloadError):
    """The message names the file and what is wrong."""


class PackError(OffloadError):
    """The message names the file and what is wrong with it."""


class PackCorrupt(PackError):
    """Truncated or altered; the message names the block where it is known. Packing the model again mends it."""


class PackPointless(PackError):
    """The message names the types that the weights have."""


class StoreError(OffloadError):
    """The message names the block, the file and the place in it; a later step tries again."""
