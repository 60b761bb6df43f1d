"""How far something is that moves many bytes, as told to whoever shows it."""

from collections.abc import Callable

BytesDone = Callable[[int, int], None]
"""Called with the bytes done so far, and the bytes in all."""


def unheard(done: int, total: int) -> None:
    """For callers that do not show any."""
