"""Errors of the daemon room: one class, because callers tell cases apart by the protocol's stable code.

    DaemonError(code, message, hint)      code is a `comm.messages.ErrorCode`

Errors of other rooms are translated once, where the daemon calls them (`error_codes`).

Nothing below `cli` knows command lines. A message or hint names what the user can set as the API does, in backticks,
with a value or without: `context_tokens=4096`, `memory_bytes=512MB`, `link`; None is a value, too. What can be done is
named by its method: `remove(tiny)`. The command line puts its own words there just before it prints (`cli/wording.py`);
a name that it has no word for stays as it is.
"""

from __future__ import annotations

import errno
from typing import cast

from shoal.comm.errors import ShoalError
from shoal.comm.messages import Error, ErrorCode

# Of an OSError: the disk is full, or a file system or a limit of this process bounds a single file.
NO_ROOM = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


def more_room(number: int) -> str:
    """What to do about an `errno` of `NO_ROOM`."""
    return "raise the limit of a file's size (ulimit -f)" if number == errno.EFBIG else "free some space"


class DaemonError(ShoalError):
    """A request that cannot be served; becomes `error` on the wire and an exit code in the CLI."""

    def __init__(self, code: ErrorCode, message: str, hint: str = "", *, retry_after_s: float = 0.0) -> None:
        super().__init__(f"{message} ({hint})" if hint else message)
        self.code: ErrorCode = code
        self.message = message
        self.hint = hint
        self.retry_after_s = retry_after_s

    @classmethod
    def of(cls, error: Error) -> DaemonError:
        """That of which `error` is the message, made by a part of this daemon."""
        return cls(
            cast("ErrorCode", error.code), error.message, error.hint, retry_after_s=error.retry_after_s
        )

    def to_message(self) -> Error:
        return Error(code=self.code, message=self.message, hint=self.hint, retry_after_s=self.retry_after_s)
