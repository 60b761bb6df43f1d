"""Predicted figures in words."""

from __future__ import annotations

from shoal.partition.amounts import format_duration


def rate_words(speed: float) -> str:
    """Of something a second."""
    return f"{speed:.0f}" if speed >= 100 else f"{speed:.3g}"


def seconds_words(seconds: float) -> str:
    if seconds >= 99.5:
        return format_duration(seconds)
    return f"{seconds:.2g} s" if seconds >= 1 else f"{seconds * 1e3:.0f} ms"
