"""The callback that reports how far a long transfer of bytes has come."""

from collections.abc import Callable

BytesDone = Callable[[int, int], None]
"""Called with the bytes done so far and the bytes in all."""


def unheard(done: int, total: int) -> None:
    """The default, for callers that do not show progress."""
