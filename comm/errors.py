"""Errors of the comm room.

ShoalError → HomeError, and CommError
├── RequestFailed   the other side answered `error` (code, message, hint)
├── ProtocolError   bytes that are not this protocol
├── AddressError    an address that cannot be used, or not without keys
│   └── AddressTaken    another process listens there
├── KeyFileError    a key file that is missing, malformed or readable by others
├── NoDaemon        nothing listens at the address
└── TimedOut        no answer in time
"""

from __future__ import annotations

import errno


class ShoalError(Exception):
    """Root of the errors that reach a user of `shoal.client`, or of the daemon in his own process."""


class HomeError(ShoalError):
    """SHOAL_HOME names what cannot be a home."""


class CommError(ShoalError):
    """Root of this room's errors."""


class ProtocolError(CommError):
    """Frames, sizes or fields that do not follow docs/api.md.

    `code` is the `messages.ErrorCode` to answer with; `request_id` is that of the bad message, b"" if unreadable.
    """

    def __init__(self, message: str, code: str = "bad_request", request_id: bytes = b"") -> None:
        super().__init__(message)
        self.code = code
        self.request_id = request_id


class AddressError(CommError):
    """An address that is malformed, or open to other users."""


class AddressTaken(AddressError):
    """Another process listens there."""


def cannot_listen(where: str, error: OSError) -> AddressError:
    """What to raise where binding to an address has failed."""
    said = f"cannot listen at {where}: {error.strerror}"
    if error.errno == errno.EADDRINUSE:
        return AddressTaken(f"{said}: take another port, or 0 for any that is free")
    return AddressError(said)


class KeyFileError(CommError):
    """A key file that cannot be used."""


class NoDaemon(CommError):
    """Nothing listens at the address, or it went away."""


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
