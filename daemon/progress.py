"""How far something is that takes long, for whoever shows it."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[str, int, int], None]
"""Called with what is being done (a file's name, "loading", "packing"), bytes or steps done, and all (0 = unknown)."""


def no_progress(what: str, done: int, total: int) -> None:
    """For callers that do not show any."""
