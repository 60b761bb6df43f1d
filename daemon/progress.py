"""How far something is that takes long, as told to whoever shows it."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[str, int, int], None]
"""Called with what is done (a file's name, "loading", "packing"), bytes or steps so far, and in all (0 = not known)."""


def no_progress(what: str, done: int, total: int) -> None:
    """For callers that do not show any."""
