"""Errors of the offload room.

OffloadError
├── BudgetExceeded     an allocation would exceed the budget; nothing was allocated
├── KvFileError        KV pages on disk cannot be opened or read, so they are computed again
├── PackError          a pack cannot be made or used
│   ├── PackCorrupt        its bytes or its manifest differ from what was written
│   └── PackPointless      fewer bits were asked for, and no matrix has more
└── StoreError         weights could not be read when they were needed
"""


class OffloadError(Exception):
    """Root of this room's errors."""


class BudgetExceeded(OffloadError):
    """The message says how many MB were asked for, how many are held, and the limit."""


class KvFileError(OffloadError):
    """The message names the file and what is wrong."""


class PackError(OffloadError):
    """The message names the file and what is wrong with it."""


class PackCorrupt(PackError):
    """The pack is truncated or was altered. The message names the block if it is known. Packing again mends it."""


class PackPointless(PackError):
    """The message names the types of the weights."""


class StoreError(OffloadError):
    """The message names the block, the file and the place in it. A later step tries again."""
