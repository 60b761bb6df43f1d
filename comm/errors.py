"""Errors of the comm room.

CommError
├── RequestFailed   the other side answered `error` (code, message, hint)
├── ProtocolError   bytes that are not this protocol
├── NoDaemon        nothing listens at the address
└── TimedOut        no answer in time
"""

from __future__ import annotations


class CommError(Exception):
    """Root of this room's errors."""


class ProtocolError(CommError):
    """Frames, sizes or fields that do not follow docs/api.md."""


class NoDaemon(CommError):
    """Nothing listens at the address."""


class TimedOut(CommError):
    """The other side did not answer within the stated time."""


class RequestFailed(CommError):
    """The other side answered `error`. `code` is stable, see `messages.ErrorCode`."""

    def __init__(self, code: str, message: str, hint: str = "", retry_after_s: float = 0.0) -> None:
        super().__init__(f"{message} ({hint})" if hint else message)
        self.code = code
        self.message = message
        self.hint = hint
        self.retry_after_s = retry_after_s
